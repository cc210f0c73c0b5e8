// Attention of a few new queries over a key/value cache of 16 bits: append, split over the keys, combine.
//
//   s_j = softcap(scale * q_i . k_j) - slope * (p - j),  o_i = sum_j exp(s_j) v_j / Z,  lse_i = log Z,
//   Z = sum_j exp(s_j) + exp(sink),  over 0 <= p - j <= left;  query i of a sequence of L keys stands at p = i + L - S_q
//
// Decoding reads every cached byte once and does little else. A block owns one (sequence, key head, share of the keys, 16
// packed rows): the H / H_kv query heads times S_q queries that read those keys. Each of its four warps multiplies all 16
// rows by a quarter of the tile's keys, with an online softmax of its own, while the next tiles of k and v arrive through a
// ring of asynchronous copies, as many as shared memory holds, four at most; at the end the four results become one. With
// several shares that goes to a workspace (fp32, D_v + 2 words a row and share), and a second kernel rescales the shares
// to one maximum and adds them in order. Shares are cut on the device from cache_lens: the host knows shapes only, and a
// captured graph serves growing lengths. Bound by memory; 48 KB of loads in flight a block, two to four blocks an SM.
//
// Any index read from memory is clamped: a wrong length or page gives wrong numbers, never a fault. Scores, softmax and
// sums are fp32 in units of log2; probabilities are rounded to the cache's dtype before they meet the values.
// The scheme is Flash-Decoding's: https://pytorch.org/blog/flash-decoding/

#include "rt.cuh"

#include "attention.cuh"
#include "launchers.h"
#include "ptx.cuh"

