// LayerNorm over the rows of x (M, N):  y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps)
//
// One warp owns a row of up to 1024 columns, one block a longer one. Rows of up to 8192 columns are read once, 16 bytes
// at a time, and stay in registers as fp32; longer ones are read three times, two of them mostly from cache, and so are
// rows that are not aligned to 16 bytes or not contiguous, one column at a time. The variance is the mean of the squared
// distances from the mean, taken in a second pass over the row, which also finds what rounding has left in the mean:
// nothing cancels, however large the mean is.
// All arithmetic is fp32 and sums have a fixed order. Read and written: 2 * M * N elements and 2 * M statistics.

#include "rt.cuh"

#include "launchers.h"

namespace {

// The part of a row that one thread sees: kVec columns out of every kThreads * kVec. kHeld such vectors fit into its
// registers; 0 stands for a row that does not, and is read anew on every pass.
template <typename T, int kVec, int kThreads, int kHeld>
struct Row {
    const T* gX;
    int64_t stride, N;
    int thread;
    float r[kHeld ? kHeld : 1][kVec];

    __device__ void fetch(int64_t n, float (&v)[kVec]) const {
        if constexpr (kVec == 1)
            v[0] = to_float(gX[n * stride]);
        else
            load<kVec>(gX + n, v);
    }

    // visit(n, v) with columns n .. n + kVec - 1, for all of this thread's vectors; the first pass also loads.
    template <bool kFirst, typename Visit>
    __device__ void pass(Visit visit) {
        if constexpr (kHeld > 0) {
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const int n = (i * kThreads + thread) * kVec;
                if (n >= N) continue;
                if constexpr (kFirst) fetch(n, r[i]);
                visit(n, r[i]);
            }
        } else {
            for (int64_t n = thread * kVec; n < N; n += kThreads * kVec) {
                fetch(n, r[0]);
                visit(n, r[0]);
            }
        }
    }
};

template <typename T, typename W, int kVec, int kThreads, int kHeld>
__global__ void __launch_bounds__(kThreads > 128 ? kThreads : 128)
    layer_norm_fwd_kernel(const void* gX, const void* gWeight, const void* gBias, void* gY, float* gMean, float* gRstd,
                          int64_t stride_x_m, int64_t stride_x_n, int64_t M, int64_t N, float eps) {
    constexpr int kRows = kThreads > 128 ? 1 : 128 / kThreads;
    const int64_t m = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads;
    if (m >= M) return;  // a whole warp; where a block owns the row, there is one for each

    const int thread = threadIdx.x % kThreads;
    Row<T, kVec, kThreads, kHeld> row{static_cast<const T*>(gX) + m * stride_x_m, stride_x_n, N, thread, {}};
    const W* weight = static_cast<const W*>(gWeight);
    const W* bias = static_cast<const W*>(gBias);
    T* y = static_cast<T*>(gY) + m * N;

    float sum = 0;
    row.template pass<true>([&](int64_t, const float(&v)[kVec]) {
#pragma unroll
        for (int i = 0; i < kVec; i++) sum += v[i];
    });
    const float mean = group_sum<kThreads>(sum) / static_cast<float>(N);

    float rest = 0, squares = 0;
    row.template pass<false>([&](int64_t, const float(&v)[kVec]) {
#pragma unroll
        for (int i = 0; i < kVec; i++) {
            rest += v[i] - mean;
            squares += (v[i] - mean) * (v[i] - mean);
        }
    });
    rest = group_sum<kThreads>(rest) / static_cast<float>(N);  // what rounding has left in the mean
    const float rstd = rsqrtf(group_sum<kThreads>(squares) / static_cast<float>(N) - rest * rest + eps);

    row.template pass<false>([&](int64_t n, const float(&v)[kVec]) {
        float w[kVec], b[kVec], out[kVec];
        if (weight) load<kVec>(weight + n, w);
        if (bias) load<kVec>(bias + n, b);
#pragma unroll
        for (int i = 0; i < kVec; i++) {
            out[i] = (v[i] - mean - rest) * rstd;
            if (weight) out[i] *= w[i];
            if (bias) out[i] += b[i];
        }
        store<kVec>(y + n, out);
    });

    if (thread == 0) {
        gMean[m] = mean + rest;
        gRstd[m] = rstd;
    }
}

using Kernel = void (*)(const void*, const void*, const void*, void*, float*, float*, int64_t, int64_t, int64_t,
                        int64_t, float);

struct Choice {
    Kernel kernel;
    int threads;  // per row
};

// Row lengths at which the next variant takes over, ascending; never timed on a GPU yet.
constexpr int64_t kShort = 256, kWarp = 1024, kBlock = 8192;
constexpr int64_t kOneOfEach[] = {kShort, kWarp, kBlock, kBlock + 1};

template <typename T, typename W, int kVec>
Choice choose(int64_t N) {
    if (N <= kShort) return {layer_norm_fwd_kernel<T, W, kVec, 32, kShort / 32 / kVec>, 32};
    constexpr bool kHold = kVec > 1;  // 32 strided columns in registers need 32 addresses beside them, and spill
    if (N <= kWarp) return {layer_norm_fwd_kernel<T, W, kVec, 32, kHold ? kWarp / 32 / kVec : 0>, 32};
    if (N <= kBlock) return {layer_norm_fwd_kernel<T, W, kVec, 256, kHold ? kBlock / 256 / kVec : 0>, 256};
    return {layer_norm_fwd_kernel<T, W, kVec, 512, 0>, 512};
}

template <typename T>
Choice choose(bool fp32_weights, bool vectors, int64_t N) {
    constexpr int kVec = 16 / sizeof(T);
    if (fp32_weights) return vectors ? choose<T, float, kVec>(N) : choose<T, float, 1>(N);
    return vectors ? choose<T, T, kVec>(N) : choose<T, T, 1>(N);
}

Choice choose(int x_dtype, bool fp32_weights, bool vectors, int64_t N) {
    if (x_dtype == kFloat16) return choose<__half>(fp32_weights, vectors, N);
    if (x_dtype == kBFloat16) return choose<__nv_bfloat16>(fp32_weights, vectors, N);
    return choose<float>(true, vectors, N);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

extern "C" int layer_norm_fwd(const void* x, const void* weight, const void* bias, void* y, float* mean, float* rstd,
                              int64_t stride_x_m, int64_t stride_x_n, int64_t M, int64_t N, int x_dtype, int w_dtype,
                              float eps, void* stream) {
    const int64_t width = x_dtype == kFloat32 ? 4 : 8;
    const bool vectors = stride_x_n == 1 && stride_x_m % width == 0 && N % width == 0 && aligned(x) && aligned(weight) &&
                         aligned(bias) && aligned(y);
    const Choice choice = choose(x_dtype, w_dtype == kFloat32, vectors, N);
    const int block = choice.threads > 128 ? choice.threads : 128;
    const int64_t rows = block / choice.threads, grid = (M + rows - 1) / rows;
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    return KLAUNCH(choice.kernel, static_cast<unsigned>(grid), block, 0, stream, x, weight, bias, y, mean, rstd,
                   stride_x_m, stride_x_n, M, N, eps);
}

extern "C" int layer_norm_prepare() {
    for (int x_dtype : {kFloat32, kFloat16, kBFloat16})
        for (bool fp32_weights : {false, true})
            for (bool vectors : {false, true})
                for (int64_t N : kOneOfEach) {
                    cudaFuncAttributes attributes;
                    const auto kernel = choose(x_dtype, fp32_weights, vectors, N).kernel;
                    const auto error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
                    if (error != cudaSuccess) return error;
                }
    return cudaSuccess;
}
