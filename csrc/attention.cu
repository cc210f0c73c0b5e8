// Attention of 16-bit q, k, v on the tensor cores that every GPU from sm_80 up has, never storing the S_q x S_k matrix.
//
//   s = softcap(scale * q k^T) + bias - slope * |distance|,  -inf where a pair is excluded;  distance = i + shift - j
//   p = exp(s - lse),  lse = log(sum_j exp(s_ij) + exp(sink));  o = dropout(p) v
//
// Forward: a block owns kWarps * kTiles * 16 queries of one head, a warp kTiles * 16 of them, and walks over the keys kKeys
// at a time with an online softmax: when a row's running maximum m grows, its sum l and its accumulator shrink by
// exp(m_old - m_new). q stays in shared memory, or in registers where it takes 32 of them; tiles of k and v arrive in turn
// through a ring of asynchronous copies, kSlots - 1 of them ahead of the one in use. The middle of the walk is clean, tiles
// in which every pair is allowed; others pay for a comparison an element. The accumulator, 16 to 128 registers, shrinks
// only where some row of the warp has a new maximum. q, k, v are read, o and lse written.
//
// m, l and every accumulator are fp32, p is rounded to v's dtype. Logits are in units of log2, and where nothing is added to
// them the scale folds into the exponent: one multiply-add an element.
// Online softmax: Milakov and Gimelshein, arXiv 1805.02867; the tiling: Dao, arXiv 2307.08691.

#include "attention_rules.cuh"

namespace {

constexpr int kSlots = 3;  // tiles of k or v that the ring holds

template <typename T>
constexpr int fwd_shared_memory(int D, int queries, int keys) {
    return (queries + kSlots * keys) * D * static_cast<int>(sizeof(T));
}

// kRich: with whatever to_logits and drop do beyond a positive scale.
template <typename T, int kD, int kWarps, int kTiles, int kKeys, bool kRich>
__global__ void __launch_bounds__(kWarps * 32) attention_fwd_kernel(const AttentionFwd a) {
    constexpr int kThreads = kWarps * 32, kQueries = kWarps * kTiles * 16;
    constexpr bool kHeld = kTiles * kD / 4 <= 32;
    SMEM_DYN(smem, 128);
    T* const sQ = reinterpret_cast<T*>(smem);  // (kQueries, kD)
    T* const sRing = sQ + kQueries * kD;       // (kSlots, kKeys, kD)
    const AttentionRules& r = a.rules;
    const int tiles_m = (a.max_seqlen_q + kQueries - 1) / kQueries;
    const Place at(r, blockIdx.x / tiles_m);
    // A head's last queries first: under a causal mask they have the most keys, and the light tiles fill the tail.
    const int m0 = (tiles_m - 1 - static_cast<int>(blockIdx.x % tiles_m)) * kQueries;
    if (m0 >= at.q.owned) return;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kTiles * 16;
    const int m = m0 + warp_row + lane / 4;  // this lane's first row

    const Span walk = Span::over<kKeys>(m0, m0 + kQueries, at.q.length, at.k.length, at.shift, r.left, r.right);
    const int steps = walk.hi > walk.lo ? (walk.hi - walk.lo + kKeys - 1) / kKeys : 0;
    const T* const k = head<T>(a.k, at.b, at.h / r.group, at.k.start);
    const T* const v = head<T>(a.v, at.b, at.h / r.group, at.k.start);
    // Tile t of the walk, k and v in turn; a group even where there is none.
    const auto fetch = [&](int t) {
        T* const to = sRing + t % kSlots * (kKeys * kD);
        const int n0 = walk.lo + t / 2 * kKeys;
        if (t < 2 * steps && t % 2 == 0) copy_rows<kKeys, kD, kThreads>(to, k, a.k.stride_m, n0, at.k.length, r.D);
        if (t < 2 * steps && t % 2 == 1) copy_rows<kKeys, kD, kThreads>(to, v, a.v.stride_m, n0, at.k.length, r.Dv);
        ptx::cp_async_commit();
    };
    // Waits for tile t, and then reuses the slot of the one before it.
    const auto arrive = [&](int t) -> const T* {
        ptx::cp_async_wait<kSlots - 2>();
        __syncthreads();
        fetch(t + kSlots - 1);
        return sRing + t % kSlots * (kKeys * kD);
    };
    if (steps > 0) {
        const T* const q = head<T>(a.q, at.b, at.h, at.q.start);
        copy_rows<kQueries, kD, kThreads>(sQ, q, a.q.stride_m, m0, at.q.length, r.D);
        for (int t = 0; t < kSlots - 1; t++) fetch(t);
    }

    const T* const sWarpQ = sQ + warp_row * kD;
    const int left = left_lane<kD>(), transposed = transposed_lane<kD>(), right = right_lane<kD>();
    uint32_t rQ[kHeld ? kTiles : 1][kHeld ? kD / 16 : 1][4];
    Fragment<kD> acc[kTiles] = {};
    float top[kTiles][2], sum[kTiles][2];  // a row's maximum so far; this lane's share of its sum
    float sink = -INFINITY;
    if (a.sinks)  // a logit without a value
        with_dtype(a.sinks_dtype, [&](auto zero) { sink = to_float(static_cast<const decltype(zero)*>(a.sinks)[at.h]) * kLog2e; });
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            top[i][half] = sink;
            sum[i][half] = sink > -INFINITY && lane % 4 == 0 ? 1.0f : 0.0f;
        }
    const float factor = kRich ? 1.0f : r.scale * kLog2e;

