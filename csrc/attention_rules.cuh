// What the kernels of attention over whole sequences share: where a head lies, the walk over the other side, the copies of its
// tiles, the rules that turn q.k into a logit, and dropout. Logits are in units of log2.
#pragma once

#include "attention.cuh"

#include "launchers.h"
#include "philox.cuh"

// Where sequence b lies in a dim of `size`, the rows it owns and those that count. Wrong values never point outside.
// Padded sequences own their padding, which the outputs fill; packed ones do not own their neighbours.
struct Sequence {
    int start, owned, length;

    __device__ Sequence(const int32_t* lens, const int32_t* cu, int b, int size) : start(0), owned(size) {
        if (cu) {
            start = clamp(cu[b], 0, size);
            owned = clamp(cu[b + 1], start, size) - start;
        }
        length = lens ? clamp(lens[b], 0, size) : owned;
    }
};

// What the rules say of one batch b and head h.
struct Place {
    int b, h;
    Sequence q, k;
    int shift;

    __device__ Place(const AttentionRules& r, int bh)
        : b(bh / r.H), h(bh % r.H), q(r.q_lens, r.cu_q, b, r.S_q), k(r.kv_lens, r.cu_k, b, r.S_k),
          shift(r.bottom_right ? k.length - q.length : 0) {}
};

// Bounds of a walk over positions x < length for positions t in [first, last) of which those below `owned` count: a pair
// needs t + shift - back <= x <= t + shift + ahead, where they are not negative. In [clean_lo, clean_hi) all pairs of a
// tile are allowed; a range that reaches past `owned` has no such tile.
struct Span {
    int lo, clean_lo, clean_hi, hi;

    template <int kBlock>
    __device__ static Span over(int first, int last, int owned, int length, int shift, int back, int ahead) {
        Span w{0, 0, 0, 0};
        if (first >= owned) return w;
        w.hi = length;
        w.clean_hi = last <= owned ? length / kBlock * kBlock : 0;
        last = min(last, owned);
        if (ahead >= 0) {
            w.hi = min(w.hi, max(last + shift + ahead, 0));
            w.clean_hi = min(w.clean_hi, max(first + shift + ahead + 1, 0) / kBlock * kBlock);
        }
        if (back >= 0) {
            w.lo = max(first + shift - back, 0) / kBlock * kBlock;
            w.clean_lo = min(round_up(max(last - 1 + shift - back, 0), kBlock), w.hi);
        }
        return w;
    }

    __device__ bool clean(int x) const { return x >= clean_lo && x < clean_hi; }
};

template <typename T>
__device__ T* head(const HeadRows& rows, int b, int h, int start) {
    return static_cast<T*>(rows.data) + b * rows.stride_b + h * rows.stride_h + start * rows.stride_m;
}

__device__ inline float* head(const HeadStats& stats, int b, int h, int start) {
    return stats.data + b * stats.stride_b + h * stats.stride_h + start;
}

// Rows first .. first + kRows of a head on their way to shared memory; zeros from row `end` and from column `width` on. Eight
// threads fetch 128 bytes of a row, so that a thread's place in its row is the same in all of its rows.
template <int kRows, int kD, int kThreads, typename T>
__device__ void copy_rows(T* to, const T* from, int64_t stride, int first, int end, int width) {
    constexpr int kAtOnce = kThreads / 8;
    static_assert(kRows % kAtOnce == 0 && kAtOnce % 8 == 0 && kD % 64 == 0);
    const int row = first + threadIdx.x / 8, column = threadIdx.x % 8 * 8;
    to += swizzled<kD>(threadIdx.x / 8, threadIdx.x % 8);
    from += row * stride + column;
#pragma unroll
    for (int i = 0; i < kRows; i += kAtOnce) {
#pragma unroll
        for (int d = 0; d < kD; d += 64)
            ptx::cp_async_16_or_zeros(to + i * kD + d, from + d, row + i < end && column + d < width ? 16 : 0);
        from += kAtOnce * stride;
    }
}

// Two neighbouring 16 x 8 tiles of a fragment as the left operand of a product that sums over their columns.
template <typename T>
__device__ void as_left_operand(uint32_t (&to)[4], const float (&first)[4], const float (&second)[4]) {
    to[0] = pack<T>(first[0], first[1]);
    to[1] = pack<T>(first[2], first[3]);
    to[2] = pack<T>(second[0], second[1]);
    to[3] = pack<T>(second[2], second[3]);
}

