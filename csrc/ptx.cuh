// PTX instructions that CUDA C++ has no name for, each once: the instruction for a GPU, what it does for the emulation.
#pragma once

#include "rt.cuh"

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

// Closes a group: this thread's copies since the last one, perhaps none.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's latest groups are under way. What arrived shows to this thread, to others after
// a barrier.
template <int kPending>
__device__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

inline float exp2(float v) {
    const float y = exp2f(v);
    return y < 0x1p-126f ? 0.0f : y;
}

inline void cp_async_16(void* to, const void* from, EMULATION_HERE) { emulation::copy_async(to, from, 16, place); }
inline void cp_async_16_cached(void* to, const void* from, EMULATION_HERE) {
    emulation::copy_async(to, from, 16, place);
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int kPending>
void cp_async_wait() {
    emulation::copy_wait(kPending);
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
