// Backward of attention.cu, in a fixed order and without atomics.
//
//   p = exp(s - lse);  delta = rowsum(do * o) - dlse;  dp = dropout(do v^T);  ds = p * (dp - delta)
//   dv = dropout(p)^T do;  dq = scale * ds k;  dk = scale * ds^T q;  dsink = -sum_i exp(sink - lse_i) delta_i
//
// Three kernels: delta of every row, with its lse beside it; dk and dv, where a block owns keys and walks over the queries of
// every head that shares them; dq, where a block owns queries and walks over keys. 7 products for 5, but nothing is added
// up across blocks. In each a warp owns kTiles * 16 rows. The tiles of the second kernel are transposed (keys, queries), so
// that in both p and ds are left operands of their next product as they lie in the accumulators: they never leave registers.
// The other side's tiles arrive in two slots, one ahead of the one in use. The middle of a walk is clean, as in the forward.
//
// Every accumulator is fp32; p and ds are rounded to the inputs' dtype for their second product. q, k, v, do are read ceil(S /
// tile) times, o, lse once; a workspace of 8 bytes a row carries lse and delta.
// Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691.

#include <type_traits>

#include "attention_rules.cuh"

namespace {

constexpr int kStatsRows = kAttentionStatsRows;

// A row's lse in units of log2, +inf where nothing is attended or no row is, which makes exp(s - lse) zero; and its delta.
struct alignas(8) Stat {
    float lse, delta;
};

// The workspace holds the rows of each head, or of each of its sequences, from a multiple of kStatsRows on and filled up to one.
__host__ __device__ inline int64_t stats_of_head(const AttentionRules& r) {
    const int64_t rows = (int64_t{r.S_q} + kStatsRows - 1) / kStatsRows * kStatsRows;
    return r.cu_q ? rows + int64_t{r.B} * kStatsRows : rows;
}

__device__ inline Stat* stats_of(const AttentionBwd& a, const Place& at, int h) {
    const AttentionRules& r = a.rules;
    const int64_t head = r.cu_q ? h : int64_t{at.b} * r.H + h;
    const int64_t start = r.cu_q ? (at.q.start + int64_t{at.b} * kStatsRows) / kStatsRows * kStatsRows : 0;
    return reinterpret_cast<Stat*>(a.stats) + head * stats_of_head(r) + start;
}

constexpr int kDeltaThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads) attention_bwd_delta_kernel(const AttentionBwd a) {
    constexpr int kLanes = 8;  // of a row, each 16 bytes of it at a time
    const AttentionRules& r = a.rules;
    const int tiles = (a.max_seqlen_q + kStatsRows - 1) / kStatsRows;
    const Place at(r, blockIdx.x / tiles);
    const int m0 = static_cast<int>(blockIdx.x % tiles) * kStatsRows, lane = threadIdx.x % kLanes;
    const T* const o = head<T>(a.o, at.b, at.h, at.q.start);
    const T* const do_ = head<T>(a.do_, at.b, at.h, at.q.start);
    float sink = -INFINITY, share = 0;
    if (a.dsinks)
        with_dtype(a.sinks_dtype, [&](auto zero) { sink = to_float(static_cast<const decltype(zero)*>(a.sinks)[at.h]) * kLog2e; });

    if (m0 < at.q.owned)
        for (int row = m0 + threadIdx.x / kLanes; row < m0 + kStatsRows; row += kDeltaThreads / kLanes) {
            float sum = 0;
            if (row < at.q.length)
                for (int d = lane * 8; d < r.Dv; d += kLanes * 8) {
                    float x[8], y[8];
                    load(do_ + row * a.do_.stride_m + d, x);
                    load(o + row * a.o.stride_m + d, y);
#pragma unroll
                    for (int i = 0; i < 8; i++) sum += x[i] * y[i];
                }
            sum = group_sum<kLanes>(sum);
            Stat stat{INFINITY, 0};
            if (row < at.q.length) {
                const float lse = head(a.lse, at.b, at.h, at.q.start)[row];
                if (a.dlse.data) sum -= head(a.dlse, at.b, at.h, at.q.start)[row];
                stat = {lse == -INFINITY ? INFINITY : fmaxf(lse * kLog2e, -kFloatMax), sum};
            }
            if (lane == 0) {
                stats_of(a, at, at.h)[row] = stat;
                share -= ptx::exp2(sink - stat.lse) * stat.delta;
            }
        }
    if (a.dsinks) {
        share = group_sum<kDeltaThreads>(share);
        if (threadIdx.x == 0) a.dsinks[blockIdx.x] = share;
    }
}

