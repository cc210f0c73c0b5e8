// The instructions of ptx_sm90.cuh, for primitives.cu.
#pragma once

#include "../../ptx_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTATTN_EMULATION)
#define ON_SM90
#endif

namespace {

using ptx::Swizzle;
using ptx::TensorMap;

template <Swizzle kSwizzle>
constexpr int kRowBytes = 16 << static_cast<int>(kSwizzle);

// Each test of a phase's parity, then five rounds of two warps that hand each other what they have in shared memory.
__global__ void __launch_bounds__(64) mbarriers(const uint32_t* in, uint32_t* out) {
#ifdef ON_SM90
    SMEM_ARRAY(uint64_t, sBarrier, [3]);
    SMEM_ARRAY(uint32_t, sWords, [32]);
    const int t = threadIdx.x;
    if (t == 0) {
        ptx::mbarrier_init(&sBarrier[0], 2);
        ptx::mbarrier_init(&sBarrier[1], 32);
        ptx::mbarrier_init(&sBarrier[2], 32);
        const auto show = [&](int at) {
            for (int parity = 0; parity < 2; parity++) out[at + parity] = ptx::mbarrier_try_wait(&sBarrier[0], parity);
        };
        show(0);
        for (int i = 1; i < 7; i++) {
            ptx::mbarrier_arrive(&sBarrier[0]);
            show(2 * i);
        }
    }
    __syncthreads();
    uint32_t sum = 0;
    for (int round = 0; round < 5; round++)
        if (t < 32) {
            ptx::mbarrier_wait(&sBarrier[2], (round & 1) ^ 1);
            sWords[t] = in[32 * round + t];
            ptx::mbarrier_arrive(&sBarrier[1]);
        } else {
            ptx::mbarrier_wait(&sBarrier[1], round & 1);
            sum = sum * 3 + sWords[63 - t];
            ptx::mbarrier_arrive(&sBarrier[2]);
        }
    if (t >= 32) out[14 + t - 32] = sum;
#endif
}

// Warps 0 and 1 hand over and are not held up, warps 2 and 3 wait, and the other way.
__global__ void __launch_bounds__(128) named_barriers(const uint32_t* in, uint32_t* out) {
#ifdef ON_SM90
    SMEM_ARRAY(uint32_t, sWords, [64]);
    const int t = threadIdx.x;
    uint32_t sum = 0;
    for (int round = 0; round < 5; round++)
        if (t < 64) {
            if (round > 0) ptx::named_barrier_sync(15, 128);
            sWords[t] = in[64 * round + t];
            ptx::named_barrier_arrive(1, 128);
        } else {
            ptx::named_barrier_sync(1, 128);
            sum = sum * 3 + sWords[t - 64 ^ 33];
            if (round < 4) ptx::named_barrier_arrive(15, 128);
        }
    if (t >= 64) out[t - 64] = sum;
#endif
}

__global__ void __launch_bounds__(384, 1) registers(const uint32_t* in, uint32_t* out) {
#ifdef ON_SM90
    if (threadIdx.x < 128)
        ptx::fewer_registers<24>();
    else
        ptx::more_registers<240>();
    out[threadIdx.x] = in[threadIdx.x] + 1;
#endif
}

// A box that ends 6 columns past the tensor and begins two rows before it, as it lies in shared memory.
template <Swizzle kSwizzle, int kRank>
__global__ void __launch_bounds__(32) tensor_load(const __grid_constant__ TensorMap map, uint32_t* out) {
#ifdef ON_SM90
    constexpr int kColumns = kSwizzle == Swizzle::kNone ? 64 : kRowBytes<kSwizzle> / 2, kBytes = kColumns * 16 * 2;
    SMEM_DYN(sTile, 1024);
    SMEM_ARRAY(uint64_t, sBarrier, [1]);
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(sBarrier, 1);
        ptx::fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(sBarrier, kBytes);
        if constexpr (kRank == 3)
            ptx::tensor_load(sTile, &map, sBarrier, 76 - kColumns, -2, 2);
        else
            ptx::tensor_load(sTile, &map, sBarrier, 76 - kColumns, -2, 1, 2);
    }
    ptx::mbarrier_wait(sBarrier, 0);
    for (int i = threadIdx.x; i < kBytes / 4; i += 32) out[i] = reinterpret_cast<const uint32_t*>(sTile)[i];
#endif
}