namespace {

constexpr int kRows = 16, kWarps = 4, kThreads = 32 * kWarps;

__device__ inline int64_t read_integer(const Ids& ids, int64_t at) {
    return ids.wide ? static_cast<const int64_t*>(ids.data)[at] : static_cast<const int32_t*>(ids.data)[at];
}

// Filled positions of sequence b after the append.
__device__ inline int total_length(const AttentionDecode& a, int b) {
    const int64_t filled = max(read_integer(a.lens, b), int64_t{0});
    return static_cast<int>(min(min(filled, int64_t{a.capacity}) + a.S_new, int64_t{a.capacity}));
}

// Where position n of sequence b lies in a cache, from its key head's first element.
__device__ inline int64_t position_at(const AttentionDecode& a, const Cache& cache, int b, int n) {
    if (!a.table.data) return b * cache.stride_b + n * cache.stride_n;
    const int entry = a.page_shift >= 0 ? n >> a.page_shift : n / a.page_size;
    const int64_t page = read_integer(a.table, b * a.table.stride_b + entry);
    const int64_t held = min(max(page, int64_t{0}), int64_t{a.pages} - 1);
    return held * cache.stride_b + (n - entry * a.page_size) * cache.stride_n;
}

// New rows to their positions, 16 bytes a thread; k for blockIdx.y 0, v for 1. What has no valid place is dropped.
__global__ void __launch_bounds__(256) attention_decode_append_kernel(const AttentionDecode a) {
    const bool values = blockIdx.y;
    const Cache& cache = values ? a.v : a.k;
    const HeadRows& rows = values ? a.v_new : a.k_new;
    const int pieces = (values ? a.Dv : a.D) / 8;
    const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x, row = at / pieces;
    const int piece = static_cast<int>(at % pieces), t = static_cast<int>(row % a.S_new);
    const int h = static_cast<int>(row / a.S_new % a.H_kv);
    const int64_t b = row / a.S_new / a.H_kv;
    if (b >= a.B) return;
    const int64_t filled = read_integer(a.lens, b);
    if (filled < 0 || filled > a.capacity || filled + t >= a.capacity) return;
    const int n = static_cast<int>(filled) + t;
    if (a.table.data) {
        const int64_t page = read_integer(a.table, b * a.table.stride_b + n / a.page_size);
        if (page < 0 || page >= a.pages) return;
    }
    const auto* from = static_cast<const uint16_t*>(rows.data) + b * rows.stride_b + h * rows.stride_h + t * rows.stride_m;
    auto* to = static_cast<uint16_t*>(cache.data) + h * cache.stride_h + position_at(a, cache, static_cast<int>(b), n);
    __stwb(reinterpret_cast<uint4*>(to) + piece, __ldg(reinterpret_cast<const uint4*>(from) + piece));
}

// The logits' unit is log2; slots: tiles that the ring holds.
template <typename T, int kD, int kKeys>
__global__ void __launch_bounds__(kThreads) attention_decode_fwd_kernel(const AttentionDecode a, const int slots) {
    constexpr int kOwn = kKeys / kWarps;  // keys of a tile that a warp multiplies
    static_assert(kOwn % 16 == 0 && 2 * kKeys * int{sizeof(T)} >= kWarps * kRows * int{sizeof(float)});
    SMEM_DYN(smem, 128);
    T* const sQ = reinterpret_cast<T*>(smem);                // (kRows, kD)
    T* const sRing = sQ + kRows * kD;                        // (slots, kKeys, kD), then
    float* const sO = reinterpret_cast<float*>(sRing);       // (kWarps, kRows, kD)
    SMEM_ARRAY(float, sTop, [kWarps][kRows]);
    SMEM_ARRAY(float, sSum, [kWarps][kRows]);
    const int group = a.H / a.H_kv, rows = group * a.S_q, tiles = (rows + kRows - 1) / kRows;
    const int tile = blockIdx.x % tiles, split = blockIdx.x / tiles % a.splits;
    const int h_kv = blockIdx.x / tiles / a.splits % a.H_kv, b = blockIdx.x / tiles / a.splits / a.H_kv;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    const int shift = total_length(a, b) - a.S_q;
    const int first_row = tile * kRows, last_row = min(first_row + kRows, rows) - 1;
    int end = max(last_row / group + shift + 1, 0);
    int start = a.left < 0 ? 0 : max(first_row / group + shift - a.left, 0) / kKeys * kKeys;
    const int whole = (max(end - start, 0) + kKeys - 1) / kKeys, share = (whole + a.splits - 1) / a.splits * kKeys;
    start += split * share;
    end = min(end, start + share);
    const int steps = end > start ? (end - start + kKeys - 1) / kKeys : 0;

    const int piece = threadIdx.x % 8;
    const auto copy_row = [&](T* to, int row, const T* from, bool inside, int width) {
#pragma unroll
        for (int j = 0; j < kD / 64; j++) {
            const bool has = inside && piece * 8 + j * 64 < width;
            ptx::cp_async_16_or_zeros(to + swizzled<kD>(row, piece) + j * 64, from + piece * 8 + j * 64, has ? 16 : 0);
        }
    };
    // Tile t of the walk, k and v in turn; a group even where there is none.
    const auto fetch = [&](int t, int slot) {
        if (t < 2 * steps) {
            const Cache& cache = t % 2 ? a.v : a.k;
            const T* const head = static_cast<const T*>(cache.data) + h_kv * cache.stride_h;
#pragma unroll 4
            for (int row = threadIdx.x / 8; row < kKeys; row += kThreads / 8) {
                const int n = start + t / 2 * kKeys + row;
                copy_row(sRing + slot * (kKeys * kD), row, n < end ? head + position_at(a, cache, b, n) : head, n < end,
                         t % 2 ? a.Dv : a.D);
            }
        }
        ptx::cp_async_commit();
    };
    if (steps > 0) {
        const int row = threadIdx.x / 8, m = first_row + row;
        const T* const q = static_cast<const T*>(a.q.data) + b * a.q.stride_b + (h_kv * group + m % group) * a.q.stride_h +
                           m / group * a.q.stride_m;
        copy_row(sQ, row, q, m < rows, a.D);
        for (int t = 0; t < slots - 1; t++) fetch(t, t);
    }

    const int left = left_lane<kD>(), transposed = transposed_lane<kD>(), right = right_lane<kD>();
    const float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e, cap = a.softcap * kLog2e;
    int at[2], first[2], last[2];  // of this lane's two rows: position, keys they attend to
    float slope[2] = {0, 0}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int m = first_row + lane / 4 + half * 8;
        at[half] = m / group + shift;
        first[half] = a.left < 0 ? 0 : at[half] - a.left;
        last[half] = m < rows ? min(at[half] + 1, end) : first[half];
        if (a.slopes && m < rows)
            slope[half] = a.slopes[b * a.slopes_stride_b + (h_kv * group + m % group) * a.slopes_stride_h] * kLog2e;
    }
    Fragment<kD> acc = {};
    int slot = 0;  // of the tile that comes next
    const auto arrive = [&](int t) -> const T* {
        ptx::cp_async_wait(slots - 2);
        __syncthreads();
        fetch(t + slots - 1, slot == 0 ? slots - 1 : slot - 1);
        const T* const here = sRing + slot * (kKeys * kD) + warp * kOwn * kD;
        slot = slot + 1 == slots ? 0 : slot + 1;
        return here;
    };