// c += left right^T, of kTiles * 16 rows of left and kColumns of right.
template <int kD, int kColumns, int kTiles, typename T>
__device__ void add_product_of_rows(Fragment<kColumns> (&c)[kTiles], const T* left, const T* right) {
    // unrolled further, addresses and operands ahead of their use take more registers than there are
    constexpr int kTogether = kD > 64 ? 4 : 2;
#pragma unroll kTogether
    for (int kk = 0; kk < kD / 16; kk++) {
        uint32_t rows[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; i++) left_operand<kD>(rows[i], left, i * 16, 2 * kk);
#pragma unroll
        for (int j = 0; j < kColumns / 8; j += 2) {
            uint32_t columns[4];
            right_operands_of_rows<kD>(columns, right, j * 8, 2 * kk);
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                ptx::mma_m16n8k16<T>(c[i][j], rows[i], columns[0], columns[1]);
                ptx::mma_m16n8k16<T>(c[i][j + 1], rows[i], columns[2], columns[3]);
            }
        }
    }
}

// c += left right, with left in operands already.
template <int kD, int kRows, int kTiles, typename T>
__device__ void add_product(Fragment<kD> (&c)[kTiles], const uint32_t (&left)[kTiles][kRows / 16][4], const T* right) {
#pragma unroll
    for (int kk = 0; kk < kRows / 16; kk++)
#pragma unroll
        for (int j = 0; j < kD / 8; j += 2) {
            uint32_t rows[4];
            right_operands<kD>(rows, right, kk * 16, j);
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                ptx::mma_m16n8k16<T>(c[i][j], left[i][kk], rows[0], rows[1]);
                ptx::mma_m16n8k16<T>(c[i][j + 1], left[i][kk], rows[2], rows[3]);
            }
        }
}

template <typename T, int kColumns>
__device__ void as_left_operands(uint32_t (&to)[kColumns / 16][4], const Fragment<kColumns>& from) {
#pragma unroll
    for (int kk = 0; kk < kColumns / 16; kk++) as_left_operand<T>(to[kk], from[2 * kk], from[2 * kk + 1]);
}

// ds of a tile. That of an excluded pair is 0 whatever dp is, which the tiles in which every pair is allowed need not ask.
template <typename Gradient>
__device__ void with_checks(bool checks, Gradient gradient) {
    if (checks)
        gradient(std::true_type{});
    else
        gradient(std::false_type{});
}

// dp (queries, keys) of a tile to ds, the gradient of its logits; s is q.k; softcap's slope goes to `slope`.
template <bool kRich, int kKeys>
__device__ void to_gradient(Fragment<kKeys>& dp, Fragment<kKeys>& s, Fragment<kKeys>& slope, const AttentionRules& r,
                            const Place& at, int m, int n, bool clean, const Stat (&stat)[2]) {
    if (kRich) to_logits<false>(s, r, at, m, n, clean, [&](int j, int e, float v) { slope[j][e] = v; });
    if (!clean) exclude<false>(s, r, at, m, n);
    const float factor = kRich ? 1.0f : r.scale * kLog2e;
    const uint32_t keep = kRich && r.dropout.seed ? kept<false, kKeys>(r, at, m, n) : 0xffffffffu;
    with_checks(!clean, [&](auto checks) {
        each<false>(dp, m, n, [&](float& v, int j, int e, int, int) {
            const float p = ptx::exp2(fmaf(s[j][e], factor, -stat[e / 2].lse));
            if (kRich && r.dropout.seed) v = keep >> (4 * j + e) & 1 ? v * r.dropout.rescale : 0.0f;
            v = p * (v - stat[e / 2].delta);
            if (decltype(checks)::value && p == 0) v = 0;
        });
    });
}