template <Swizzle kSwizzle, int kRank>
int launch_tensor_load(const uint32_t* in, uint32_t* out) {
    constexpr int kColumns = kSwizzle == Swizzle::kNone ? 64 : kRowBytes<kSwizzle> / 2;
    TensorMap map;
    int code;
    if constexpr (kRank == 3) {
        const int64_t size[] = {70, 9, 3}, stride[] = {144, 1296};
        const int box[] = {kColumns, 8, 2};
        code = ptx::encode_tensor_map(&map, 3, in, size, stride, box, kSwizzle);
    } else {  // as (B, S, H, D) seen as (B, H, S, D)
        const int64_t size[] = {70, 3, 5, 3}, stride[] = {720, 144, 2160};
        const int box[] = {kColumns, 4, 2, 2};
        code = ptx::encode_tensor_map(&map, 4, in, size, stride, box, kSwizzle);
    }
    return code ? code : KLAUNCH((tensor_load<kSwizzle, kRank>), 1, 32, 4096, nullptr, map, out);
}

// Words as they come, to the places of a tensor that has fewer rows and columns than the box.
template <Swizzle kSwizzle>
__global__ void __launch_bounds__(32)
    tensor_store(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap map4, const uint32_t* in) {
#ifdef ON_SM90
    SMEM_DYN(sTile, 1024);
    auto* const s = reinterpret_cast<uint32_t*>(sTile);
    for (int i = threadIdx.x; i < 1024; i += 32) s[i] = in[i];
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::tensor_store(&map, s, 8, -1, 1);
        ptx::tensor_store_commit();
        ptx::tensor_store(&map4, s + 512, 8, 0, 0, 1);
        ptx::tensor_store_commit();
        ptx::tensor_store_wait_read<1>();
        ptx::tensor_store_wait<0>();
    }
#endif
}

template <Swizzle kSwizzle>
int launch_tensor_store(const uint32_t* in, uint32_t* out) {
    TensorMap map, map4;
    const int64_t size[] = {68, 6, 2}, stride[] = {144, 864}, size4[] = {68, 3, 4, 2}, stride4[] = {576, 144, 1728};
    const int box[] = {64, 8, 1}, box4[] = {64, 2, 2, 1};
    int code = ptx::encode_tensor_map(&map, 3, out, size, stride, box, kSwizzle);
    if (!code) code = ptx::encode_tensor_map(&map4, 4, out + 512, size4, stride4, box4, kSwizzle);
    return code ? code : KLAUNCH(tensor_store<kSwizzle>, 1, 32, 4096, nullptr, map, map4, in);
}

// The i-th of whole numbers from -8 to 8, whose products' sums are exact.
template <typename T>
__device__ T small(const uint32_t* in, int i) {
    const uint32_t bits = in[i / 2 % 2048] >> 16 * (i % 2) & 0xffffu;
    return from_float<T>(static_cast<int>(bits % 17) - 8);
}

// Accumulators, whole numbers again, two to a word.
template <int kCount>
__device__ void leave(const float (&d)[kCount], uint32_t* out) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
        out[kCount / 2 * threadIdx.x + i / 2] =
            (static_cast<int>(d[i]) & 0xffff) | static_cast<uint32_t>(static_cast<int>(d[i + 1])) << 16;
}

// Three times 4096 small numbers, unlike each other, for products to read.
template <typename T>
__device__ void fill(unsigned char* sTile, const uint32_t* in) {
    for (int i = threadIdx.x; i < 24 * 512; i += 128) reinterpret_cast<T*>(sTile)[i] = small<T>(in, i + i / 4096);
    ptx::fence_proxy_async();
    __syncthreads();
}

// Two products, the second of operands 32 bytes on where a row has them. Shared memory is full of numbers; how far apart
// atoms lie differs between a and b and between the two directions.
template <typename T, bool kAcross, Swizzle kSwizzle, int kCount>
__device__ uint64_t operand(const unsigned char* start) {
    constexpr int kAtom = 8 * kRowBytes<kSwizzle>, kColumns = 2 * kCount;  // kCount 32 for b, 16 for a: other distances
    if constexpr (kSwizzle == Swizzle::kNone)
        return ptx::wgmma_operand(start, kCount == 32 ? kColumns / 8 * 128 : 128, kCount == 32 ? 128 : 256, kSwizzle);
    else if constexpr (kAcross)
        return ptx::wgmma_operand(start, kCount == 32 ? kAtom : 2 * kAtom,
                                  kCount == 32 ? kColumns / (kRowBytes<kSwizzle> / 2) * kAtom : kAtom, kSwizzle);
    else
        return ptx::wgmma_operand(start, 16, kCount == 32 ? 2 * kAtom : kAtom, kSwizzle);
}

