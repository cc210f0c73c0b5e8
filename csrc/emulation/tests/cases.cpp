// Kernels that do one thing each, right or wrong; tests/test_emulation.py builds and runs them: cases NAME [ORDER SEED].
// Prints "right", "wrong", or the sentence of a launch that failed; then each kernel with its launches or, in a build with
// FASTATTN_RECORD, its passes over the banks of shared memory and those that conflicts add.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../attention.cuh"
#include "../engine.h"
#include "cases_sm90.h"

namespace {

__global__ void shuffles(float* out) {
    const int t = threadIdx.x;
    out[t] = __shfl_xor_sync(kAll, float(t), 5);
    out[32 + t] = __shfl_down_sync(kAll, float(t), 3, 8);
    out[64 + t] = __shfl_up_sync(kAll, float(t), 3, 8);
    out[96 + t] = __shfl_sync(kAll, float(t), 9, 8);
    const int half = t / 16;  // each half of the warp by itself
    out[128 + t] = __shfl_xor_sync(0xffffu << 16 * half, float(t), 15);
}
bool shuffles_right(const float* out) {
    bool right = true;
    for (int t = 0; t < 32; t++) {
        right &= out[t] == (t ^ 5) && out[32 + t] == (t % 8 + 3 < 8 ? t + 3 : t) && out[64 + t] == (t % 8 >= 3 ? t - 3 : t);
        right &= out[96 + t] == t / 8 * 8 + 1 && out[128 + t] == (t ^ 15);
    }
    return right;
}

__global__ void votes(float* out) {
    const int t = threadIdx.x;
    out[t] = __ballot_sync(kAll, t % 3 == 0) == 0x49249249u && __any_sync(kAll, t == 7) && !__any_sync(kAll, t == 32) &&
             __all_sync(kAll, t < 32) && !__all_sync(kAll, t != 7);
}
bool all_ones(const float* out) {
    bool right = true;
    for (int t = 0; t < 32; t++) right &= out[t] == 1;
    return right;
}

__global__ void indices(float* out) {
    const int n = blockDim.x * blockDim.y * blockDim.z;
    const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[b * n + t] = b * n + t;
}
bool counts_up(const float* out) {
    bool right = true;
    for (int i = 0; i < 576; i++) right &= out[i] == i;
    return right;
}

// Both kinds of shared memory, every thread reading what another warp wrote; a thread that has left is not waited for.
template <bool kBefore, bool kAfter, bool kWarp = true>
__global__ void exchange(float* out) {
    SMEM_ARRAY(float, sFixed, [64]);
    SMEM_DYN(sRaw, 16);
    auto* sDynamic = reinterpret_cast<float*>(sRaw);
    const int t = threadIdx.x;
    if (t == 64) return;
    float sum = 0;
    for (int round = 0; round < 3; round++) {
        sFixed[t] = sDynamic[t] = float(t + round);
        if (kBefore) __syncthreads();
        sum += sFixed[63 - t] + sDynamic[t ^ 32];
        if (kAfter) __syncthreads();
    }
    sFixed[t] = sum;
    if (kWarp) __syncwarp();
    out[t] = sFixed[t ^ 1];
}
bool exchanged(const float* out) {
    bool right = true;
    for (int t = 0; t < 64; t++) right &= out[t ^ 1] == 3 * (63 - t + (t ^ 32)) + 6;
    return right;
}

__global__ void reads_unwritten(float* out) {
    SMEM_ARRAY(float, sA, [32]);
    SMEM_ARRAY(__half, sB, [32]);
    out[threadIdx.x] = std::isnan(sA[threadIdx.x]) && std::isnan(__half2float(sB[threadIdx.x]));
}
__global__ void past_the_end(float* out) {
    SMEM_ARRAY(float, sA, [32]);
    float* at = sA + threadIdx.x + 1;
    asm("" : "+r"(at));
    *at = 1;
    __syncthreads();
    out[threadIdx.x] = *at;
}
__global__ void before_the_start(float* out) {
    SMEM_DYN(sRaw, 16);
    float* at = reinterpret_cast<float*>(sRaw) + int(threadIdx.x) - 1;
    asm("" : "+r"(at));
    *at = 1;
    out[threadIdx.x] = *at;
}
__global__ void two_barriers(float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}
__global__ void barrier_in_a_warp(float* out) {
    if (threadIdx.x < 16) __syncthreads();
    __syncwarp();
    out[threadIdx.x] = 1;
}
__global__ void not_in_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }
__global__ void lane_left(float* out) {
    if (threadIdx.x >= 20) return;
    out[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1);
}
__global__ void lane_leaves(float* out) {
    if (threadIdx.x < 20) out[threadIdx.x] = __any_sync(kAll, 1);
}
__global__ void reads_outside_mask(float* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}
__global__ void two_shuffles(float* out) {
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
    else
        out[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1);
}
__global__ void bad_width(float* out) { out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1, 24); }
__global__ void misaligned(float* out) {
    float v[4];
    load<4>(out + 1 + 4 * threadIdx.x, v);
    out[threadIdx.x] = v[0];
}
__global__ void too_much(float* out) {
    SMEM_ARRAY(float, sA, [8000]);
    SMEM_ARRAY(float, sB, [8000]);
    out[threadIdx.x] = sA[0] + sB[0];
}
__global__ void approximations(float* out) {
    bool right = true, exact = true;
    for (float v = 0.01f; v < 80; v *= 1.07f) {
        const auto off = [&](float got, double want, double ulps) {
            const double ulp = nextafterf(float(want), INFINITY) - float(want);
            right &= fabs(got - want) <= (ulps + 1) * ulp;
            exact &= fabs(got - want) <= 0.6 * ulp;
        };
        off(rsqrtf(v), 1 / sqrt(double(v)), 2);
        off(exp2f(v), exp2(double(v)), 2);
        off(__expf(-v), exp(-double(v)), 2 + 1.173 * v);
        off(__fdividef(1, v), 1 / double(v), 2);
    }
    out[threadIdx.x] = right && !exact && exp2f(-INFINITY) == 0 && std::isnan(rsqrtf(-1)) && __umulhi(1u << 31, 6) == 3;
}

