// PTX instructions that CUDA C++ has no name for, each once: the instruction for a GPU, what it does for the emulation.
#pragma once

#include "rt.cuh"

#ifdef FASTATTN_EMULATION
#include "emulation/tensor_core.h"
#endif

namespace ptx {

#ifndef FASTATTN_EMULATION

// 2^v within 2 units in the last place, exact for v = 0; 0 where it is below 2^-126.
__device__ inline float exp2(float v) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
    return y;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, later: past L1, or through it where neighbours read the same 32-byte sectors.
__device__ inline void cp_async_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void cp_async_16_cached(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// The first `bytes` of 16 from there, 0 or 16, zeros for the others: with 0 nothing is read.
__device__ inline void cp_async_16_or_zeros(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// Closes a group: this thread's copies since the last one, perhaps none.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's latest groups are under way. What arrived shows to this thread, to others after
// a barrier.
template <int kPending>
__device__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements out of shared memory. Lane l says where row l % 8 of matrix l / 8 lies (16 bytes)
// and gets, of each matrix, elements 2 (l % 4) and the next of row l / 4; transposed, element l / 4 of rows 2 (l % 4) and
// the next. The whole warp takes part.
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), two elements to a register. With g = lane / 4 and t = 2 (lane % 4) a lane holds
//   a: rows g, g + 8, g, g + 8 at columns t, t, t + 8, t + 8;   b: rows t and t + 8 of column g;
//   c: columns t and t + 1 of row g, then of row g + 8
// each register two neighbours along the sum.
template <typename T>
__device__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

inline float exp2(float v) {
    const float y = exp2f(v);
    return y < 0x1p-126f ? 0.0f : y;
}

inline void cp_async_16(void* to, const void* from, EMULATION_HERE) { emulation::copy_async(to, from, 16, 16, place); }
inline void cp_async_16_cached(void* to, const void* from, EMULATION_HERE) {
    emulation::copy_async(to, from, 16, 16, place);
}
inline void cp_async_16_or_zeros(void* to, const void* from, int bytes, EMULATION_HERE) {
    emulation::copy_async(to, from, bytes, 16, place);
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int kPending>
void cp_async_wait() {
    emulation::copy_wait(kPending);
}
inline void ldmatrix_x4(uint32_t (&to)[4], const void* row, EMULATION_HERE) { emulation::ldmatrix<false>(to, row, place); }
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row, EMULATION_HERE) {
    emulation::ldmatrix<true>(to, row, place);
}
template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATION_HERE) {
    emulation::mma_m16n8k16<T>(c, a, b0, b1, place);
}

#endif

constexpr int kMostPending = 7;

// The same for a number known at run time, up to kMostPending.
__device__ inline void cp_async_wait(int pending) {
    switch (pending) {
        case 0: return cp_async_wait<0>();
        case 1: return cp_async_wait<1>();
        case 2: return cp_async_wait<2>();
        case 3: return cp_async_wait<3>();
        case 4: return cp_async_wait<4>();
        case 5: return cp_async_wait<5>();
        case 6: return cp_async_wait<6>();
        default: return cp_async_wait<7>();
    }
}

}  // namespace ptx