// ds from query m and key n on into the gradient of a bias that has both.
template <int kKeys>
__device__ void store_bias_gradient(Fragment<kKeys>& ds, const AttentionBwd& a, int b, int h, int m, int n) {
    with_dtype(a.dbias.dtype, [&](auto zero) {
        using B = decltype(zero);
        B* const to = static_cast<B*>(const_cast<void*>(a.dbias.data)) + b * a.dbias.stride_b + h * a.dbias.stride_h;
        each<false>(ds, m, n, [&](float& v, int, int, int query, int key) {
            if (query < a.rules.S_q && key < a.rules.S_k)
                to[query * a.dbias.stride_m + key * a.dbias.stride_n] = from_float<B>(v);
        });
    });
}

// The sums of a warp's rows from `first` on, this lane's among them, added up and stored; `sums` begins anew.
template <int kTiles>
__device__ void store_sums(float (&sums)[kTiles][2], float* to, int first, int end) {
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = over_row(sums[i][half], [](float x, float y) { return x + y; });
            const int row = first + i * 16 + half * 8;
            if (threadIdx.x % 4 == 0 && row < end) to[row] = sum;
            sums[i][half] = 0;
        }
}

template <typename T>
constexpr int dkdv_shared_memory(int D, int keys, int queries) {
    return 2 * (keys + 2 * queries) * D * static_cast<int>(sizeof(T)) + 2 * queries * static_cast<int>(sizeof(Stat));
}