// A ring of two stages: copies of the next round are under way while this one is read.
template <bool kWait, bool kBarrier>
__global__ void copies(float* out) {
    SMEM_DYN(sRaw, 16);
    auto* sStage = reinterpret_cast<float*>(sRaw);  // (2, 256)
    const int t = threadIdx.x;
    for (int i = 0; i < 4; i++) out[4 * t + i] = float(4 * t + i);
    const auto copy = [&](int round) {
        if (round < 4) ptx::cp_async_16(sStage + round % 2 * 256 + (t ^ round) * 4, out + 4 * t);
        ptx::cp_async_commit();
    };
    copy(0);
    float sum = 0;
    for (int round = 0; round < 4; round++) {
        copy(round + 1);
        kWait ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<2>();
        __syncthreads();
        sum += sStage[round % 2 * 256 + t];
        if (kBarrier) __syncthreads();
    }
    out[256 + t] = sum;
}
bool copied(const float* out) {
    bool right = true;
    for (int t = 0; t < 64; t++) {
        float sum = 0;
        for (int round = 0; round < 4; round++) sum += (t / 4 ^ round) * 4 + t % 4;
        right &= out[256 + t] == sum;
    }
    return right;
}
// What a thread does not copy is zero, whatever lay there.
__global__ void copies_of_nothing(float* out) {
    SMEM_DYN(sRaw, 16);
    auto* sA = reinterpret_cast<float*>(sRaw);
    const int t = threadIdx.x;
    for (int i = 0; i < 4; i++) sA[4 * t + i] = out[4 * t + i] = 1;
    ptx::cp_async_16_or_zeros(sA + 4 * t, out + 4 * t, t % 2 ? 16 : 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 4; i++) out[4 * t + i] = sA[4 * t + i] == t % 2;
}