    for (int step = 0; step < steps; step++) {
        const T* const sK = arrive(2 * step);
        Fragment<kOwn> s = {};
#pragma unroll
        for (int kk = 0; kk < kD / 16; kk++) {
            uint32_t q[4], keys[4];
            ptx::ldmatrix_x4(q, sQ + onwards<kD>(left, 0, 2 * kk));
#pragma unroll
            for (int j = 0; j < kOwn / 8; j += 2) {
                ptx::ldmatrix_x4(keys, sK + onwards<kD>(transposed, j * 8, 2 * kk));
                ptx::mma_m16n8k16<T>(s[j], q, keys[0], keys[1]);
                ptx::mma_m16n8k16<T>(s[j + 1], q, keys[2], keys[3]);
            }
        }

        const int n = start + step * kKeys + warp * kOwn + lane % 4 * 2;  // this lane's first key
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = -INFINITY;
#pragma unroll
            for (int j = 0; j < kOwn / 8; j++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    const int key = n + 8 * j + e % 2;
                    float v = s[j][e] * scale;
                    if (a.softcap > 0) v = precise_tanh(v) * cap;
                    v -= slope[half] * static_cast<float>(at[half] - key);
                    s[j][e] = key >= first[half] && key < last[half] ? v : -INFINITY;
                    most = fmaxf(most, s[j][e]);
                }
            const float now = fmaxf(top[half], over_row(most, [](float x, float y) { return fmaxf(x, y); }));
            const float used = now == -INFINITY ? 0.0f : now;
            shrink[half] = ptx::exp2(top[half] - used);
            top[half] = now;
            sum[half] *= shrink[half];
#pragma unroll
            for (int j = 0; j < kOwn / 8; j++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[j][e] = ptx::exp2(s[j][e] - used);
                    sum[half] += s[j][e];
                }
        }
#pragma unroll
        for (int j = 0; j < kD / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[j][e] *= shrink[e / 2];

        const T* const sV = arrive(2 * step + 1);
#pragma unroll
        for (int kk = 0; kk < kOwn / 16; kk++) {
            uint32_t p[4], values[4];
#pragma unroll
            for (int e = 0; e < 4; e++) p[e] = pack<T>(s[2 * kk + e / 2][e % 2 * 2], s[2 * kk + e / 2][e % 2 * 2 + 1]);
#pragma unroll
            for (int j = 0; j < kD / 8; j += 2) {
                ptx::ldmatrix_x4_trans(values, sV + onwards<kD>(right, kk * 16, j));
                ptx::mma_m16n8k16<T>(acc[j], p, values[0], values[1]);
                ptx::mma_m16n8k16<T>(acc[j + 1], p, values[2], values[3]);
            }
        }
    }