// kRich: with whatever to_logits and kept do beyond a positive scale. kDk, kDv: what it makes, both or, where registers do not
// hold two accumulators, one of them.
template <typename T, int kD, int kWarps, int kTiles, int kQueries, bool kRich, bool kDk, bool kDv>
__global__ void __launch_bounds__(kWarps * 32) attention_bwd_dkdv_kernel(const AttentionBwd a) {
    constexpr int kThreads = kWarps * 32, kKeys = kWarps * kTiles * 16;
    SMEM_DYN(smem, 128);
    T* const sK = reinterpret_cast<T*>(smem);  // (kKeys, kD)
    T* const sV = sK + kKeys * kD;             // (kKeys, kD)
    T* const sSlots = sV + kKeys * kD;         // (2, 2, kQueries, kD): q and do
    Stat* const sStats = reinterpret_cast<Stat*>(sSlots + 4 * kQueries * kD);  // (2, kQueries)
    const AttentionRules& r = a.rules;
    const int tiles_n = (a.max_seqlen_k + kKeys - 1) / kKeys;
    const int first_head = static_cast<int>(blockIdx.x / tiles_n) * r.group;
    Place at(r, first_head);
    const int n0 = static_cast<int>(blockIdx.x % tiles_n) * kKeys;
    if (n0 >= at.k.owned) return;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kTiles * 16, h = at.h, h_kv = at.h / r.group;
    const int n = n0 + warp_row + lane / 4;  // this lane's first key

    const Span walk = Span::over<kQueries>(n0, n0 + kKeys, at.k.length, at.q.length, -at.shift, r.right, r.left);
    // The next tile of the walks over the queries of one head after another; a group even where there is none.
    int next_m0 = walk.lo, next_h = h;
    const auto fetch = [&](int slot) {
        if (next_m0 < walk.hi && next_h < h + r.group) {
            T* const to = sSlots + slot * (2 * kQueries * kD);
            copy_rows<kQueries, kD, kThreads>(to, head<T>(a.q, at.b, next_h, at.q.start), a.q.stride_m, next_m0, at.q.length,
                                              r.D);
            copy_rows<kQueries, kD, kThreads>(to + kQueries * kD, head<T>(a.do_, at.b, next_h, at.q.start), a.do_.stride_m,
                                              next_m0, at.q.length, r.Dv);
            if (threadIdx.x < kQueries / 2)
                ptx::cp_async_16_or_zeros(sStats + slot * kQueries + threadIdx.x * 2,
                                          stats_of(a, at, next_h) + next_m0 + threadIdx.x * 2, 16);
            next_m0 += kQueries;
            if (next_m0 >= walk.hi) {
                next_m0 = walk.lo;
                next_h++;
            }
        }
        ptx::cp_async_commit();
    };
    if (walk.lo < walk.hi) {
        copy_rows<kKeys, kD, kThreads>(sK, head<T>(a.k, at.b, h_kv, at.k.start), a.k.stride_m, n0, at.k.length, r.D);
        if (kDk) copy_rows<kKeys, kD, kThreads>(sV, head<T>(a.v, at.b, h_kv, at.k.start), a.v.stride_m, n0, at.k.length, r.Dv);
    }
    fetch(0);

    T *const sWarpK = sK + warp_row * kD, *const sWarpV = sV + warp_row * kD;
    Fragment<kD> dk[kDk ? kTiles : 1] = {}, dv[kDv ? kTiles : 1] = {};
    float sums[kTiles][2] = {};  // of ds over this lane's queries of one head
    const float factor = kRich ? 1.0f : r.scale * kLog2e;

    int slot = 0;
    const auto step = [&](int m0) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        fetch(slot ^ 1);
        const T *const sQ = sSlots + slot * (2 * kQueries * kD), *const sDo = sQ + kQueries * kD;
        const int m = m0 + lane % 4 * 2;  // this lane's first query

        Fragment<kQueries> s[kTiles] = {};
        add_product_of_rows<kD, kQueries>(s, sWarpK, sQ);
        const bool clean = walk.clean(m0);
        const Stat* const stats = sStats + slot * kQueries + lane % 4 * 2;
        slot ^= 1;
        Fragment<kQueries> slope[kRich && kDk ? kTiles : 1];
        uint32_t keep[kTiles];
        uint32_t p[kDv ? kTiles : 1][kQueries / 16][4];
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            if (kRich)
                to_logits<true>(s[i], r, at, m, n + i * 16, clean, [&](int j, int e, float v) {
                    if (kDk) slope[kRich && kDk ? i : 0][j][e] = v;
                });
            if (!clean) exclude<true>(s[i], r, at, m, n + i * 16);
            each<true>(s[i], m, n, [&](float& v, int j, int e, int, int) {
                v = ptx::exp2(fmaf(v, factor, -stats[8 * j + e % 2].lse));
            });
            keep[i] = kRich && r.dropout.seed ? kept<true, kQueries>(r, at, m, n + i * 16) : 0xffffffffu;
            if (kDv) {
                Fragment<kQueries> dropped;
                each<true>(s[i], m, n, [&](float& v, int j, int e, int, int) {
                    dropped[j][e] = kRich && !(keep[i] >> (4 * j + e) & 1) ? 0.0f : v;
                });
                as_left_operands<T, kQueries>(p[kDv ? i : 0], dropped);
            }
        }
        if constexpr (kDv) add_product<kD, kQueries>(dv, p, sDo);

        if constexpr (kDk) {
            Fragment<kQueries> dp[kTiles] = {};
            add_product_of_rows<kD, kQueries>(dp, sWarpV, sDo);
            uint32_t ds[kTiles][kQueries / 16][4];
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                const auto gradient = [&](auto checks) {
                    each<true>(dp[i], m, n, [&](float& v, int j, int e, int, int) {
                        const float p_of = s[i][j][e];
                        if (kRich && r.dropout.seed) v = keep[i] >> (4 * j + e) & 1 ? v * r.dropout.rescale : 0.0f;
                        v = p_of * (v - stats[8 * j + e % 2].delta);
                        if (decltype(checks)::value && p_of == 0) v = 0;
                    });
                };
                with_checks(!clean, gradient);
                if (kRich && a.dbias_of == BiasGradient::kColumns)
                    each<true>(dp[i], m, n, [&](float& v, int, int e, int, int) { sums[i][e / 2] += v; });
                if (kRich && r.softcap > 0)
                    each<true>(dp[i], m, n, [&](float& v, int j, int e, int, int) { v *= slope[kRich ? i : 0][j][e]; });
                as_left_operands<T, kQueries>(ds[i], dp[i]);
            }
            add_product<kD, kQueries>(dk, ds, sQ);
        }
    };
    for (; at.h < h + r.group; at.h++) {
        for (int m0 = walk.lo; m0 < walk.hi; m0 += kQueries) step(m0);
        if (kRich && kDk && a.dbias_of == BiasGradient::kColumns)
            store_sums(sums, head(a.bias_sums, at.b, at.h, 0), n, r.S_k);
    }

    const float rescale = kRich && r.dropout.seed ? r.dropout.rescale : 1.0f;
    const auto finish = [&](Fragment<kD>& sum, int i, float factor_of, T* staging, const HeadRows& to, int width) {
        each<true>(sum, 0, n + i * 16, [&](float& v, int, int, int, int key) { v = key < at.k.length ? v * factor_of : 0.0f; });
        store_rows<kD>(sum, staging + i * 16 * kD, head<T>(to, at.b, h_kv, at.k.start), to.stride_m,
                       n0 + warp_row + i * 16, at.k.owned, width);
    };
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
        if constexpr (kDk) finish(dk[i], i, r.scale, sWarpK, a.dk, r.D);
        if constexpr (kDv) finish(dv[i], i, rescale, sWarpV, a.dv, r.Dv);
    }
}