template <typename T, bool kAcross, Swizzle kSwizzle>
__global__ void __launch_bounds__(128) wgmma_shared(const uint32_t* in, uint32_t* out) {
#ifdef ON_SM90
    SMEM_DYN(sTile, 1024);
    fill<T>(sTile, in);
    const uint64_t a = operand<T, kAcross, kSwizzle, 16>(sTile), b = operand<T, kAcross, kSwizzle, 32>(sTile + 8192);
    constexpr int kOn = kAcross || kRowBytes<kSwizzle> < 64 ? 0 : 32;
    float d[32];
#pragma unroll
    for (int i = 0; i < 32; i++) d[i] = 1000;
    ptx::wgmma_fence();
    ptx::wgmma<T, kAcross, kAcross>(d, a, b, false);
    ptx::wgmma<T, kAcross, kAcross>(d, ptx::advanced(a, kOn), ptx::advanced(b, kOn), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    leave(d, out);
#endif
}

// a in registers as its words come, b as in wgmma_shared; twice, in groups of their own.
template <typename T, bool kAcross, int kCount>
__global__ void __launch_bounds__(128) wgmma_registers(const uint32_t* in, uint32_t* out) {
#ifdef ON_SM90
    SMEM_DYN(sTile, 1024);
    fill<T>(sTile, in);
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const T two[] = {small<T>(in, 16 * threadIdx.x + 2 * i), small<T>(in, 16 * threadIdx.x + 2 * i + 1)};
        a[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(two);
    }
    const uint64_t b = ptx::wgmma_operand(sTile, 8192, 1024, Swizzle::k128);
    float d[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i++) d[i] = i;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        ptx::wgmma_fence();
        ptx::wgmma<T, kAcross>(d, a[k], ptx::advanced(b, k * (kAcross ? 2048 : 32)), true);
        ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>(d);
    leave(d, out);
#endif
}

// X (64, 64) from global memory, and X from row 8 on: the product of both by tiles that copies brought, b as rows (n, k) or,
// kAcross, (k, n).
template <typename T>
__global__ void numbers(const uint32_t* in, uint32_t* out) {
    for (int i = threadIdx.x; i < 4096; i += 128) reinterpret_cast<T*>(out)[i] = small<T>(in, i);
}
template <typename T, bool kAcross, Swizzle kSwizzle>
__global__ void __launch_bounds__(128) tiles(const __grid_constant__ TensorMap map, uint32_t* out) {
#ifdef ON_SM90
    constexpr int kRow = kRowBytes<kSwizzle>, kColumns = kRow / 2, kBoxBytes = 64 * kRow;
    SMEM_DYN(sTile, 1024);
    SMEM_ARRAY(uint64_t, sBarrier, [1]);
    unsigned char *const sA = sTile, *const sB = sTile + 8192;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(sBarrier, 1);
        ptx::fence_proxy_async();
        ptx::mbarrier_arrive_expect(sBarrier, 2 * 8192);
        for (int i = 0; i < 64 / kColumns; i++) {
            ptx::tensor_load(sA + i * kBoxBytes, &map, sBarrier, i * kColumns, 0, 0);
            ptx::tensor_load(sB + i * kBoxBytes, &map, sBarrier, i * kColumns, 8, 0);
        }
    }
    __syncthreads();
    ptx::mbarrier_wait(sBarrier, 0);
    const uint64_t a = ptx::wgmma_operand(sA, 16, 8 * kRow, kSwizzle);
    const uint64_t b = ptx::wgmma_operand(sB, kBoxBytes, 8 * kRow, kSwizzle);
    float d[32];
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int along = k * 16 / kColumns * kBoxBytes + k * 16 % kColumns * 2;
        ptx::wgmma<T, false, kAcross>(d, ptx::advanced(a, along), ptx::advanced(b, kAcross ? k * 16 * kRow : along), k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    leave(d, out);
#endif
}
template <typename T, bool kAcross, Swizzle kSwizzle>
int launch_tiles(const uint32_t* in, uint32_t* out) {
    TensorMap map;
    const int64_t size[] = {64, 64, 1}, stride[] = {128, 8192};
    const int box[] = {kRowBytes<kSwizzle> / 2, 64, 1};
    int code = ptx::encode_tensor_map(&map, 3, out, size, stride, box, kSwizzle);
    if (!code) code = KLAUNCH(numbers<T>, 1, 128, 0, nullptr, in, out);
    return code ? code : KLAUNCH((tiles<T, kAcross, kSwizzle>), 1, 128, 16384, nullptr, map, out);
}

}  // namespace