// A 16 x 16 matrix of numbers that tell row and column, whole and transposed, by lanes that read rows another lane wrote.
template <bool kBarrier>
__global__ void matrices(float* out) {
    SMEM_DYN(sRaw, 16);
    auto* sA = reinterpret_cast<uint16_t*>(sRaw);
    const int t = threadIdx.x, row = t % 8 + t / 8 % 2 * 8, column = t / 16 * 8;
    for (int i = t; i < 256; i += 32) sA[i] = uint16_t(i);
    if (kBarrier) __syncwarp();
    uint32_t whole[4], turned[4];
    ptx::ldmatrix_x4(whole, sA + row * 16 + column);
    ptx::ldmatrix_x4_trans(turned, sA + row * 16 + column);
    const auto is = [](uint32_t two, uint32_t low, uint32_t high) { return two == (low | high << 16); };
    bool right = true;
    for (int m = 0; m < 4; m++) {
        const int first = m % 2 * 8 * 16 + m / 2 * 8, g = t / 4, pair = t % 4 * 2;
        right &= is(whole[m], first + g * 16 + pair, first + g * 16 + pair + 1);
        right &= is(turned[m], first + pair * 16 + g, first + (pair + 1) * 16 + g);
    }
    out[t] = right;
}

// A 16 x 64 tile of numbers, copied 16 bytes a lane and read in four products' left operands.
template <bool kSwizzled>
__global__ void tile(float* out) {
    SMEM_DYN(sRaw, 128);
    auto* sA = reinterpret_cast<uint16_t*>(sRaw);
    auto* numbers = reinterpret_cast<uint16_t*>(out);
    const auto at = [](int row, int piece) { return kSwizzled ? swizzled<64>(row, piece) : row * 64 + piece * 8; };
    const int t = threadIdx.x;
    for (int i = t; i < 1024; i += 32) numbers[i] = uint16_t(i);
    __syncwarp();
    for (int i = t; i < 128; i += 32) ptx::cp_async_16(sA + at(i / 8, i % 8), numbers + 8 * i);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    bool right = true;
    for (int kk = 0; kk < 4; kk++) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, sA + at(t % 16, 2 * kk + t / 16));
        for (int m = 0; m < 4; m++) right &= (r[m] & 0xffff) == (m % 2 * 8 + t / 4) * 64u + (2 * kk + m / 2) * 8 + t % 4 * 2;
    }
    __syncwarp();
    out[t] = right;
}

__global__ void matrix_of_some(float* out) {
    SMEM_DYN(sRaw, 16);
    auto* sA = reinterpret_cast<uint16_t*>(sRaw);
    uint32_t r[4];
    if (threadIdx.x < 16) ptx::ldmatrix_x4(r, sA);
    out[threadIdx.x] = 1;
}
__global__ void matrix_misaligned(float* out) {
    SMEM_DYN(sRaw, 16);
    auto* sA = reinterpret_cast<uint16_t*>(sRaw);
    uint32_t r[4];
    ptx::ldmatrix_x4(r, sA + 4);
    out[threadIdx.x] = r[0];
}

