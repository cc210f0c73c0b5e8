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

extern "C" {

// x (M, N) with any strides; weight and bias (N,) contiguous or null, both of w_dtype, which is x_dtype or fp32;
// y (M, N) contiguous of x_dtype; mean, rstd (M,) fp32. M and N are at least 1.
int layer_norm_fwd(const void* x, const void* weight, const void* bias, void* y, float* mean, float* rstd,
                   int64_t stride_x_m, int64_t stride_x_n, int64_t M, int64_t N, int x_dtype, int w_dtype, float eps,
                   void* stream);

// Loads every kernel of layer_norm.cu onto the current device, which a first launch inside a graph capture could not.
int layer_norm_prepare();
}