    // Four results become one. Column c of row r lies at c ^ 8 (r % 8).
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + half * 8;
        const float z = over_row(sum[half], [](float x, float y) { return x + y; });
        if (lane % 4 == 0) {
            sTop[warp][row] = top[half];
            sSum[warp][row] = z;
        }
#pragma unroll
        for (int j = 0; j < kD / 8; j++) {
            const float two[] = {acc[j][2 * half], acc[j][2 * half + 1]};
            store<2>(sO + (warp * kRows + row) * kD + (j ^ row % 8) * 8 + lane % 4 * 2, two);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kD / 4; i += kThreads) {
        const int row = i / (kD / 4), column = i % (kD / 4) * 4, m = first_row + row;
        if (m >= rows || column >= a.Dv) continue;
        const int h = h_kv * group + m % group;
        const int64_t of_row = (int64_t{b} * a.H + h) * a.S_q + m / group;
        float most = -INFINITY;
        for (int w = 0; w < kWarps; w++) most = fmaxf(most, sTop[w][row]);
        float sink = -INFINITY;
        if (a.sinks && a.splits == 1)
            with_dtype(a.sinks_dtype,
                       [&](auto zero) { sink = to_float(static_cast<const decltype(zero)*>(a.sinks)[h]) * kLog2e; });
        const float all = fmaxf(most, sink), used = all == -INFINITY ? 0.0f : all;
        float z = ptx::exp2(sink - used), o[4] = {};
        for (int w = 0; w < kWarps; w++) {
            const float weight = ptx::exp2(sTop[w][row] - used);
            float v[4];
            load<4>(sO + (w * kRows + row) * kD + (column / 8 ^ row % 8) * 8 + column % 8, v);
            z += sSum[w][row] * weight;
#pragma unroll
            for (int e = 0; e < 4; e++) o[e] += v[e] * weight;
        }
        if (a.splits > 1) {
            const int64_t of_share = of_row * a.splits + split;
            if (column == 0) {
                a.tops[of_share] = all;
                a.sums[of_share] = z;
            }
            // what saw no key is not read again
            if (z > 0) store_global<4>(a.parts + of_share * a.Dv + column, o);
        } else {
            const float rescale = z > 0 ? 1.0f / z : 0.0f;
#pragma unroll
            for (int e = 0; e < 4; e++) o[e] *= rescale;
            store<4>(static_cast<T*>(a.o.data) + b * a.o.stride_b + h * a.o.stride_h + m / group * a.o.stride_m + column, o);
            if (column == 0) a.lse[of_row] = z > 0 ? (used + log2f(z)) * kLn2 : -INFINITY;
        }
    }
}

// A warp owns a query row: its shares rescaled to their common maximum and added in order.
template <typename T>
__global__ void __launch_bounds__(kThreads) attention_decode_combine_kernel(const AttentionDecode a) {
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (row >= int64_t{a.B} * a.H * a.S_q) return;
    const int lane = threadIdx.x % 32, h = static_cast<int>(row / a.S_q % a.H);
    const float *tops = a.tops + row * a.splits, *sums = a.sums + row * a.splits;
    const float* const parts = a.parts + row * a.splits * a.Dv;
    float most = -INFINITY;
    for (int split = lane; split < a.splits; split += 32) most = fmaxf(most, tops[split]);
    float biggest[] = {most};
    group_reduce<32>(biggest, [](float x, float y) { return fmaxf(x, y); });
    float sink = -INFINITY;
    if (a.sinks)
        with_dtype(a.sinks_dtype, [&](auto zero) { sink = to_float(static_cast<const decltype(zero)*>(a.sinks)[h]) * kLog2e; });
    const float all = fmaxf(biggest[0], sink), used = all == -INFINITY ? 0.0f : all;
    float z = 0;
    for (int split = lane; split < a.splits; split += 32) z += sums[split] * ptx::exp2(tops[split] - used);
    z = group_sum<32>(z) + ptx::exp2(sink - used);
    const float rescale = z > 0 ? 1.0f / z : 0.0f;
    T* const o = static_cast<T*>(a.o.data) + row / a.S_q / a.H * a.o.stride_b + h * a.o.stride_h + row % a.S_q * a.o.stride_m;
    for (int column = lane * 4; column < a.Dv; column += 128) {
        float sum[4] = {};
#pragma unroll 4
        for (int split = 0; split < a.splits; split++) {
            if (tops[split] == -INFINITY) continue;
            const float weight = ptx::exp2(tops[split] - used);
            float v[4];
            load<4>(parts + int64_t{split} * a.Dv + column, v);
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] += v[e] * weight;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] *= rescale;
        store<4>(o + column, sum);
    }
    if (lane == 0) a.lse[row] = z > 0 ? (used + log2f(z)) * kLn2 : -INFINITY;
}

