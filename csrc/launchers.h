// What bindings.cpp calls: one launcher a kernel file, plain pointers and a stream in, a cudaError_t out.
#pragma once

#include <cmath>
#include <cstdint>

enum Dtype : int { kFloat32, kFloat16, kBFloat16 };

// The rows of a tensor (..., N): row m starts at m / inner * stride_outer + m % inner * stride_inner, its column n lies
// n * stride_n further. Leading dims that lie evenly in memory are one; inner is 1 where all are. Strides in elements.
struct Rows {
    int64_t inner, stride_outer, stride_inner, stride_n;
};

// Dropout of a row op: `seed` points to two int64 on the device, seed and offset; null where nothing is dropped.
// An element stays, times rescale, where its 16 random bits are not below threshold.
struct RowDropout {
    const int64_t* seed;
    uint32_t threshold;
    float rescale;
};

// For a probability in [0, 1], which is rounded to a multiple of 2^-16, halves to even.
inline RowDropout row_dropout(const int64_t* seed, double p) {
    const auto k = static_cast<uint32_t>(std::nearbyint(p * 65536.0));
    return {seed, k, k < 65536 ? static_cast<float>(65536.0 / (65536 - k)) : 0.0f};
}

// One call of the norms. r = residual + dropout(x), or x itself; y = norm(r). Everything but the inputs of Rows is
// contiguous; null means absent. M and N are at least 1.
struct LayerNormFwd {
    const void *x, *residual;     // (M, N)
    const void *weight, *bias;    // (N,)
    void *y, *r;                  // (M, N)
    float *mean, *rstd;           // (M,)
    Rows x_rows, residual_rows;
    RowDropout dropout;
    int64_t M, N;
    float eps;
    Dtype dtype;  // of x, and of whatever below is not wide, which means fp32
    bool rms;
    bool residual_wide;  // residual and r
    bool weights_wide, y_wide;
};

// Gradients of that, from dy and dr, which is what came for r itself. dx is (M, N) of dtype, through the dropout;
// dresidual of r's. sums and the partial sums are workspace: sums (M, 2), each partial (partial_rows, N), null where that
// gradient is not wanted. A persistent grid has at most partial_rows blocks.
struct LayerNormBwd {
    const void *dy, *dr, *r;      // (M, N)
    const void *weight;           // (N,)
    const float *mean, *rstd;     // (M,)
    void *dx, *dresidual;         // (M, N)
    void *dweight, *dbias;        // (N,) of gradient_dtype
    float *partial_dweight, *partial_dbias, *sums;
    Rows dy_rows, dr_rows, r_rows;
    RowDropout dropout;
    int64_t M, N, partial_rows;
    Dtype dtype, gradient_dtype;
    bool rms;
    bool dy_wide, weights_wide;
    bool r_wide;  // r, dr and dresidual
};

extern "C" {

int layer_norm_fwd(const LayerNormFwd* call, void* stream);
int layer_norm_bwd(const LayerNormBwd* call, void* stream);

// Loads every kernel of layer_norm.cu onto the current device, which a first launch inside a graph capture could not.
int layer_norm_prepare();
}
