// PTX instructions from sm_90 on, each once, as in ptx.cuh: barriers in shared memory, copies of tensors' tiles, registers
// that move between warps, and products of a warpgroup. wgmma and setmaxnreg are sm_90a's alone.
#pragma once

#include "ptx.cuh"

#ifdef FASTATTN_EMULATION
#include "emulation/sm90.h"
#else
#include <cuda.h>
#endif

#include <type_traits>

namespace ptx {

// Of a tile in shared memory whose rows are as many bytes: which of its 16-byte pieces lies where. Bits 4 to 6, or as many
// of them as a row has pieces, of an address are turned over by the bits three above.
enum class Swizzle { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };

#ifndef FASTATTN_EMULATION

// A kernel takes it as const __grid_constant__.
using TensorMap = CUtensorMap;

// An mbarrier is over a phase when as many threads as it was made for have arrived and the bytes that they said would come
// have come; then the next one begins. For copies to see it, a fence_proxy_async stands after.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
// Whether the phase of that parity is over, of the phase under way and the one before: the first has 0. Waits for a while.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int parity) {
    uint32_t over;
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return over;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// What this thread has written to shared memory shows to copies and wgmma that come after.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of a tensor that starts at those coordinates, the innermost first, to shared memory, later: its bytes come to the
// barrier, zeros where it lies outside of the tensor too.
__device__ __forceinline__ void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}
__device__ __forceinline__ void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}
// The other way; what lies outside of the tensor is left out. Its groups are as those of cp.async.
__device__ __forceinline__ void tensor_store(const TensorMap* map, const void* from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
__device__ __forceinline__ void tensor_store(const TensorMap* map, const void* from, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
__device__ __forceinline__ void tensor_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory may be written again, of all groups but the latest kPending.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until they are there for others to see.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Barriers 1 to 15 of a block, each of as many threads as come, whole warps: those that wait and those that only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// This warpgroup's threads give registers back, or wait for more, up to kCount. Nothing but __launch_bounds__ with one block
// an SM makes ptxas obey.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first product of a group: what threads did with its registers is done.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// What is computed of c before it is, beside products under way, and not after the wait for them.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&c)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(c[i])::"memory");
}
// Until at most kPending groups are under way; c, accumulators that are then done, is not read before.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&c)[kCount]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    wgmma_hold(c);
}

// d (64, 2 kCount) = a (64, 16) b (16, 2 kCount), + d where `adds`, by a warpgroup, later: a is an operand in shared memory
// (below) or registers as of mma_m16n8k16, of which each warp has 16 rows; so lie d's accumulators, 8 columns after 8
// columns. No register may be touched before the wait.
#define WGMMA_64_D \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define WGMMA_128_D \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(i) WGMMA_4(i), WGMMA_4(i + 4), WGMMA_4(i + 8), WGMMA_4(i + 12)
#define WGMMA_64_REGISTERS WGMMA_16(0), WGMMA_16(16)
#define WGMMA_128_REGISTERS WGMMA_64_REGISTERS, WGMMA_16(32), WGMMA_16(48)
#define WGMMA(N, TYPE, ADDS, OPERANDS)                                                              \
    "{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
    " " WGMMA_##N##_D ", " OPERANDS ";\n}"
#define WGMMA_OF_SHARED(N, TYPE, A, B, ADDS, ACROSS_A, ACROSS_B)                                      \
    asm volatile(WGMMA(N, TYPE, ADDS, A ", " B ", adds, 1, 1, " ACROSS_A ", " ACROSS_B)               \
                 : WGMMA_##N##_REGISTERS                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(int(kAcrossA)), "n"(int(kAcrossB)) \
                 : "memory")
#define WGMMA_OF_REGISTERS(N, TYPE, A, B, ADDS, ACROSS_B)                                                          \
    asm volatile(WGMMA(N, TYPE, ADDS, A ", " B ", adds, 1, 1, " ACROSS_B)                                          \
                 : WGMMA_##N##_REGISTERS                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), "n"(int(kAcrossB)) \
                 : "memory")