    for (int step = 0; step < steps; step++) {
        const T* const sK = arrive(2 * step);
        const int n0 = walk.lo + step * kKeys, n = n0 + lane % 4 * 2;  // this lane's first key
        if (kHeld && step == 0) {
#pragma unroll
            for (int i = 0; i < kTiles; i++)
#pragma unroll
                for (int kk = 0; kk < kD / 16; kk++)
                    ptx::ldmatrix_x4(rQ[kHeld ? i : 0][kHeld ? kk : 0], sWarpQ + onwards<kD>(left, i * 16, 2 * kk));
        }
        Fragment<kKeys> s[kTiles] = {};
#pragma unroll
        for (int kk = 0; kk < kD / 16; kk++) {
            uint32_t q[kTiles][4];
            if (!kHeld)
#pragma unroll
                for (int i = 0; i < kTiles; i++) ptx::ldmatrix_x4(q[i], sWarpQ + onwards<kD>(left, i * 16, 2 * kk));
#pragma unroll
            for (int j = 0; j < kKeys / 8; j += 2) {
                uint32_t keys[4];
                ptx::ldmatrix_x4(keys, sK + onwards<kD>(transposed, j * 8, 2 * kk));
#pragma unroll
                for (int i = 0; i < kTiles; i++) {
                    const auto& queries = kHeld ? rQ[kHeld ? i : 0][kHeld ? kk : 0] : q[i];
                    ptx::mma_m16n8k16<T>(s[i][j], queries, keys[0], keys[1]);
                    ptx::mma_m16n8k16<T>(s[i][j + 1], queries, keys[2], keys[3]);
                }
            }
        }

        const bool clean = walk.clean(n0);
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            if (kRich) to_logits<false>(s[i], r, at, m + i * 16, n, clean, [](int, int, float) {});
            if (!clean) exclude<false>(s[i], r, at, m + i * 16, n);
            float shrink[2];
            bool grew = false;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < kKeys / 8; j++) most = fmaxf(most, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
                most = over_row(most, [](float a, float b) { return fmaxf(a, b); });
                const float now = fmaxf(top[i][half], most * factor);
                const float used = now == -INFINITY ? 0.0f : now;  // while nothing is attended, -inf - -inf would be NaN
                shrink[half] = ptx::exp2(top[i][half] - used);
                grew |= now > top[i][half];
                top[i][half] = now;
                float more = 0;
#pragma unroll
                for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[i][j][e] = ptx::exp2(fmaf(s[i][j][e], factor, -used));
                        more += s[i][j][e];
                    }
                sum[i][half] = sum[i][half] * shrink[half] + more;
            }
            if (kRich && r.dropout.seed) {
                const uint32_t keep = kept<false, kKeys>(r, at, m + i * 16, n);
                each<false>(s[i], m, n, [&](float& v, int j, int e, int, int) { v = keep >> (4 * j + e) & 1 ? v : 0.0f; });
            }
            if (__any_sync(kAll, grew)) {
#pragma unroll
                for (int j = 0; j < kD / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[i][j][e] *= shrink[e / 2];
            }
        }

        const T* const sV = arrive(2 * step + 1);
