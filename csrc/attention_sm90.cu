// Attention forward by Hopper's own instructions, for calls without rules but causality: what attention.cu computes, for
// head dims 64 and 128.
//
// A block owns 128 queries of one head. Its first warpgroup fetches: one thread has tiles of 128 keys of k and of v copied
// into rings of kStages each; an mbarrier a tile says that it has come, another that both other warpgroups are through
// with it. Each of those owns 64 queries and has two products under way, the logits of the next tile and o += p v of this
// one, so that the tensor cores are busy while it takes the softmax of the next. Logits, o and p are in registers, some of
// which the first warpgroup gives away. The walk, the online softmax and its precision are attention.cu's.
// This order of products: Shah et al., arXiv 2407.08608.

#include "attention_rules.cuh"
#include "ptx_sm90.cuh"

namespace {

constexpr int kStages = 2, kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr int kQueries = 128, kKeys = 128;
constexpr int kBox = 64;  // columns of a box: rows of 128 bytes, which a swizzle turns

template <int kD>
constexpr int kShared = (kQueries + 2 * kStages * kKeys) * kD * 2;

struct Maps {
    ptx::TensorMap q, k, v;
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sm90_fwd_kernel(const __grid_constant__ AttentionFwd a, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTATTN_EMULATION)
    constexpr int kTile = kKeys * kD * 2, kHalf = kWarpgroup / 2;  // kHalf: queries of a warpgroup
    SMEM_DYN(sTiles, 1024);
    SMEM_ARRAY(uint64_t, sArrived, [1 + 2 * kStages]);  // q, then k and v of each stage
    SMEM_ARRAY(uint64_t, sFree, [2 * kStages]);
    unsigned char *const sQ = sTiles, *const sK = sQ + kQueries * kD * 2, *const sV = sK + kStages * kTile;
    const AttentionRules& r = a.rules;
    const int tiles_m = (r.S_q + kQueries - 1) / kQueries;
    const Place at(r, blockIdx.x / tiles_m);
    // A head's last queries first: under a causal mask they have the most keys, and the light tiles fill the tail.
    const int m0 = (tiles_m - 1 - static_cast<int>(blockIdx.x % tiles_m)) * kQueries;
    const Span walk = Span::over<kKeys>(m0, m0 + kQueries, r.S_q, r.S_k, at.shift, -1, r.right);
    const int steps = (walk.hi + kKeys - 1) / kKeys;

    if (threadIdx.x == 0) {
        for (int i = 0; i < 1 + 2 * kStages; i++) ptx::mbarrier_init(&sArrived[i], 1);
        for (int i = 0; i < 2 * kStages; i++) ptx::mbarrier_init(&sFree[i], 2 * kWarpgroup / 32);
        ptx::fence_proxy_async();
    }
    __syncthreads();

    if (threadIdx.x < kWarpgroup) {
        ptx::fewer_registers<24>();
        if (threadIdx.x > 0 || steps == 0) return;
        ptx::mbarrier_arrive_expect(&sArrived[0], kQueries * kD * 2);
        for (int i = 0; i < 2 * kD / kBox; i++) {
            const int warpgroup = i / (kD / kBox), box = i % (kD / kBox);
            ptx::tensor_load(sQ + i * (kHalf * 128), &maps.q, &sArrived[0], box * kBox, m0 + warpgroup * kHalf, at.h,
                             at.b);
        }
        for (int step = 0; step < steps; step++) {
            const int stage = step % kStages, unused = (step / kStages & 1) ^ 1;
            const auto fetch = [&](unsigned char* ring, const ptx::TensorMap& map, int barrier) {
                ptx::mbarrier_wait(&sFree[barrier], unused);
                ptx::mbarrier_arrive_expect(&sArrived[1 + barrier], kTile);
                for (int box = 0; box < kD / kBox; box++)
                    ptx::tensor_load(ring + stage * kTile + box * (kKeys * 128), &map, &sArrived[1 + barrier], box * kBox,
                                     step * kKeys, at.h / r.group, at.b);
            };
            fetch(sK, maps.k, 2 * stage);
            fetch(sV, maps.v, 2 * stage + 1);
        }
        return;
    }

    ptx::more_registers<240>();
    // the shuffle tells the compiler that it is one number for the warp, which descriptors are made of
    const int warpgroup = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int m = m0 + warpgroup * kHalf + warp * 16 + lane / 4;  // this lane's first row
    const uint64_t queries = ptx::wgmma_operand(sQ + warpgroup * (kHalf * kD * 2), 16, 1024, ptx::Swizzle::k128);
    const uint64_t keys = ptx::wgmma_operand(sK, 16, 1024, ptx::Swizzle::k128);
    const uint64_t values = ptx::wgmma_operand(sV, kKeys * 128, 1024, ptx::Swizzle::k128);
    const float factor = r.scale * kLog2e;
    float acc[kD / 2] = {}, s[kKeys / 2];
    uint32_t p[kKeys / 16][4];
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // a row's maximum so far; this lane's share of its sum

