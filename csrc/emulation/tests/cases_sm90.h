// Kernels of the instructions of ptx_sm90.cuh, right or with one thing wrong, for cases.cpp.
#pragma once

#include "../../ptx_sm90.cuh"
#include "../engine.h"

namespace {

using ptx::Swizzle;
using ptx::TensorMap;

enum class Bug {
    kNone,
    kNoFullWait,
    kNoEmptyWait,
    kNoExpect,
    kExpectsMore,
    kOneParity,
    kReleasedEarly,
    kNoProductsWait,
    kWaitsForFewer,
    kWritesAccumulator,
    kNoProductsFence,
    kThreeWarps,
    kNoInitFence,
    kNoBarrierAfterInit,
    kOverwritten,
    kNoStoreFence,
    kNoStoreBarrier,
    kNoStoreWait,
    kNoReadWait,
    kOtherSwizzle,
    kSwapped,
    kOtherStep,
    kTileMisaligned,
    kTooManyRegisters,
};

constexpr int kM = 64, kN = 128, kK = 256, kStep = 64, kStages = 2;
constexpr int kBytesA = kM * kStep * 2, kBytesB = kStep * kN * 2, kStageBytes = kBytesA + kBytesB;
alignas(16) __nv_bfloat16 ring_a[kM * kK], ring_b[kK * kN], ring_c[2 * kM * kN];
float value_a(int m, int k) { return float((3 * m + 5 * k + m * k) % 7 - 3); }
float value_b(int k, int n) { return float((2 * k + 3 * n + k * n) % 5 - 2); }

// C = A B: the last of three warpgroups loads tiles, the first multiplies them and stores C and -C.
__global__ void ring(const TensorMap a, const TensorMap b, const TensorMap c, Bug bug) {
    SMEM_DYN(sAligned, 1024);
    unsigned char* const sRaw = sAligned + (bug == Bug::kTileMisaligned ? 128 : 0);
    SMEM_ARRAY(uint64_t, sFull, [kStages]);
    SMEM_ARRAY(uint64_t, sEmpty, [kStages]);
    const int t = threadIdx.x;
    if (t == 0) {
        for (int stage = 0; stage < kStages; stage++) {
            ptx::mbarrier_init(&sFull[stage], 1);
            ptx::mbarrier_init(&sEmpty[stage], 4);
        }
        if (bug != Bug::kNoInitFence) ptx::fence_proxy_async();
        if (bug == Bug::kOverwritten) sEmpty[1] = 0;
    }
    if (bug != Bug::kNoBarrierAfterInit) __syncthreads();
    if (t >= 256) {
        bug == Bug::kTooManyRegisters ? ptx::fewer_registers<160>() : ptx::fewer_registers<40>();
        for (int j = 0; t == 256 && j < kK / kStep; j++) {
            const int stage = j % kStages;
            unsigned char* const tile = sRaw + stage * kStageBytes;
            if (bug != Bug::kNoEmptyWait) ptx::mbarrier_wait(&sEmpty[stage], (j / kStages & 1) ^ 1);
            if (bug == Bug::kNoExpect)
                ptx::mbarrier_arrive(&sFull[stage]);
            else
                ptx::mbarrier_arrive_expect(&sFull[stage], kStageBytes + (bug == Bug::kExpectsMore ? 16 : 0));
            ptx::tensor_load(tile, &a, &sFull[stage], j * kStep, 0, 0);
            for (int half = 0; half < 2; half++)
                ptx::tensor_load(tile + kBytesA + half * kBytesB / 2, &b, &sFull[stage], 64 * half, j * kStep, 0);
        }
        return;
    }
    if (t >= 128) return;
    ptx::more_registers<232>();
    float d[64];
    for (int j = 0; j < kK / kStep; j++) {
        const int stage = j % kStages;
        const unsigned char* const tile = sRaw + stage * kStageBytes;
        if (bug != Bug::kNoFullWait) ptx::mbarrier_wait(&sFull[stage], bug == Bug::kOneParity ? 0 : j / kStages & 1);
        if (bug != Bug::kNoProductsFence) ptx::wgmma_fence();
        const Swizzle swizzle = bug == Bug::kOtherSwizzle ? Swizzle::k64 : Swizzle::k128;
        const int leading = bug == Bug::kSwapped ? 1024 : kBytesB / 2, stride = kBytesB / 2 + 1024 - leading;
        const uint64_t first_a = ptx::wgmma_operand(tile, 16, 1024, swizzle);
        const uint64_t first_b = ptx::wgmma_operand(tile + kBytesA, leading, stride, swizzle);
        for (int k = 0; k < kStep / 16; k++)
            if (bug != Bug::kThreeWarps || t < 96)
                ptx::wgmma<__nv_bfloat16, false, true>(d, ptx::advanced(first_a, k * (bug == Bug::kOtherStep ? 16 : 32)),
                                                       ptx::advanced(first_b, k * 2048), j > 0 || k > 0);
        ptx::wgmma_commit();
        if (bug == Bug::kReleasedEarly && t % 32 == 0) ptx::mbarrier_arrive(&sEmpty[stage]);
        if (bug == Bug::kWritesAccumulator) d[t % 64] = 0;
        if (bug == Bug::kWaitsForFewer)
            ptx::wgmma_wait<1>(d);
        else if (bug != Bug::kNoProductsWait)
            ptx::wgmma_wait<0>(d);
        if (bug != Bug::kReleasedEarly && t % 32 == 0) ptx::mbarrier_arrive(&sEmpty[stage]);
    }
    unsigned char* const sC = sRaw + kStages * kStageBytes;
    for (int twice = 0; twice < 2; twice++) {
        for (int i = 0; i < 64; i++) {
            const int m = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + t % 4 * 2 + i % 2;
            const int piece = n % 64 / 8 ^ m % 8;
            reinterpret_cast<__nv_bfloat16*>(sC)[n / 64 * 4096 + m * 64 + piece * 8 + n % 8] =
                from_float<__nv_bfloat16>(d[i] * (1 - 2 * twice));
        }
        if (bug != Bug::kNoStoreFence) ptx::fence_proxy_async();
        if (bug != Bug::kNoStoreBarrier) ptx::named_barrier_sync(1, 128);
        if (t == 0) {
            for (int half = 0; half < 2; half++) ptx::tensor_store(&c, sC + half * 8192, 64 * half, 0, twice);
            ptx::tensor_store_commit();
            if (bug != Bug::kNoReadWait && twice == 0) ptx::tensor_store_wait_read<0>();
            if (bug != Bug::kNoStoreWait && twice == 1) ptx::tensor_store_wait<0>();
        }
        ptx::named_barrier_sync(2, 128);
    }
}

template <Bug kBug>
int launch_ring(float*) {
    for (int i = 0; i < kM * kK; i++) ring_a[i] = from_float<__nv_bfloat16>(value_a(i / kK, i % kK));
    for (int i = 0; i < kK * kN; i++) ring_b[i] = from_float<__nv_bfloat16>(value_b(i / kN, i % kN));
    const int box[] = {64, 64, 1};
    const auto map = [&](__nv_bfloat16* start, int64_t rows, int64_t columns, int64_t count) {
        TensorMap made;
        const int64_t size[] = {columns, rows, count}, stride[] = {2 * columns, 2 * columns * rows};
        if (ptx::encode_tensor_map(&made, 3, start, size, stride, box, Swizzle::k128)) abort();
        return made;
    };
    const int smem = kStages * kStageBytes + kM * kN * 2 + 128;
    cudaFuncSetAttribute(reinterpret_cast<const void*>(ring), cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    return KLAUNCH(ring, 1, 384, smem, nullptr, map(ring_a, kM, kK, 1), map(ring_b, kK, kN, 1),
                   map(ring_c, kM, kN, 2), kBug);
}
bool ring_right(const float*) {
    bool right = true;
    for (int m = 0; m < kM; m++)
        for (int n = 0; n < kN; n++) {
            float sum = 0;
            for (int k = 0; k < kK; k++) sum += value_a(m, k) * value_b(k, n);
            for (int twice = 0; twice < 2; twice++)
                right &= to_float(ring_c[(twice * kM + m) * kN + n]) ==
                         to_float(from_float<__nv_bfloat16>(sum)) * (1 - 2 * twice);
        }
    return right;
}

// Two warps by an mbarrier each way, then all four by named barriers.
template <bool kWaits, bool kComes>
__global__ void hand_over(float* out) {
    SMEM_ARRAY(uint64_t, sBarrier, [2]);
    SMEM_ARRAY(float, sA, [32]);
    SMEM_ARRAY(float, sB, [64]);
    const int t = threadIdx.x;
    if (t < 2) ptx::mbarrier_init(&sBarrier[t], 32);
    __syncthreads();
    float sum = 0;
    for (int round = 0; round < 4; round++)
        if (t < 32) {
            ptx::mbarrier_wait(&sBarrier[0], (round & 1) ^ 1);
            sA[t] = float(t + round);
            ptx::mbarrier_arrive(&sBarrier[1]);
        } else if (t < 64) {
            if (kWaits) ptx::mbarrier_wait(&sBarrier[1], round & 1);
            sum += sA[63 - t];
            ptx::mbarrier_arrive(&sBarrier[0]);
        }
    if (t >= 32 && t < 64) out[t] = sum == 4 * (63 - t) + 6;
    if (t < 64) {
        sB[t] = float(t);
        if (kComes || t < 32) ptx::named_barrier_arrive(3, 128);
    } else {
        ptx::named_barrier_sync(3, kComes ? 128 : 96);
        out[t - 64 < 32 ? t - 64 : t] = sB[t - 64] == t - 64;
    }
}
bool handed_over(const float* out) {
    bool right = true;
    for (int t = 0; t < 128; t++) right &= t >= 64 && t < 96 ? true : out[t] == 1;
    return right;
}

// A product of registers, which change before or after the wait.
template <bool kEarly>
__global__ void left_registers(float* out) {
    SMEM_DYN(sRaw, 1024);
    for (int i = threadIdx.x; i < 1024; i += 128) reinterpret_cast<__half*>(sRaw)[i] = from_float<__half>(1);
    ptx::fence_proxy_async();
    __syncthreads();
    uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    float d[32];
    ptx::wgmma_fence();
    ptx::wgmma<__half, false>(d, a, ptx::wgmma_operand(sRaw, 128, 256, Swizzle::kNone), false);
    ptx::wgmma_commit();
    if (kEarly) a[threadIdx.x % 4] = 0;
    ptx::wgmma_wait<0>(d);
    a[threadIdx.x % 4] = 0;
    out[threadIdx.x % 32] = d[threadIdx.x % 32] == 16;
}

// Tensor maps that the driver refuses, and one that it takes; the strides need not grow.
int refuses_maps(float* out) {
    alignas(64) TensorMap map;
    struct Map {
        int from;
        int64_t size, stride;
        int box, swizzle;
    };
    const auto encode = [&](Map m) {
        const int64_t size[] = {64, m.size, 4}, stride[] = {m.stride, 16};
        const int box[] = {m.box, 8, 1};
        return ptx::encode_tensor_map(&map, 3, ring_a + m.from, size, stride, box, static_cast<Swizzle>(m.swizzle));
    };
    const Map wrong[] = {{1, 8, 128, 64, 3},   {0, 0, 128, 64, 3},   {0, 8, 136, 64, 3}, {0, 8, int64_t{1} << 40, 64, 3},
                         {0, 8, -128, 64, 3}, {0, 8, 128, 0, 0},    {0, 8, 128, 264, 0}, {0, 8, 128, 4, 3},
                         {0, 8, 128, 64, 2},   {0, int64_t{5} << 32, 128, 64, 3}};
    bool right = encode({0, 8, 128, 64, 3}) == 0;
    for (const Map& m : wrong) right &= encode(m) != 0;
    for (int t = 0; t < 32; t++) out[t] = right;
    return 0;
}

}  // namespace