template <typename T, bool kAcrossA, bool kAcrossB, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool adds) {
    static_assert(kCount == 32 || kCount == 64, "instructions for other widths are to be added");
    if constexpr (kCount == 32 && std::is_same_v<T, __half>)
        WGMMA_OF_SHARED(64, "f16", "%32", "%33", "%34", "%35", "%36");
    else if constexpr (kCount == 32)
        WGMMA_OF_SHARED(64, "bf16", "%32", "%33", "%34", "%35", "%36");
    else if constexpr (std::is_same_v<T, __half>)
        WGMMA_OF_SHARED(128, "f16", "%64", "%65", "%66", "%67", "%68");
    else
        WGMMA_OF_SHARED(128, "bf16", "%64", "%65", "%66", "%67", "%68");
}
template <typename T, bool kAcrossB, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool adds) {
    static_assert(kCount == 32 || kCount == 64, "instructions for other widths are to be added");
    if constexpr (kCount == 32 && std::is_same_v<T, __half>)
        WGMMA_OF_REGISTERS(64, "f16", "{%32, %33, %34, %35}", "%36", "%37", "%38");
    else if constexpr (kCount == 32)
        WGMMA_OF_REGISTERS(64, "bf16", "{%32, %33, %34, %35}", "%36", "%37", "%38");
    else if constexpr (std::is_same_v<T, __half>)
        WGMMA_OF_REGISTERS(128, "f16", "{%64, %65, %66, %67}", "%68", "%69", "%70");
    else
        WGMMA_OF_REGISTERS(128, "bf16", "{%64, %65, %66, %67}", "%68", "%69", "%70");
}
#undef WGMMA_64_D
#undef WGMMA_128_D
#undef WGMMA_4
#undef WGMMA_16
#undef WGMMA_64_REGISTERS
#undef WGMMA_128_REGISTERS
#undef WGMMA
#undef WGMMA_OF_SHARED
#undef WGMMA_OF_REGISTERS

#else

using TensorMap = emulation::TensorMap;

inline void mbarrier_init(uint64_t* barrier, int arrivals, EMULATION_HERE) {
    emulation::mbarrier_init(barrier, arrivals, place);
}
inline void mbarrier_arrive(uint64_t* barrier, EMULATION_HERE) { emulation::mbarrier_arrive(barrier, 0, place); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes, EMULATION_HERE) {
    emulation::mbarrier_arrive(barrier, bytes, place);
}
inline bool mbarrier_try_wait(uint64_t* barrier, int parity, EMULATION_HERE) {
    return emulation::mbarrier_try_wait(barrier, parity, place);
}
inline void mbarrier_wait(uint64_t* barrier, int parity, EMULATION_HERE) {
    emulation::mbarrier_wait(barrier, parity, place);
}
inline void fence_proxy_async() { emulation::fence_proxy_async(); }
inline void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, EMULATION_HERE) {
    const int at[] = {x, y, z};
    emulation::tensor_load(to, map, barrier, at, 3, place);
}
inline void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w, EMULATION_HERE) {
    const int at[] = {x, y, z, w};
    emulation::tensor_load(to, map, barrier, at, 4, place);
}
inline void tensor_store(const TensorMap* map, const void* from, int x, int y, int z, EMULATION_HERE) {
    const int at[] = {x, y, z};
    emulation::tensor_store(map, from, at, 3, place);
}
inline void tensor_store(const TensorMap* map, const void* from, int x, int y, int z, int w, EMULATION_HERE) {
    const int at[] = {x, y, z, w};
    emulation::tensor_store(map, from, at, 4, place);
}
inline void tensor_store_commit() { emulation::tensor_store_commit(); }
template <int kPending>
void tensor_store_wait_read(EMULATION_HERE) {
    emulation::tensor_store_wait(kPending, true, place);
}
template <int kPending>
void tensor_store_wait(EMULATION_HERE) {
    emulation::tensor_store_wait(kPending, false, place);
}
inline void named_barrier_sync(int id, int threads, EMULATION_HERE) { emulation::named_barrier(id, threads, true, place); }
inline void named_barrier_arrive(int id, int threads, EMULATION_HERE) {
    emulation::named_barrier(id, threads, false, place);
}
template <int kCount>
void fewer_registers(EMULATION_HERE) {
    emulation::set_registers(kCount, false, place);
}
template <int kCount>
void more_registers(EMULATION_HERE) {
    emulation::set_registers(kCount, true, place);
}
inline uint32_t shared_address(const void* p, EMULATION_HERE) { return emulation::shared_address(p, place); }
inline void wgmma_fence(EMULATION_HERE) { emulation::wgmma_fence(place); }
inline void wgmma_commit(EMULATION_HERE) { emulation::wgmma_commit(place); }
template <int kCount>
void wgmma_hold(float (&)[kCount]) {}
template <int kPending, int kCount>
void wgmma_wait(float (&)[kCount], EMULATION_HERE) {
    emulation::wgmma_wait(kPending, place);
}
template <typename T, bool kAcrossA, bool kAcrossB, int kCount>
void wgmma(float (&c)[kCount], uint64_t a, uint64_t b, bool adds, EMULATION_HERE) {
    emulation::wgmma({c, 2 * kCount, nullptr, a, b, !kAcrossA, !kAcrossB, adds, std::is_same_v<T, __half>, place});
}
template <typename T, bool kAcrossB, int kCount>
void wgmma(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b, bool adds, EMULATION_HERE) {
    emulation::wgmma({c, 2 * kCount, a, 0, b, true, !kAcrossB, adds, std::is_same_v<T, __half>, place});
}

