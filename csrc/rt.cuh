// The header every kernel source includes first: vectors of each dtype, sums over threads, and the three spellings
// (shared memory, dynamic shared memory, launch) that only nvcc understands.
#pragma once

#ifdef FASTATTN_EMULATION
#include "emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SMEM_ARRAY(T, name, dims) __shared__ T name dims
#define SMEM_DYN(name, align) extern __shared__ __align__(align) unsigned char name[]
// Evaluates to the launch's own error code.
#define KLAUNCH(kernel, grid, block, smem, stream, ...) \
    (kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), cudaGetLastError())
// Before a load or store of several elements: the emulation checks and counts it.
#define READS(address, bytes)
#define WRITES(address, bytes)
#endif

#include <cstdint>

#include "launchers.h"

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
__device__ Vec<T, kVec> load_raw(const T* from) {
    READS(from, sizeof(T) * kVec);
    return *reinterpret_cast<const Vec<T, kVec>*>(from);
}

template <int kVec, typename T>
__device__ void load(const T* from, float (&to)[kVec]) {
    const auto vec = load_raw<kVec>(from);
#pragma unroll
    for (int i = 0; i < kVec; i++) to[i] = to_float(vec.at[i]);
}

template <int kVec, typename T>
__device__ void store(T* to, const float (&from)[kVec]) {
    Vec<T, kVec> vec;
#pragma unroll
    for (int i = 0; i < kVec; i++) vec.at[i] = from_float<T>(from[i]);
    WRITES(to, sizeof vec);
    *reinterpret_cast<Vec<T, kVec>*>(to) = vec;
}

// As store, to global memory: 16 bytes by one instruction, which the compiler takes apart in places.
template <int kVec, typename T>
__device__ void store_global(T* to, const float (&from)[kVec]) {
    Vec<T, kVec> vec;
    if constexpr (sizeof vec % 16 != 0) {
        store<kVec>(to, from);
    } else {
#pragma unroll
        for (int i = 0; i < kVec; i++) vec.at[i] = from_float<T>(from[i]);
#pragma unroll
        for (int i = 0; i < int(sizeof vec / 16); i++)
            __stwb(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&vec)[i]);
    }
}

// As load and store, at element `at` of an array of T or, where `wide`, of float: the dtype of what stands beside x. A
// branch around whole loops of them keeps the loads of one loop in flight together.
template <typename T, int kVec>
__device__ void load_either(const void* from, bool wide, int64_t at, float (&to)[kVec]) {
    if (wide)
        load<kVec>(static_cast<const float*>(from) + at, to);
    else
        load<kVec>(static_cast<const T*>(from) + at, to);
}

template <typename T, int kVec>
__device__ void store_either(void* to, bool wide, int64_t at, const float (&from)[kVec]) {
    if (wide)
        store_global<kVec>(static_cast<float*>(to) + at, from);
    else
        store_global<kVec>(static_cast<T*>(to) + at, from);
}

// Folds each of kCount values over groups of kThreads neighbouring threads: a power of two up to a warp, or else the
// whole block. All threads take part and get the result, the same bits in each, in an order that never varies; `op` must
// commute.
template <int kThreads, typename V, int kCount, typename Op>
__device__ void group_reduce(V (&v)[kCount], Op op) {
#pragma unroll
    for (int step = (kThreads < 32 ? kThreads : 32) / 2; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < kCount; i++) v[i] = op(v[i], __shfl_xor_sync(0xffffffffu, v[i], step));
    if constexpr (kThreads > 32) {
        constexpr int kMost = 4;
        static_assert(kCount <= kMost && kThreads <= 1024 && kThreads % 32 == 0);
        SMEM_ARRAY(V, sPart, [kMost][32]);
        if (threadIdx.x % 32 == 0)
            for (int i = 0; i < kCount; i++) sPart[i][threadIdx.x / 32] = v[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            v[i] = sPart[i][0];
#pragma unroll
            for (int warp = 1; warp < kThreads / 32; warp++) v[i] = op(v[i], sPart[i][warp]);
        }
        __syncthreads();  // sPart is free for the next one
    }
}

template <int kThreads, int kCount>
__device__ void group_sum(float (&v)[kCount]) {
    group_reduce<kThreads>(v, [](float a, float b) { return a + b; });
}

template <int kThreads>
__device__ float group_sum(float v) {
    float one[] = {v};
    group_sum<kThreads>(one);
    return one[0];
}

// Where row m of a tensor starts, in elements.
__device__ inline int64_t row_start(const Rows& rows, int64_t m) {
    if (rows.inner == 1) return m * rows.stride_outer;
    return m / rows.inner * rows.stride_outer + m % rows.inner * rows.stride_inner;
}

// Whether vectors of kBytes can be moved from here.
template <int kBytes = 16>
bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kBytes == 0;
}