    // Of the k (0) or v (1) of a step.
    const auto arrive = [&](int step, int of) {
        ptx::mbarrier_wait(&sArrived[1 + step % kStages * 2 + of], step / kStages & 1);
    };
    const auto release = [&](int step, int of) {
        if (lane == 0) ptx::mbarrier_arrive(&sFree[step % kStages * 2 + of]);
    };
    const auto multiply_keys = [&](int step) {
        const uint64_t tile = ptx::advanced(keys, step % kStages * kTile);
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < kD / 16; kk++) {
            const int inside = kk % 4 * 32;
            ptx::wgmma<T, false, false>(s, ptx::advanced(queries, kk / 4 * (kHalf * 128) + inside),
                                        ptx::advanced(tile, kk / 4 * (kKeys * 128) + inside), kk > 0);
        }
        ptx::wgmma_commit();
    };
    const auto multiply_values = [&](int step) {
        const uint64_t tile = ptx::advanced(values, step % kStages * kTile);
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < kKeys / 16; kk++) ptx::wgmma<T, true>(acc, p[kk], ptx::advanced(tile, kk * 2048), true);
        ptx::wgmma_commit();
    };
    // s to probabilities; what acc is to shrink by, and whether by anything at all.
    float shrink[2];
    bool grew;
    const auto softmax = [&](int step) {
        const int n0 = step * kKeys;
        if (!walk.clean(n0))
            exclude(reinterpret_cast<float(&)[kKeys / 8][4]>(s), m, n0 + lane % 4 * 2, r.S_q, r.S_k, at.shift, -1, r.right);
        grew = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = -INFINITY;
#pragma unroll
            for (int i = 2 * half; i < kKeys / 2; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
            most = over_row(most, [](float a, float b) { return fmaxf(a, b); });
            const float now = fmaxf(top[half], most * factor);
            const float used = now == -INFINITY ? 0.0f : now;  // while nothing is attended, -inf - -inf would be NaN
            shrink[half] = ptx::exp2(top[half] - used);
            grew |= now > top[half];
            top[half] = now;
            float more = 0;
#pragma unroll
            for (int i = 2 * half; i < kKeys / 2; i += 4)
#pragma unroll
                for (int e = i; e < i + 2; e++) {
                    s[e] = ptx::exp2(fmaf(s[e], factor, -used));
                    more += s[e];
                }
            sum[half] = sum[half] * shrink[half] + more;
        }
    };
    const auto round = [&] {
#pragma unroll
        for (int i = 0; i < kKeys / 4; i++) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
    };

    if (steps > 0) {
        ptx::mbarrier_wait(&sArrived[0], 0);
        arrive(0, 0);
        multiply_keys(0);
        ptx::wgmma_wait<0>(s);
        release(0, 0);
        softmax(0);
        round();
        arrive(0, 1);
        for (int step = 1; step < steps; step++) {
            arrive(step, 0);
            multiply_keys(step);
            multiply_values(step - 1);
            ptx::wgmma_wait<1>(s);
            release(step, 0);
            softmax(step);
            ptx::wgmma_hold(s);
            arrive(step, 1);  // here, since ptxas takes the wait below to where its basic block begins
            ptx::wgmma_wait<0>(acc);
            release(step - 1, 1);
            if (__any_sync(kAll, grew)) {
#pragma unroll
                for (int i = 0; i < kD / 2; i++) acc[i] *= shrink[i / 2 % 2];
            }
            round();
        }
        multiply_values(steps - 1);
        ptx::wgmma_wait<0>(acc);
    }

    T* const o = head<T>(a.o, at.b, at.h, 0);
    float* const lse = head(a.lse, at.b, at.h, 0);
    Fragment<kD> rows;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = m + half * 8;
        const float whole = over_row(sum[half], [](float a, float b) { return a + b; });
        const float share = whole > 0 ? 1.0f / whole : 0.0f;
        if (lane % 4 == 0 && row < r.S_q) lse[row] = whole > 0 ? (top[half] + log2f(whole)) * kLn2 : -INFINITY;