// Small whole numbers, whose products and sums are exact in any order.
template <typename T>
__global__ void products(float* out) {
    const auto a = [](int m, int k) { return float((3 * m + 5 * k) % 17 - 8); };
    const auto b = [](int k, int n) { return float((7 * k + 2 * n) % 13 - 6); };
    const auto pack = [](float low, float high) {
        const T at[2] = {from_float<T>(low), from_float<T>(high)};
        uint32_t two;
        memcpy(&two, at, sizeof two);
        return two;
    };
    const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
    uint32_t ra[4];
    for (int i = 0; i < 4; i++) {
        const int m = g + i % 2 * 8, k = t + i / 2 * 8;
        ra[i] = pack(a(m, k), a(m, k + 1));
    }
    float c[4] = {1, 2, 3, 4};
    ptx::mma_m16n8k16<T>(c, ra, pack(b(t, g), b(t + 1, g)), pack(b(t + 8, g), b(t + 9, g)));
    bool right = true;
    for (int i = 0; i < 4; i++) {
        const int m = g + i / 2 * 8, n = t + i % 2;
        float sum = float(i + 1);
        for (int k = 0; k < 16; k++) sum += a(m, k) * b(k, n);
        right &= c[i] == sum;
    }
    // what a sum has beyond fp32 is cut off, not rounded
    for (float sign : {1.0f, -1.0f}) {
        float d[4] = {sign, 0, 0, 0};
        const uint32_t row[4] = {threadIdx.x == 0 ? pack(sign * 0x1p-12f, 0) : 0, 0, 0, 0};
        ptx::mma_m16n8k16<T>(d, row, pack(0x1.8p-12f, 0), 0);
        right &= threadIdx.x != 0 || d[0] == sign;
    }
    out[threadIdx.x] = right;
}

__global__ void copy_to_global(float* out) { ptx::cp_async_16(out, out + 4 * threadIdx.x); }