template <typename T>
constexpr int dq_shared_memory(int D, int queries, int keys) {
    return 2 * (queries + 2 * keys) * D * static_cast<int>(sizeof(T)) + queries * static_cast<int>(sizeof(Stat));
}

template <typename T, int kD, int kWarps, int kTiles, int kKeys, bool kRich>
__global__ void __launch_bounds__(kWarps * 32) attention_bwd_dq_kernel(const AttentionBwd a) {
    constexpr int kThreads = kWarps * 32, kQueries = kWarps * kTiles * 16;
    SMEM_DYN(smem, 128);
    T* const sQ = reinterpret_cast<T*>(smem);  // (kQueries, kD)
    T* const sDo = sQ + kQueries * kD;         // (kQueries, kD)
    T* const sSlots = sDo + kQueries * kD;     // (2, 2, kKeys, kD): k and v
    Stat* const sStats = reinterpret_cast<Stat*>(sSlots + 4 * kKeys * kD);  // (kQueries,)
    const AttentionRules& r = a.rules;
    const int tiles_m = (a.max_seqlen_q + kQueries - 1) / kQueries;
    const Place at(r, blockIdx.x / tiles_m);
    const int m0 = (tiles_m - 1 - static_cast<int>(blockIdx.x % tiles_m)) * kQueries;  // as in the forward
    if (m0 >= at.q.owned) return;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kTiles * 16, h_kv = at.h / r.group;
    const int m = m0 + warp_row + lane / 4;  // this lane's first row

    const Span walk = Span::over<kKeys>(m0, m0 + kQueries, at.q.length, at.k.length, at.shift, r.left, r.right);
    const auto fetch = [&](int slot, int n0) {
        if (n0 < walk.hi) {
            T* const to = sSlots + slot * (2 * kKeys * kD);
            copy_rows<kKeys, kD, kThreads>(to, head<T>(a.k, at.b, h_kv, at.k.start), a.k.stride_m, n0, at.k.length, r.D);
            copy_rows<kKeys, kD, kThreads>(to + kKeys * kD, head<T>(a.v, at.b, h_kv, at.k.start), a.v.stride_m, n0, at.k.length,
                                           r.Dv);
        }
        ptx::cp_async_commit();
    };
    if (walk.lo < walk.hi) {
        copy_rows<kQueries, kD, kThreads>(sQ, head<T>(a.q, at.b, at.h, at.q.start), a.q.stride_m, m0, at.q.length, r.D);
        copy_rows<kQueries, kD, kThreads>(sDo, head<T>(a.do_, at.b, at.h, at.q.start), a.do_.stride_m, m0, at.q.length, r.Dv);
    }
    fetch(0, walk.lo);
    for (int row = threadIdx.x; row < kQueries; row += kThreads)
        sStats[row] = m0 + row < at.q.length ? stats_of(a, at, at.h)[m0 + row] : Stat{INFINITY, 0};

    T *const sWarpQ = sQ + warp_row * kD, *const sWarpDo = sDo + warp_row * kD;
    Fragment<kD> dq[kTiles] = {};
    float sums[kTiles][2] = {};  // of ds over this lane's keys

    int slot = 0;
    for (int n0 = walk.lo; n0 < walk.hi; n0 += kKeys, slot ^= 1) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        fetch(slot ^ 1, n0 + kKeys);
        const T *const sK = sSlots + slot * (2 * kKeys * kD), *const sV = sK + kKeys * kD;
        const int n = n0 + lane % 4 * 2;  // this lane's first key

        Fragment<kKeys> s[kTiles] = {}, dp[kTiles] = {};
        add_product_of_rows<kD, kKeys>(s, sWarpQ, sK);
        add_product_of_rows<kD, kKeys>(dp, sWarpDo, sV);
        const bool clean = walk.clean(n0);
        const Stat* const stats = sStats + warp_row + lane / 4;
        uint32_t ds[kTiles][kKeys / 16][4];
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            Fragment<kKeys> slope;
            const Stat stat[] = {stats[i * 16], stats[i * 16 + 8]};
            to_gradient<kRich, kKeys>(dp[i], s[i], slope, r, at, m + i * 16, n, clean, stat);
            if (kRich && a.dbias_of == BiasGradient::kPlane) store_bias_gradient<kKeys>(dp[i], a, at.b, at.h, m + i * 16, n);
            if (kRich && a.dbias_of == BiasGradient::kRows)
                each<false>(dp[i], m, n, [&](float& v, int, int e, int, int) { sums[i][e / 2] += v; });
            if (kRich && r.softcap > 0)
                each<false>(dp[i], m, n, [&](float& v, int j, int e, int, int) { v *= slope[j][e]; });
            as_left_operands<T, kKeys>(ds[i], dp[i]);
        }
        add_product<kD, kKeys>(dq, ds, sK);
    }