struct Decode {
    int widest;
    void (*kernel)(AttentionDecode, int);
    int keys;
};

constexpr int kWidths = 4;

// Not measured yet.
template <typename T>
const Decode (&decode_table())[kWidths] {
    static const Decode table[] = {
        {64, attention_decode_fwd_kernel<T, 64, 128>, 128},
        {128, attention_decode_fwd_kernel<T, 128, 64>, 64},
        {192, attention_decode_fwd_kernel<T, 192, 64>, 64},
        {256, attention_decode_fwd_kernel<T, 256, 64>, 64},
    };
    return table;
}

constexpr int kOwnShared = 2 * kWarps * kRows * static_cast<int>(sizeof(float));  // sTop and sSum

int shared_memory() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    return bytes - kOwnShared;
}

template <typename T>
int decode(const AttentionDecode& a, void* stream) {
    int code = cudaSuccess;
    if (a.S_new > 0 && a.H_kv > 0 && a.B > 0 && a.capacity > 0) {
        const int widest = a.D > a.Dv ? a.D : a.Dv;
        const int64_t pieces = int64_t{a.B} * a.H_kv * a.S_new * (widest / 8);
        code = KLAUNCH(attention_decode_append_kernel, dim3(static_cast<unsigned>((pieces + 255) / 256), 2), 256, 0, stream, a);
        if (code != cudaSuccess) return code;
    }
    const int64_t all = int64_t{a.B} * a.H * a.S_q;
    if (all == 0) return cudaSuccess;
    const Decode* row = decode_table<T>();
    while (row->widest < a.D || row->widest < a.Dv) row++;
    const int tile = row->keys * row->widest * static_cast<int>(sizeof(T)), q = kRows * row->widest * static_cast<int>(sizeof(T));
    int slots = (shared_memory() - q) / tile;
    slots = slots < 4 ? slots : 4;
    const int64_t tiles = (int64_t{a.H / a.H_kv} * a.S_q + kRows - 1) / kRows, grid = tiles * a.splits * a.H_kv * a.B;
    if (grid > INT32_MAX || slots < 2) return cudaErrorInvalidConfiguration;
    code = KLAUNCH(row->kernel, static_cast<unsigned>(grid), kThreads, q + slots * tile, stream, a, slots);
    if (code != cudaSuccess || a.splits == 1) return code;
    return KLAUNCH(attention_decode_combine_kernel<T>, static_cast<unsigned>((all + kWarps - 1) / kWarps), kThreads, 0, stream, a);
}

template <typename T>
int prepare() {
    cudaFuncAttributes attributes;
    int code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(attention_decode_append_kernel));
    if (code == cudaSuccess)
        code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(attention_decode_combine_kernel<T>));
    for (const Decode& row : decode_table<T>()) {
        const auto* kernel = reinterpret_cast<const void*>(row.kernel);
        if (code == cudaSuccess) code = cudaFuncGetAttributes(&attributes, kernel);
        if (code == cudaSuccess)
            code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory());
    }
    return code;
}

}  // namespace

extern "C" int attention_decode(const AttentionDecode* call, void* stream) {
    return call->dtype == kFloat16 ? decode<__half>(*call, stream) : decode<__nv_bfloat16>(*call, stream);
}

extern "C" int attention_decode_prepare() {
    const int code = prepare<__half>();
    return code == cudaSuccess ? prepare<__nv_bfloat16>() : code;
}
