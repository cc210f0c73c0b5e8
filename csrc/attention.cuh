// What the kernels of attention have in common: tiles in shared memory, fragments of the tensor cores, rows of a softmax.
//
// Shared memory holds rows of kD elements of 16 bits in pieces of 16 bytes, piece c of row r at c ^ (r % 8): what ldmatrix
// reads and what copies write then meets no bank twice.
#pragma once

#include "rt.cuh"

#include "ptx.cuh"

constexpr uint32_t kAll = 0xffffffffu;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f, kFloatMax = 3.40282347e38f;

__device__ inline int clamp(int v, int low, int high) { return v < low ? low : v > high ? high : v; }
__device__ inline int round_up(int v, int to) { return (v + to - 1) / to * to; }

// Element at row, piece of 8 elements, in shared memory.
template <int kD>
__device__ int swizzled(int row, int piece) {
    return row * kD + ((piece ^ (row & 7)) << 3);
}

// The same `rows` rows, a multiple of 8, and `pieces` pieces, an even number, on from the one of piece 0 or 1 at `at`.
template <int kD>
__device__ int onwards(int at, int rows, int pieces) {
    return (at ^ pieces % 8 * 8) + rows * kD + pieces / 8 * 64;
}

template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
    const __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
}

// A warp's share of a product: c[j][e] is row lane / 4 + e / 2 * 8, column 8 j + lane % 4 * 2 + e % 2.
template <int kColumns>
using Fragment = float[kColumns / 8][4];

// Where this lane reads of a tile of rows of kD elements, for the three kinds of operand that ldmatrix fetches: the left one,
// 16 rows by 16 columns; two right ones of a product with the transposed, 16 rows which are their columns; and two right
// ones as they lie, 16 rows by 8 columns and the next 8.
template <int kD>
__device__ int left_lane() {
    return swizzled<kD>(threadIdx.x % 16, threadIdx.x % 32 / 16);
}
template <int kD>
__device__ int transposed_lane() {
    return swizzled<kD>(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2);
}
template <int kD>
__device__ int right_lane() {
    return left_lane<kD>();
}

// Over the four lanes that share a row.
template <typename Op>
__device__ float over_row(float v, Op op) {
    v = op(v, __shfl_xor_sync(kAll, v, 1));
    return op(v, __shfl_xor_sync(kAll, v, 2));
}

// Near 0, where 1 - e^-2x would cancel, an odd polynomial (3 ulp at most).
__device__ inline float precise_tanh(float x) {
    const float z = x * x;
    if (z < 0.25f) return x + x * z * (-0.3333331f + z * (0.13330476f + z * (-0.053387105f + z * 0.01798873f)));
    const float e = ptx::exp2(fabsf(x) * (-2.0f * kLog2e));
    const float t = __fdividef(1.0f - e, 1.0f + e);
    return x < 0 ? -t : t;
}

template <typename Body>
__device__ void with_dtype(Dtype dtype, Body body) {
    if (dtype == kFloat16)
        body(__half{});
    else if (dtype == kBFloat16)
        body(__nv_bfloat16{});
    else
        body(float{});
}