struct Case {
    const char* name;
    void (*kernel)(float*);
    dim3 grid, block;
    size_t smem;
    bool (*right)(const float*);
    int (*launch)(float*) = nullptr;  // where a kernel needs more than floats
};
template <Bug kBug>
Case of_ring(const char* name) {
    return {name, nullptr, 1, 1, 0, ring_right, launch_ring<kBug>};
}
const Case cases[] = {
    {"shuffles", shuffles, 1, 32, 0, shuffles_right},
    {"votes", votes, 1, 32, 0, all_ones},
    {"indices", indices, {2, 3, 4}, {2, 3, 4}, 0, counts_up},
    {"exchange", exchange<true, true>, 3, 65, 256, exchanged},
    {"no_barrier_before", exchange<false, true>, 3, 65, 256, exchanged},
    {"no_barrier_after", exchange<true, false>, 3, 65, 256, exchanged},
    {"no_syncwarp", exchange<true, true, false>, 3, 65, 256, exchanged},
    {"copies", copies<true, true>, 1, 64, 2048, copied},
    {"no_wait", copies<false, true>, 1, 64, 2048, copied},
    {"no_barrier_after_copy", copies<true, false>, 1, 64, 2048, copied},
    {"copies_of_nothing", copies_of_nothing, 1, 32, 512, all_ones},
    {"matrices", matrices<true>, 1, 32, 512, all_ones},
    {"matrices_too_early", matrices<false>, 1, 32, 512, all_ones},
    {"tile", tile<true>, 1, 32, 2048, all_ones},
    {"tile_not_swizzled", tile<false>, 1, 32, 2048, all_ones},
    {"matrix_of_some", matrix_of_some, 1, 32, 512, all_ones},
    {"matrix_misaligned", matrix_misaligned, 1, 32, 512, all_ones},
    {"products_half", products<__half>, 1, 32, 0, all_ones},
    {"products_bfloat", products<__nv_bfloat16>, 1, 32, 0, all_ones},
    {"copy_to_global", copy_to_global, 1, 32, 0, all_ones},
    {"reads_unwritten", reads_unwritten, 1, 32, 0, all_ones},
    {"past_the_end", past_the_end, 1, 32, 0, all_ones},
    {"before_the_start", before_the_start, 1, 32, 128, all_ones},
    {"two_barriers", two_barriers, 1, 64, 0, all_ones},
    {"barrier_in_a_warp", barrier_in_a_warp, {2, 2}, {32, 2}, 0, all_ones},
    {"not_in_mask", not_in_mask, 1, 32, 0, all_ones},
    {"partial_warp", votes, 1, 20, 0, all_ones},
    {"lane_left", lane_left, 1, 32, 0, all_ones},
    {"lane_leaves", lane_leaves, 1, 32, 0, all_ones},
    {"reads_outside_mask", reads_outside_mask, 1, 32, 0, all_ones},
    {"two_shuffles", two_shuffles, 1, 32, 0, all_ones},
    {"bad_width", bad_width, 1, 32, 0, all_ones},
    {"misaligned", misaligned, 1, 32, 0, all_ones},
    {"too_much", too_much, 1, 32, 0, all_ones},
    {"too_much_asked", votes, 1, 32, 50000, all_ones},
    {"empty_grid", votes, 0, 32, 0, all_ones},
    {"large_block", votes, 1, 1025, 0, all_ones},
    of_ring<Bug::kNone>("ring"),
    of_ring<Bug::kNoFullWait>("ring_no_full_wait"),
    of_ring<Bug::kNoEmptyWait>("ring_no_empty_wait"),
    of_ring<Bug::kNoExpect>("ring_no_expect"),
    of_ring<Bug::kExpectsMore>("ring_expects_more"),
    of_ring<Bug::kOneParity>("ring_one_parity"),
    of_ring<Bug::kReleasedEarly>("ring_released_early"),
    of_ring<Bug::kNoProductsWait>("ring_no_products_wait"),
    of_ring<Bug::kWaitsForFewer>("ring_waits_for_fewer"),
    of_ring<Bug::kWritesAccumulator>("ring_writes_accumulator"),
    of_ring<Bug::kNoProductsFence>("ring_no_products_fence"),
    of_ring<Bug::kThreeWarps>("ring_three_warps"),
    of_ring<Bug::kNoInitFence>("ring_no_init_fence"),
    of_ring<Bug::kNoBarrierAfterInit>("ring_no_barrier_after_init"),
    of_ring<Bug::kOverwritten>("ring_overwritten"),
    of_ring<Bug::kNoStoreFence>("ring_no_store_fence"),
    of_ring<Bug::kNoStoreBarrier>("ring_no_store_barrier"),
    of_ring<Bug::kNoStoreWait>("ring_no_store_wait"),
    of_ring<Bug::kNoReadWait>("ring_no_read_wait"),
    of_ring<Bug::kOtherSwizzle>("ring_other_swizzle"),
    of_ring<Bug::kSwapped>("ring_swapped"),
    of_ring<Bug::kOtherStep>("ring_other_step"),
    of_ring<Bug::kTileMisaligned>("ring_tile_misaligned"),
    of_ring<Bug::kTooManyRegisters>("ring_too_many_registers"),
    {"hand_over", hand_over<true, true>, 1, 128, 0, handed_over},
    {"no_mbarrier_wait", hand_over<false, true>, 1, 128, 0, handed_over},
    {"other_count", hand_over<true, false>, 1, 128, 0, handed_over},
    {"left_registers", left_registers<false>, 1, 128, 2048, all_ones},
    {"left_registers_early", left_registers<true>, 1, 128, 2048, all_ones},
    {"refuses_maps", nullptr, 1, 1, 0, all_ones, refuses_maps},
    {"approximations", approximations, 1, 1, 0, [](const float* out) { return out[0] == 1; }},
};

}  // namespace

int main(int argc, char** argv) {
    if (argc > 3) emulation::schedule(static_cast<emulation::Order>(atoi(argv[2])), atoi(argv[3]));
    for (const Case& c : cases) {
        if (argc < 2 || std::string(argv[1]) != c.name) continue;
        alignas(16) static float out[1024];
        const int code = c.launch ? c.launch(out) : KLAUNCH(c.kernel, c.grid, c.block, c.smem, nullptr, out);
        puts(code ? emulation::last_error().c_str() : c.right(out) ? "right" : "wrong");
#ifdef FASTATTN_RECORD
        for (const auto& [name, t] : emulation::traffic())
            printf("%s: %ld and %ld\n", name.c_str(), long(t.shared_passes), long(t.shared_conflicts));
#else
        for (const auto& [name, count] : emulation::launches()) printf("%s: %ld\n", name.c_str(), long(count));
#endif
        return 0;
    }
    return 2;
}