#pragma unroll
    for (int i = 0; i < kTiles; i++) {
        each<false>(dq[i], m + i * 16, 0, [&](float& v, int, int, int row, int) { v = row < at.q.length ? v * r.scale : 0.0f; });
        store_rows<kD>(dq[i], sWarpQ + i * 16 * kD, head<T>(a.dq, at.b, at.h, at.q.start), a.dq.stride_m,
                       m0 + warp_row + i * 16, at.q.owned, r.D);
    }
    if (kRich && a.dbias_of == BiasGradient::kRows) store_sums(sums, head(a.bias_sums, at.b, at.h, 0), m, r.S_q);
    if (kRich && a.dbias_of == BiasGradient::kPlane) {  // what the walk skipped
        const int walked = walk.lo < walk.hi ? walk.lo + round_up(walk.hi - walk.lo, kKeys) : walk.lo;
        with_dtype(a.dbias.dtype, [&](auto zero) {
            using B = decltype(zero);
            B* const to = static_cast<B*>(const_cast<void*>(a.dbias.data)) + at.b * a.dbias.stride_b + at.h * a.dbias.stride_h;
            for (int row = m0; row < min(m0 + kQueries, r.S_q); row++)
                for (int key = threadIdx.x; key < r.S_k; key += kThreads)
                    if (key < walk.lo || key >= walked) to[row * a.dbias.stride_m + key * a.dbias.stride_n] = from_float<B>(0);
        });
    }
}

template <typename T>
constexpr int dbias_shared_memory(int D, int queries, int keys) {
    return 2 * (queries + keys) * D * static_cast<int>(sizeof(T));
}

