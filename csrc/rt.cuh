// The header every kernel source includes first: vectors of each dtype, sums over threads, and the three spellings
// (shared memory, dynamic shared memory, launch) that only nvcc understands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SMEM_ARRAY(T, name, dims) __shared__ T name dims
#define SMEM_DYN(name, align) extern __shared__ __align__(align) unsigned char name[]
// Evaluates to the launch's own error code.
#define KLAUNCH(kernel, grid, block, smem, stream, ...) \
    (kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), cudaGetLastError())

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float(float v) { return v; }
template <>
__device__ inline __half from_float(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

// kVec neighbours, moved by loads and stores of up to 16 bytes.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec {
    T at[kVec];
};

template <int kVec, typename T>
__device__ void load(const T* from, float (&to)[kVec]) {
    const auto vec = *reinterpret_cast<const Vec<T, kVec>*>(from);
#pragma unroll
    for (int i = 0; i < kVec; i++) to[i] = to_float(vec.at[i]);
}

template <int kVec, typename T>
__device__ void store(T* to, const float (&from)[kVec]) {
    Vec<T, kVec> vec;
#pragma unroll
    for (int i = 0; i < kVec; i++) vec.at[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vec<T, kVec>*>(to) = vec;
}

// The sum over a group of kThreads threads, a warp or the whole block, in an order that never varies.
template <int kThreads>
__device__ float group_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    if constexpr (kThreads > 32) {
        SMEM_ARRAY(float, sPart, [kThreads / 32]);
        if (threadIdx.x % 32 == 0) sPart[threadIdx.x / 32] = v;
        __syncthreads();
        v = 0;
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; warp++) v += sPart[warp];
        __syncthreads();  // sPart is free for the next sum
    }
    return v;
}