// As mma takes its left operand: 16 rows from `row`, 16 columns from piece `piece`.
template <int kD, typename T>
__device__ void left_operand(uint32_t (&to)[4], const T* from, int row, int piece) {
    ptx::ldmatrix_x4(to, from + onwards<kD>(left_lane<kD>(), row, piece));
}

// Two right operands, columns `row` .. + 8 and the next 8, from rows that are those columns: a product with the transposed.
template <int kD, typename T>
__device__ void right_operands_of_rows(uint32_t (&to)[4], const T* from, int row, int piece) {
    ptx::ldmatrix_x4(to, from + onwards<kD>(transposed_lane<kD>(), row, piece));
}

// Two right operands, 8 columns from piece `piece` and the next 8, of the 16 rows from `row`.
template <int kD, typename T>
__device__ void right_operands(uint32_t (&to)[4], const T* from, int row, int piece) {
    ptx::ldmatrix_x4_trans(to, from + onwards<kD>(right_lane<kD>(), row, piece));
}

// visit(element, j, e, query, key) for a fragment from query m and key n on, this lane's first; kTransposed: its rows are
// keys and its columns queries.
template <bool kTransposed, int kCount, typename Visit>
__device__ void each(float (&s)[kCount][4], int m, int n, Visit visit) {
#pragma unroll
    for (int j = 0; j < kCount; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = e / 2 * 8, column = 8 * j + e % 2;
            visit(s[j][e], j, e, m + (kTransposed ? column : row), n + (kTransposed ? row : column));
        }
}

// q.k to logits, but for lengths and the band; visits slope(j, e) = d logit / d (scale * q.k) where there is a softcap. Tiles
// that are not clean may reach outside the planes.
template <bool kTransposed, int kCount, typename Slope>
__device__ void to_logits(float (&s)[kCount][4], const AttentionRules& r, const Place& at, int m, int n, bool clean,
                          Slope slope_at) {
    const float scale = r.softcap > 0 ? r.scale / r.softcap : r.scale * kLog2e;
    each<kTransposed>(s, m, n, [&](float& v, int, int, int, int) { v *= scale; });
    if (r.softcap > 0) {
        const float cap = r.softcap * kLog2e;
        each<kTransposed>(s, m, n, [&](float& v, int j, int e, int, int) {
            const float t = precise_tanh(v);
            slope_at(j, e, 1.0f - t * t);
            v = t * cap;
        });
    }
    const auto inside = [&](int query, int key) { return clean || (query < at.q.length && key < at.k.length); };
    if (r.bias.data)
        with_dtype(r.bias.dtype, [&](auto zero) {
            using B = decltype(zero);
            const B* bias = static_cast<const B*>(r.bias.data) + at.b * r.bias.stride_b + at.h * r.bias.stride_h;
            each<kTransposed>(s, m, n, [&](float& v, int, int, int query, int key) {
                if (!inside(query, key)) return;
                const float b = to_float(bias[query * r.bias.stride_m + key * r.bias.stride_n]);
                // only a true -inf excludes: the lowest finite number times log2(e) must not become one
                v += b == -INFINITY ? b : fmaxf(b * kLog2e, -kFloatMax);
            });
        });
    if (r.slopes) {
        const float slope = r.slopes[at.b * r.slopes_stride_b + at.h * r.slopes_stride_h] * kLog2e;
        each<kTransposed>(s, m, n, [&](float& v, int, int, int query, int key) {
            v -= slope * fabsf(static_cast<float>(query + at.shift - key));
        });
    }
    if (r.mask.data) {
        const auto* mask = static_cast<const uint8_t*>(r.mask.data) + at.b * r.mask.stride_b + at.h * r.mask.stride_h;
        each<kTransposed>(s, m, n, [&](float& v, int, int, int query, int key) {
            if (inside(query, key) && !mask[query * r.mask.stride_m + key * r.mask.stride_n]) v = -INFINITY;
        });
    }
}