// One tile of the gradient of a bias that is broadcast over batch or heads: ds recomputed for each and added in order.
template <typename T, int kD, int kWarps, int kKeys>
__global__ void __launch_bounds__(kWarps * 32) attention_bwd_dbias_kernel(const AttentionBwd a) {
    constexpr int kThreads = kWarps * 32, kQueries = kWarps * 16;
    SMEM_DYN(smem, 128);
    T* const sQ = reinterpret_cast<T*>(smem);  // (kQueries, kD)
    T* const sDo = sQ + kQueries * kD;         // (kQueries, kD)
    T* const sK = sDo + kQueries * kD;         // (kKeys, kD)
    T* const sV = sK + kKeys * kD;             // (kKeys, kD)
    const AttentionRules& r = a.rules;
    const int tiles_m = (r.S_q + kQueries - 1) / kQueries, tiles_n = (r.S_k + kKeys - 1) / kKeys;
    const int n0 = static_cast<int>(blockIdx.x % tiles_n) * kKeys;
    const int m0 = static_cast<int>(blockIdx.x / tiles_n % tiles_m) * kQueries;
    const int plane = static_cast<int>(blockIdx.x / tiles_n / tiles_m), planes_h = a.dbias.stride_h ? r.H : 1;
    const int first_b = plane / planes_h, first_h = plane % planes_h;
    const int end_b = a.dbias.stride_b ? first_b + 1 : r.B, end_h = a.dbias.stride_h ? first_h + 1 : r.H;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    const int m = m0 + warp_row + lane / 4, n = n0 + lane % 4 * 2;
    Fragment<kKeys> sum = {};

    for (int b = first_b; b < end_b; b++)
        for (int h = first_h; h < end_h; h++) {
            const Place at(r, b * r.H + h);
            const Span walk = Span::over<kKeys>(m0, m0 + kQueries, at.q.length, at.k.length, at.shift, r.left, r.right);
            if (n0 < walk.lo || n0 >= walk.hi) continue;
            __syncthreads();  // the tiles before have been read
            copy_rows<kQueries, kD, kThreads>(sQ, head<T>(a.q, b, h, 0), a.q.stride_m, m0, at.q.length, r.D);
            copy_rows<kQueries, kD, kThreads>(sDo, head<T>(a.do_, b, h, 0), a.do_.stride_m, m0, at.q.length, r.Dv);
            copy_rows<kKeys, kD, kThreads>(sK, head<T>(a.k, b, h / r.group, 0), a.k.stride_m, n0, at.k.length, r.D);
            copy_rows<kKeys, kD, kThreads>(sV, head<T>(a.v, b, h / r.group, 0), a.v.stride_m, n0, at.k.length, r.Dv);
            ptx::cp_async_commit();
            Stat stat[2];
            for (int half = 0; half < 2; half++)
                stat[half] = m + half * 8 < at.q.length ? stats_of(a, at, h)[m + half * 8] : Stat{INFINITY, 0};
            ptx::cp_async_wait<0>();
            __syncthreads();

            Fragment<kKeys> s[1] = {}, dp[1] = {}, slope;
            add_product_of_rows<kD, kKeys>(s, sQ + warp_row * kD, sK);
            add_product_of_rows<kD, kKeys>(dp, sDo + warp_row * kD, sV);
            to_gradient<true, kKeys>(dp[0], s[0], slope, r, at, m, n, walk.clean(n0), stat);
            each<false>(dp[0], m, n, [&](float& v, int j, int e, int, int) { sum[j][e] += v; });
        }
    store_bias_gradient<kKeys>(sum, a, first_b, first_h, m, n);
}

struct Launch {
    void (*kernel)(AttentionBwd);
    int threads, tile, shared;
};

// The row of the first width that is not below the wider head dim serves a call.
struct Backward {
    int widest;
    Launch keys[2];  // the second, where one kernel does not make both of dk and dv
    Launch queries;
    Launch tiles;  // of a bias' gradient
};

template <typename T, int kD, int kWarps, int kTiles, int kQueries, bool kRich, bool kDk = true, bool kDv = true>
constexpr Launch dkdv() {
    constexpr int kKeys = kWarps * kTiles * 16;
    return {attention_bwd_dkdv_kernel<T, kD, kWarps, kTiles, kQueries, kRich, kDk, kDv>, kWarps * 32, kKeys,
            dkdv_shared_memory<T>(kD, kKeys, kQueries)};
}

template <typename T, int kD, int kWarps, int kTiles, int kKeys, bool kRich>
constexpr Launch dq() {
    constexpr int kQueries = kWarps * kTiles * 16;
    return {attention_bwd_dq_kernel<T, kD, kWarps, kTiles, kKeys, kRich>, kWarps * 32, kQueries,
            dq_shared_memory<T>(kD, kQueries, kKeys)};
}