#endif

// How wgmma finds an operand in shared memory, which is cut into atoms of 8 lines of a swizzle's row, 16 bytes where there
// is none. A line runs along k, or across it (kAcross: n for b). Bytes from an atom to the next one
//   along k:            stride across k; leading along k, used without a swizzle alone, where a step has two atoms;
//   across k, swizzled: leading across k, stride along it;    not swizzled: stride across k, leading along it.
// start, in an atom's first line, may advance by `advanced` in steps of a product.
__device__ __forceinline__ uint64_t wgmma_operand(const void* start, int leading, int stride, Swizzle swizzle) {
    const uint64_t mode = swizzle == Swizzle::kNone ? 0 : 4 - static_cast<int>(swizzle);
    return (shared_address(start) >> 4 & 0x3fff) | uint64_t(leading >> 4 & 0x3fff) << 16 |
           uint64_t(stride >> 4 & 0x3fff) << 32 | mode << 62;
}
__device__ __forceinline__ uint64_t advanced(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

// Of a tensor with 16-bit elements, its sizes from the innermost dimension on, strides in bytes of all dimensions but that:
// how tensor_load and tensor_store find a box of it. 0 or an error of the runtime.
inline int encode_tensor_map(TensorMap* map, int rank, const void* start, const int64_t* size, const int64_t* stride,
                             const int* box, Swizzle swizzle) {
#ifdef FASTATTN_EMULATION
    return emulation::encode_tensor_map(map, rank, start, size, stride, box, static_cast<int>(swizzle));
#else
    static void* const found = [] {
        void* at = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t code =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &at, 12000, cudaEnableDefault, &result);
        return code == cudaSuccess && result == cudaDriverEntryPointSuccess ? at : nullptr;
    }();
    if (!found) return cudaErrorNotSupported;
    constexpr CUtensorMapSwizzle modes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                            CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    cuuint64_t sizes[5], strides[5];
    cuuint32_t boxes[5], steps[5];
    for (int d = 0; d < rank; d++) {
        sizes[d] = size[d];
        boxes[d] = box[d];
        steps[d] = 1;
        if (d > 0) strides[d - 1] = stride[d - 1];
    }
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    const CUresult said = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, rank, const_cast<void*>(start), sizes, strides, boxes,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, modes[static_cast<int>(swizzle)],
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return said == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

}  // namespace ptx