// Excludes what lies outside the sequences or the band: of row x, `row` or row + 8, what Span::over excludes of position x.
template <int kCount>
__device__ void exclude(float (&s)[kCount][4], int row, int column, int rows, int columns, int shift, int back, int ahead) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int x = row + half * 8;
        const int first = back < 0 ? 0 : x + shift - back;
        int end = ahead < 0 ? columns : min(columns, x + shift + ahead + 1);
        if (x >= rows) end = first;
#pragma unroll
        for (int j = 0; j < kCount; j++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                const int y = column + 8 * j + e % 2;
                if (y < first || y >= end) s[j][e] = -INFINITY;
            }
    }
}

template <bool kTransposed, int kCount>
__device__ void exclude(float (&s)[kCount][4], const AttentionRules& r, const Place& at, int m, int n) {
    if (kTransposed)
        exclude(s, n, m, at.k.length, at.q.length, -at.shift, r.right, r.left);
    else
        exclude(s, m, n, at.q.length, at.k.length, at.shift, r.left, r.right);
}

// Bit 4 j + e: whether reference.dropout_mask keeps element (j, e) of a fragment of kColumns <= 64 columns. One draw a lane
// serves two of its j.
template <bool kTransposed, int kColumns>
__device__ uint32_t kept(const AttentionRules& r, const Place& at, int m, int n) {
    static_assert(kColumns % 16 == 0 && kColumns <= 64);
    const RowDropoutKey key = row_dropout_key(r.dropout);
    uint32_t bits = 0;
#pragma unroll
    for (int square = 0; square < kColumns / 16; square++) {
        const uint32_t row_group = (m / 16 + (kTransposed ? square : 0)) * 4 + m % 8 / 2;
        const uint32_t key_group = (n / 16 + (kTransposed ? 0 : square)) * 4 + n % 8 / 2;
        const auto [words] = philox4x32_7(key.key, static_cast<uint32_t>(at.b * r.H + at.h), row_group, key_group, key.offset);
        // word 2 (query & 1) + (key & 1), byte 2 (query bit 3) + (key bit 3); a lane's columns differ in e % 2
        const uint32_t even = kTransposed ? (n & 1 ? words[1] : words[0]) : (m & 1 ? words[2] : words[0]);
        const uint32_t odd = kTransposed ? (n & 1 ? words[3] : words[2]) : (m & 1 ? words[3] : words[1]);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int byte = kTransposed ? 2 * j + e / 2 : 2 * (e / 2) + j;
                const uint32_t draw = (e % 2 ? odd : even) >> 8 * byte & 0xff;
                if (draw >= key.threshold) bits |= 1u << (4 * (2 * square + j) + e);
            }
    }
    return bits;
}

// A warp's 16 rows from row m of a head: through `staging`, which no other warp touches, to 16-byte stores.
template <int kD, typename T>
__device__ void store_rows(const Fragment<kD>& rows, T* staging, T* to, int64_t stride, int m, int end, int width) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kD / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            T* at = staging + swizzled<kD>(lane / 4 + half * 8, j) + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(at) = pack<T>(rows[j][2 * half], rows[j][2 * half + 1]);
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * kD / 8 / 32; i++) {
        const int row = (i * 32 + lane) / (kD / 8), piece = (i * 32 + lane) % (kD / 8);
        if (m + row >= end || piece * 8 >= width) continue;
        const T* at = staging + swizzled<kD>(row, piece);
        READS(at, 16);
        __stwb(reinterpret_cast<uint4*>(to + (m + row) * stride + piece * 8), *reinterpret_cast<const uint4*>(at));
    }
}

// Whether a call's rules are more than a positive scale, lengths and a band.
inline bool is_rich(const AttentionRules& r) {
    return r.bias.data || r.mask.data || r.slopes || r.dropout.seed || r.softcap > 0 || !(r.scale > 0);
}

template <typename Body>
int with_half(int dtype, Body body) {
    return dtype == kFloat16 ? body(__half{}) : body(__nv_bfloat16{});
}

// Onto the current device, with as much dynamic shared memory as a launch asks for.
template <typename Kernel>
int load_kernel(Kernel* kernel, int shared) {
    cudaFuncAttributes attributes;
    const auto* pointer = reinterpret_cast<const void*>(kernel);
    const int code = cudaFuncGetAttributes(&attributes, pointer);
    return code ? code : cudaFuncSetAttribute(pointer, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
}