#pragma unroll
        for (int kk = 0; kk < kKeys / 16; kk++) {
            uint32_t p[kTiles][4];
#pragma unroll
            for (int i = 0; i < kTiles; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const auto& two = s[i][2 * kk + e / 2];
                    p[i][e] = pack<T>(two[e % 2 * 2], two[e % 2 * 2 + 1]);
                }
#pragma unroll
            for (int j = 0; j < kD / 8; j += 2) {
                uint32_t values[4];
                ptx::ldmatrix_x4_trans(values, sV + onwards<kD>(right, kk * 16, j));
#pragma unroll
                for (int i = 0; i < kTiles; i++) {
                    ptx::mma_m16n8k16<T>(acc[i][j], p[i], values[0], values[1]);
                    ptx::mma_m16n8k16<T>(acc[i][j + 1], p[i], values[2], values[3]);
                }
            }
        }
    }

    T* const o = head<T>(a.o, at.b, at.h, at.q.start);
    float* const lse = head(a.lse, at.b, at.h, at.q.start);
    const float rescale = r.dropout.seed ? r.dropout.rescale : 1.0f;
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
        float share[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = m + i * 16 + half * 8;
            const float whole = over_row(sum[i][half], [](float a, float b) { return a + b; });
            const bool attended = whole > 0 && row < at.q.length;
            share[half] = attended ? rescale / whole : 0.0f;
            if (lane % 4 == 0 && row < at.q.owned) lse[row] = attended ? (top[i][half] + log2f(whole)) * kLn2 : -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < kD / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = share[e / 2] == 0 ? 0.0f : acc[i][j][e] * share[e / 2];
        store_rows<kD>(acc[i], sQ + (warp_row + i * 16) * kD, o, a.o.stride_m, m0 + warp_row + i * 16, at.q.owned, r.Dv);
    }
}

// The row of the first width that is not below the wider head dim serves a call.
struct Forward {
    int widest;
    void (*kernel)(AttentionFwd);
    int warps, queries, shared;
};

template <typename T, int kD, int kWarps, int kTiles, int kKeys, bool kRich>
constexpr Forward forward_row() {
    constexpr int kQueries = kWarps * kTiles * 16;
    return {kD, attention_fwd_kernel<T, kD, kWarps, kTiles, kKeys, kRich>, kWarps, kQueries,
            fwd_shared_memory<T>(kD, kQueries, kKeys)};
}

constexpr int kWidths = 4;

// Not measured yet. Every row fits into the 99 KB that a block has on sm_86, sm_89 and sm_120.
template <typename T, bool kRich>
const Forward (&forward_table())[kWidths] {
    static const Forward table[] = {
        forward_row<T, 64, 4, kRich ? 1 : 2, 64, kRich>(),
        forward_row<T, 128, 4, kRich ? 1 : 2, kRich ? 64 : 32, kRich>(),
        forward_row<T, 192, 4, 1, 32, kRich>(),
        forward_row<T, 256, 4, 1, 32, kRich>(),
    };
    return table;
}

template <typename T>
int forward(const AttentionFwd& a, void* stream) {
    const AttentionRules& r = a.rules;
    const auto& table = is_rich(r) ? forward_table<T, true>() : forward_table<T, false>();
    const int width = r.D > r.Dv ? r.D : r.Dv;
    const Forward* row = table;
    while (row->widest < width) row++;
    const int64_t grid = int64_t{r.B} * r.H * ((a.max_seqlen_q + row->queries - 1) / row->queries);
    if (grid == 0) return cudaSuccess;
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    return KLAUNCH(row->kernel, static_cast<unsigned>(grid), row->warps * 32, row->shared, stream, a);
}

template <typename Row>
int load_kernels(const Row (&table)[kWidths]) {
    for (const Row& row : table)
        if (const int code = load_kernel(row.kernel, row.shared)) return code;
    return cudaSuccess;
}

}  // namespace

extern "C" int attention_fwd(const AttentionFwd* call, void* stream) {
    if (!attention_sm90_why_not(call)) return attention_sm90_fwd(call, stream);
    return with_half(call->rules.dtype, [&](auto zero) { return forward<decltype(zero)>(*call, stream); });
}

extern "C" int attention_prepare() {
    for (int dtype : {kFloat16, kBFloat16}) {
        const int code = with_half(dtype, [](auto zero) {
            const int plain = load_kernels(forward_table<decltype(zero), false>());
            return plain == cudaSuccess ? load_kernels(forward_table<decltype(zero), true>()) : plain;
        });
        if (code != cudaSuccess) return code;
    }
    return cudaSuccess;
}