template <typename T, int kD, int kWarps, int kKeys>
constexpr Launch dbias() {
    return {attention_bwd_dbias_kernel<T, kD, kWarps, kKeys>, kWarps * 32, kKeys, dbias_shared_memory<T>(kD, kWarps * 16, kKeys)};
}

constexpr int kWidths = 4;

// Not measured yet. Every row fits into the 99 KB that a block has on sm_86, sm_89 and sm_120.
template <typename T, bool kRich>
const Backward (&table())[kWidths] {
    static const Backward rows[] = {
        {64, {dkdv<T, 64, 4, kRich ? 1 : 2, 32, kRich>()}, dq<T, 64, 4, kRich ? 1 : 2, 32, kRich>(),
         dbias<T, 64, 4, 32>()},
        {128, {dkdv<T, 128, 8, 1, 32, kRich>()}, dq<T, 128, 4, kRich ? 1 : 2, 32, kRich>(),
         dbias<T, 128, 4, 32>()},
        {192, {dkdv<T, 192, 4, 1, 32, kRich, true, false>(), dkdv<T, 192, 4, 1, 32, kRich, false, true>()},
         dq<T, 192, 4, 1, 32, kRich>(), dbias<T, 192, 4, 32>()},
        {256, {dkdv<T, 256, 4, 1, 16, kRich, true, false>(), dkdv<T, 256, 4, 1, 16, kRich, false, true>()},
         dq<T, 256, 4, 1, 16, kRich>(), dbias<T, 256, 4, 32>()},
    };
    return rows;
}

template <typename T>
const Backward (&table(bool rich))[kWidths] {
    return rich ? table<T, true>() : table<T, false>();
}

int run(const Launch& launch, int64_t heads, int length, const AttentionBwd& a, void* stream) {
    const int64_t grid = heads * ((length + launch.tile - 1) / launch.tile);
    if (grid == 0) return cudaSuccess;
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    return KLAUNCH(launch.kernel, static_cast<unsigned>(grid), launch.threads, launch.shared, stream, a);
}

template <typename T>
int backward(const AttentionBwd& a, void* stream) {
    const AttentionRules& r = a.rules;
    const int width = r.D > r.Dv ? r.D : r.Dv;
    const Backward* row = table<T>(is_rich(r));
    while (row->widest < width) row++;
    const int64_t heads = int64_t{r.B} * r.H;
    int code = run({attention_bwd_delta_kernel<T>, kDeltaThreads, kStatsRows, 0}, heads, a.max_seqlen_q, a, stream);
    for (const Launch& launch : row->keys)
        if (code == cudaSuccess && launch.kernel) code = run(launch, heads / r.group, a.max_seqlen_k, a, stream);
    if (code == cudaSuccess) code = run(row->queries, heads, a.max_seqlen_q, a, stream);
    if (code != cudaSuccess || a.dbias_of != BiasGradient::kSum) return code;
    const int64_t planes = int64_t{a.dbias.stride_b ? r.B : 1} * (a.dbias.stride_h ? r.H : 1);
    return run(row->tiles, planes * ((r.S_q + row->tiles.threads / 2 - 1) / (row->tiles.threads / 2)), r.S_k, a, stream);
}

}  // namespace

extern "C" int attention_bwd(const AttentionBwd* call, void* stream) {
    return with_half(call->rules.dtype, [&](auto zero) { return backward<decltype(zero)>(*call, stream); });
}

extern "C" int64_t attention_bwd_stats(const AttentionRules* rules) {
    return (rules->cu_q ? rules->H : int64_t{rules->B} * rules->H) * stats_of_head(*rules) * 2;
}

extern "C" int attention_backward_prepare() {
    int code = cudaSuccess;
    for (int dtype : {kFloat16, kBFloat16})
        for (bool rich : {false, true})
            with_half(dtype, [&](auto zero) {
                using T = decltype(zero);
                if (code == cudaSuccess) code = load_kernel(attention_bwd_delta_kernel<T>, 0);
                for (const Backward& row : table<T>(rich))
                    for (const Launch& launch : {row.keys[0], row.keys[1], row.queries, row.tiles})
                        if (code == cudaSuccess && launch.kernel) code = load_kernel(launch.kernel, launch.shared);
                return code;
            });
    return code;
}