#pragma unroll
        for (int i = 2 * half; i < kD / 2; i += 4) {
            rows[i / 4][i % 4] = acc[i] * share;
            rows[i / 4][i % 4 + 1] = acc[i + 1] * share;
        }
    }
    // q's place is free once all four warps are past its last product
    ptx::named_barrier_sync(1 + warpgroup, kWarpgroup);
    T* const staging = reinterpret_cast<T*>(sQ) + (warpgroup * kHalf + warp * 16) * kD;
    store_rows<kD>(rows, staging, o, a.o.stride_m, m - lane / 4, r.S_q, kD);
#endif
}

// Rows (B, heads, S, D) as the dims that boxes are cut of.
int encode(ptx::TensorMap& map, const HeadRows& rows, int64_t D, int64_t S, int64_t heads, int64_t B, int box_rows) {
    // what a dim of size 1 has for a stride is nobody's
    const auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? 16 : 2 * stride; };
    const int64_t size[] = {D, S, heads, B};
    const int64_t stride[] = {bytes(S, rows.stride_m), bytes(heads, rows.stride_h), bytes(B, rows.stride_b)};
    const int box[] = {kBox, box_rows, 1, 1};
    return ptx::encode_tensor_map(&map, 4, rows.data, size, stride, box, ptx::Swizzle::k128);
}

template <typename T, int kD>
int forward(const AttentionFwd& a, void* stream) {
    const AttentionRules& r = a.rules;
    const int64_t grid = int64_t{r.B} * r.H * ((r.S_q + kQueries - 1) / kQueries);
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    Maps maps;
    int code = encode(maps.q, a.q, kD, r.S_q, r.H, r.B, kWarpgroup / 2);
    if (!code) code = encode(maps.k, a.k, kD, r.S_k, r.H / r.group, r.B, kKeys);
    if (!code) code = encode(maps.v, a.v, kD, r.S_k, r.H / r.group, r.B, kKeys);
    if (code) return code;
    return KLAUNCH((attention_sm90_fwd_kernel<T, kD>), static_cast<unsigned>(grid), kThreads, kShared<kD>, stream, a,
                   maps);
}

// A sentence if boxes cannot be cut of rows whose strides are in elements of 16 bits.
const char* map_why_not(const HeadRows& rows, int64_t S, int64_t heads, int64_t B) {
    const int64_t size[] = {S, heads, B}, stride[] = {rows.stride_m, rows.stride_h, rows.stride_b};
    for (int d = 0; d < 3; d++) {
        if (size[d] == 1) continue;
        if (stride[d] == 0) return "a tensor is expanded, and a tensor map has no stride of 0";
        if (stride[d] >= int64_t{1} << 39) return "a stride is not below the 2^40 bytes of a tensor map";
    }
    return nullptr;
}

bool on_sm90() {
    int device, major, minor;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
           minor == 0;
}

}  // namespace

extern "C" const char* attention_sm90_why_not(const AttentionFwd* call) {
    const AttentionRules& r = call->rules;
    if (r.D != r.Dv || (r.D != 64 && r.D != 128)) return "its head dims are 64 and 128, the same for q, k and v";
    if (is_rich(r) || call->sinks) return "it has no bias, mask, softcap, ALiBi, sinks, dropout or scale below 0";
    if (r.left >= 0 || r.right > 0) return "it has no window";
    if (r.q_lens || r.kv_lens || r.cu_q) return "it has no lengths and no packed sequences";
    if (r.B == 0 || r.H == 0 || r.S_q == 0 || r.S_k == 0) return "a tensor map has no dim of size 0";
    if (!on_sm90()) return "wgmma is an instruction of compute capability 9.0 alone";
    if (const char* reason = map_why_not(call->q, r.S_q, r.H, r.B)) return reason;
    if (const char* reason = map_why_not(call->k, r.S_k, r.H / r.group, r.B)) return reason;
    return map_why_not(call->v, r.S_k, r.H / r.group, r.B);
}

extern "C" int attention_sm90_fwd(const AttentionFwd* call, void* stream) {
    return with_half(call->rules.dtype, [&](auto zero) {
        using T = decltype(zero);
        return call->rules.D == 64 ? forward<T, 64>(*call, stream) : forward<T, 128>(*call, stream);
    });
}

extern "C" int attention_sm90_prepare() {
    if (!on_sm90()) return cudaSuccess;
    for (int dtype : {kFloat16, kBFloat16}) {
        const int code = with_half(dtype, [](auto zero) {
            using T = decltype(zero);
            const int narrow = load_kernel(attention_sm90_fwd_kernel<T, 64>, kShared<64>);
            return narrow ? narrow : load_kernel(attention_sm90_fwd_kernel<T, 128>, kShared<128>);
        });
        if (code) return code;
    }
    return cudaSuccess;
}
