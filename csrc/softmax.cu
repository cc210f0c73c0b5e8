// Softmax, log-softmax and the scaled, masked softmax of one dim, forward and backward:
//   y = exp(s - m) / denom,  m = max(s), denom = sum(exp(s - m))       dx = scale * y * (dy - sum(dy * y))
//   y = s - m - log(denom)                                             dx = dy - exp(y) * sum(dy)
// s = scale * x where attended, else -inf.
//
// The dim is N; the others merge into (A, B, M) by the strides of all tensors together. Where N is contiguous, up to a
// warp owns a row of up to 3072 columns (1024 in backward) and a block a longer one, in registers up to 8192 (4096).
// Longer rows are walked in chunks, twice: the second time backwards, from the chunk that is still in registers (15360
// columns of 16 bits) and then from the L2. Rows move in 16-byte vectors even where they start between two of them, as
// rows of an odd N do: each lane also has at most one of the up to 14 elements before the first and after the last
// whole vector. Where N is not contiguous, M is the dim along which memory is: a thread owns the columns of one vector
// along M, neighbouring threads neighbouring vectors, and other threads of its block other n, so that every access
// still covers whole sectors. Anything else (x or dy strided along N, tensors that disagree in alignment, casts between
// 16-bit dtypes) goes one element at a time through the same code.
//
// Bytes: forward reads x once and writes y once, backward reads dy and y and writes dx; of long rows what is not in
// registers is read again, from the L2. Forward has about 13 instructions and one exp2 for 4 bytes of 16-bit tensors,
// half of what an H200 issues while its memory moves them, and two exp2 in rows that are walked twice: memory bounds
// it. Predicted are 93 % of a copy's rate for N from 256 to 15360, less where a shorter row leaves lanes idle and where
// a longer one asks the L2 for up to half as much again. Nothing has run on a GPU yet.
// All arithmetic is fp32 but for the sums behind fp32 results, which are fp64; sums have a fixed order.
// Online maximum and sum: Milakov and Gimelshein, arXiv 1805.02867.

#include "rt.cuh"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "launchers.h"
#include "ptx.cuh"

namespace {

constexpr float kLog2e = 1.4426950408889634f;

// The element type of kernels that find the dtypes of their tensors at run time, one element at a time.
struct Any {};

__device__ float load_any(const void* from, int dtype, int64_t at) {
    if (dtype == kFloat32) return static_cast<const float*>(from)[at];
    if (dtype == kFloat16) return to_float(static_cast<const __half*>(from)[at]);
    return to_float(static_cast<const __nv_bfloat16*>(from)[at]);
}

__device__ void store_any(void* to, int dtype, int64_t at, float v) {
    if (dtype == kFloat32)
        static_cast<float*>(to)[at] = v;
    else if (dtype == kFloat16)
        static_cast<__half*>(to)[at] = from_float<__half>(v);
    else
        static_cast<__nv_bfloat16*>(to)[at] = from_float<__nv_bfloat16>(v);
}

// v as it is after rounding to a dtype.
__device__ float rounded(float v, int dtype) {
    if (dtype == kFloat16) return to_float(from_float<__half>(v));
    if (dtype == kBFloat16) return to_float(from_float<__nv_bfloat16>(v));
    return v;
}

// One of the elements of T in a word of memory.
__device__ float element(float, uint32_t word, int) { return __uint_as_float(word); }
__device__ float element(__nv_bfloat16, uint32_t word, int half) {
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}
__device__ float element(__half, uint32_t word, int half) {
    return to_float(__ushort_as_half(static_cast<uint16_t>(half ? word >> 16 : word)));
}

// kVec neighbours as they were loaded: words, since 16-bit elements would take a register each; or fp32 where T is Any.
template <typename T, int kVec>
struct Loaded {
    static constexpr int kWords = kVec * sizeof(T) / 4;
    Vec<uint32_t, kWords> words;

    __device__ void fetch(const void* from, int, int64_t at) {
        words = load_raw<kWords>(reinterpret_cast<const uint32_t*>(static_cast<const T*>(from) + at));
    }
    __device__ float operator[](int j) const {
        constexpr int kInWord = 4 / sizeof(T);
        return element(T(), words.at[j / kInWord], j % kInWord);
    }
};
template <>
struct Loaded<Any, 1> {
    float v;
    __device__ void fetch(const void* from, int dtype, int64_t at) { v = load_any(from, dtype, at); }
    __device__ float operator[](int) const { return v; }
};

// Stores kVec fp32 values to a tensor of `dtype`: T, or what a kernel for T finds under autocast, fp32 in forward
// (kWiden), a 16-bit dtype for T = float in backward.
template <typename T, int kVec, bool kWiden>
__device__ void put(void* to, int dtype, int64_t at, const float (&v)[kVec]) {
    if constexpr (std::is_same_v<T, Any>)
        store_any(to, dtype, at, v[0]);
    else if (kWiden && dtype == kFloat32)
        store_global<kVec>(static_cast<float*>(to) + at, v);
    else if (!kWiden && std::is_same_v<T, float> && dtype == kFloat16)
        store_global<kVec>(static_cast<__half*>(to) + at, v);
    else if (!kWiden && std::is_same_v<T, float> && dtype == kBFloat16)
        store_global<kVec>(static_cast<__nv_bfloat16*>(to) + at, v);
    else
        store_global<kVec>(static_cast<T*>(to) + at, v);
}

// Bit j: whether byte j is not 0.
template <int kVec>
__device__ uint32_t nonzero(const uint8_t* bytes) {
    if constexpr (kVec == 1) {
        return *bytes != 0;
    } else {
        const auto words = load_raw<kVec / 4>(reinterpret_cast<const uint32_t*>(bytes));
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kVec / 4; i++) {
            const uint32_t w = words.at[i], tops = (((w & 0x7f7f7f7fu) + 0x7f7f7f7fu) | w) & 0x80808080u;
            bits |= (tops * 0x00204081u >> 28) << 4 * i;  // brings bits 7, 15, 23, 31 to 28 .. 31
        }
        return bits;
    }
}

// e^v: to 1 unit in the last place of fp32, or in two instructions to 2 units and |v| halves of one.
template <bool kExact>
__device__ float exponential(float v) {
    return kExact ? expf(v) : ptx::exp2(v * kLog2e);
}

// e / denom, where reciprocal is 1 / denom.
template <bool kExact>
__device__ float quotient(float e, float denom, float reciprocal) {
    const float q = e * reciprocal;
    return kExact ? fmaf(fmaf(-q, denom, e), reciprocal, q) : q;
}

__device__ float finite(float m) { return m == -INFINITY ? 0.0f : m; }

// total: the sum of dy * y, or of dy for the logarithm.
template <typename T>
__device__ float score_gradient(float dy, float y, float total, float scale, bool log) {
    return log ? fmaf(-exponential<sizeof(T) != 2>(y), total, dy) : scale * y * (dy - total);
}

// Sums over a row. fp32 ones would add a rounding at every step, which is most of the error of an fp32 result.
template <bool kExact>
using Sum = std::conditional_t<kExact, double, float>;

struct Plus {
    template <typename V>
    __device__ V operator()(V a, V b) const {
        return a + b;
    }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Forward {
    const void *x, *mask;
    void* y;
    SoftmaxStrides stride_x, stride_mask, stride_y;
    SoftmaxSizes sizes;
    int x_dtype, y_dtype, lanes_log2;
    float scale;
    bool log, masked, causal;
};

struct Backward {
    const void *dy, *y;
    void* dx;
    SoftmaxStrides stride_dy, stride_y;
    SoftmaxSizes sizes;
    int dy_dtype, y_dtype, dx_dtype, lanes_log2;
    float scale;
    bool log, causal;
};

// A row by its indices.
struct Place {
    int64_t a, b, m;

    __device__ Place(int64_t row, const SoftmaxSizes& sizes) : a(0), b(0), m(row) {
        if (sizes.A * sizes.B == 1) return;
        if (sizes.A * sizes.B * sizes.M <= INT32_MAX) {  // a 64-bit division takes about a hundred instructions
            const auto r = static_cast<uint32_t>(row), M = static_cast<uint32_t>(sizes.M);
            const auto outer = r / M, B = static_cast<uint32_t>(sizes.B);
            m = r - outer * M, a = outer / B, b = outer - static_cast<uint32_t>(a) * B;
        } else {
            m = row % sizes.M, a = row / sizes.M / sizes.B, b = row / sizes.M % sizes.B;
        }
    }
    __device__ int64_t offset(const SoftmaxStrides& stride) const { return a * stride.a + b * stride.b + m * stride.m; }
};

// The columns of one row of N that one of `lanes` threads sees: kHeld vectors of every chunk, and one element of the
// edges before the first and after the last whole vector.
template <typename T, int kVec, int kHeld>
struct Columns {
    int lane, lanes, head;
    int64_t N, vectors, edge;  // edge: a column, N for none

    // The row starts `at` elements behind `tensor`.
    __device__ Columns(int lane, int lanes, int64_t N, const void* tensor, int64_t at)
        : lane(lane), lanes(lanes), head(0), N(N), vectors(N), edge(N) {
        if constexpr (kVec > 1) {
            const int64_t start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor) / sizeof(T)) + at;
            head = min(N, -start & (kVec - 1));
            vectors = (N - head) / kVec;
            if (lane < head)
                edge = lane;
            else
                edge = min(N, head + vectors * kVec + (lane - head));
        }
    }
    // Chunks with a column below `end`.
    __device__ int64_t chunks(int64_t end) const {
        const int64_t span = int64_t{lanes} * kHeld * kVec;
        return (max(int64_t{0}, min(end - head, vectors * kVec)) + span - 1) / span;
    }
    // This thread's first column of a chunk; its vector i starts i * step() further.
    __device__ int64_t first(int64_t chunk) const { return head + (chunk * kHeld * lanes + lane) * kVec; }
    __device__ int step() const { return lanes * kVec; }
    // How many columns from `first` on are below `end`: i * step() is compared with it.
    __device__ int below(int64_t end, int64_t first) const {
        const int64_t most = min(end, head + vectors * kVec) - first;
        return static_cast<int>(max(int64_t{0}, min(most, int64_t{INT32_MAX})));
    }
};

constexpr int kUpToWarp = 1;     // as kThreads: a power of two up to 32 threads a row, known at run time
constexpr int kWarpBlock = 128;  // threads of a block whose rows have at most a warp each
constexpr int kLong = 384;       // threads a row that is read in chunks, so many that two blocks still fit on an SM
constexpr int kKept = kLong * 5 * 16;      // bytes of such a row that its block keeps
constexpr int kKeptTwice = kLong * 3 * 16;  // of two tensors, in backward

// Folds v over the threads of a row.
template <int kThreads, typename V, typename Op>
__device__ V reduce(V v, int lanes, Op op) {
    if constexpr (kThreads == kUpToWarp) {
        for (int step = lanes / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, step));
        return v;
    } else {
        V one[] = {v};
        group_reduce<kThreads>(one, op);
        return one[0];
    }
}

// Where a thread stands: its row, and its lane among the threads of that row.
template <int kThreads>
struct Where {
    int lane, lanes;
    int64_t row;

    __device__ explicit Where(int lanes_log2) {
        if constexpr (kThreads == kUpToWarp) {
            lanes = 1 << lanes_log2, lane = threadIdx.x & (lanes - 1);
            row = int64_t{blockIdx.x} * (kWarpBlock >> lanes_log2) + (threadIdx.x >> lanes_log2);
        } else {
            constexpr int kRows = kThreads > 32 ? 1 : kWarpBlock / 32;
            lanes = kThreads, lane = threadIdx.x % kThreads, row = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads;
        }
    }
};

template <typename T, int kVec, int kThreads, int kHeld, bool kLooped, bool kLog, bool kExact>
__global__ void __launch_bounds__(kThreads > 32 ? kThreads : kWarpBlock, kThreads == kLong ? 2 : 1)
    softmax_fwd_kernel(const Forward p) {
    const Where<kThreads> where(p.lanes_log2);
    const auto along = [](const SoftmaxStrides& stride) { return kVec > 1 ? 1 : stride.n; };
    const bool inside = where.row < p.sizes.A * p.sizes.B * p.sizes.M;  // other lanes of the warp may be
    const Place place(inside ? where.row : 0, p.sizes);
    const int64_t at_x = place.offset(p.stride_x), at_y = place.offset(p.stride_y);
    const auto* mask = kLog ? nullptr : static_cast<const uint8_t*>(p.mask);
    if (mask) mask += place.offset(p.stride_mask);

    const int64_t N = inside ? p.sizes.N : 0;
    int64_t limit = !kLog && p.causal ? min(N, place.m + 1) : N;
    if (mask && p.stride_mask.n == 0) {
        if (inside && !*mask) limit = 0;
        mask = nullptr;
    }
    const Columns<T, kVec, kHeld> columns(where.lane, where.lanes, N, p.x, at_x);
    const int step = columns.step();

    const auto score = [&](float v) {
        if (std::is_same_v<T, Any> && p.y_dtype != p.x_dtype) v = rounded(v, p.y_dtype);
        return kLog ? v : v * p.scale;
    };
    Loaded<T, kVec> x[kHeld];
    uint32_t keep[(kHeld * kVec + 31) / 32];  // a bit for every element that is attended
    const bool select = !kLog && (mask || (kVec > 1 && p.causal));
    const auto fetch = [&](int64_t first, int left) {
        if (select) {
#pragma unroll
            for (uint32_t& bits : keep) bits = 0;
#pragma unroll
            for (int i = 0; i < kHeld; i++)
                if (i * step < left) {
                    auto bits = mask ? nonzero<kVec>(mask + (first + i * step) * along(p.stride_mask)) : ~0u;
                    bits &= (1u << min(kVec, left - i * step)) - 1;
                    keep[i * kVec / 32] |= bits << i * kVec % 32;
                }
        }
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < left) x[i].fetch(p.x, p.x_dtype, at_x + (first + i * step) * along(p.stride_x));
    };
    const auto scores = [&](int i, float(&s)[kVec]) {
#pragma unroll
        for (int j = 0; j < kVec; j++) s[j] = score(x[i][j]);
        if (select)
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                const int bit = i * kVec + j;
                s[j] = keep[bit / 32] >> bit % 32 & 1 ? s[j] : -INFINITY;
            }
    };
    // What a vector has come to: s, and later exp(s - m). Long rows keep x as it was loaded, in half the registers and
    // for the price of a second exp, and so have more columns that are read only once.
    float r[kLooped ? 1 : kHeld][kVec];

    float m = -INFINITY, edge = -INFINITY;
    Sum<kExact> part = 0;  // of denom, this thread's, relative to the row's m so far
    if constexpr (kVec > 1)
        if (columns.edge < limit && !(mask && !mask[columns.edge]))
            edge = score(to_float(static_cast<const T*>(p.x)[at_x + columns.edge]));
    const int64_t held = max(int64_t{0}, columns.chunks(limit) - 1);
    for (int64_t chunk = 0; chunk <= held; chunk++) {
        const int64_t first = columns.first(chunk);
        const int left = columns.below(limit, first);
        fetch(first, left);
        float top = chunk == 0 ? edge : m;
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < left) {
                float(&s)[kVec] = r[kLooped ? 0 : i];
                scores(i, s);
#pragma unroll
                for (int j = 0; j < kVec; j++) top = fmaxf(top, s[j]);
            }
        top = reduce<kThreads>(top, where.lanes, Max());
        const float base = finite(top);
        part = chunk == 0 ? exponential<kExact>(edge - base) : part * exponential<kExact>(m - base);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < left) {
                float(&s)[kVec] = r[kLooped ? 0 : i];
                if (kLooped) scores(i, s);
                float sum = 0;
#pragma unroll
                for (int j = 0; j < kVec; j++) {
                    const float e = exponential<kExact>(s[j] - base);
                    sum += e;
                    if (!kLog) s[j] = e;
                }
                part += sum;
            }
        m = top;
        if (!kLooped) break;
    }

    const float base = finite(m);
    auto denom = static_cast<float>(reduce<kThreads>(part, where.lanes, Plus()));
    if (!kLog && p.masked && denom == 0) denom = 1;
    const float last = kLog ? logf(denom) : 1.0f / denom;
    // From s for the logarithm, else from exp(s - m).
    const auto result = [&](float v) { return kLog ? v - base - last : quotient<kExact>(v, denom, last); };
    if constexpr (kVec > 1)
        if (columns.edge < N) {
            const float v = kLog ? edge : exponential<kExact>(edge - base);
            const float out[] = {columns.edge < limit ? result(v) : 0.0f};
            put<T, 1, true>(p.y, p.y_dtype, at_y + columns.edge, out);
        }
    for (int64_t chunk = kLooped ? columns.chunks(N) - 1 : 0; chunk >= 0; chunk--) {
        const int64_t first = columns.first(chunk);
        const int left = columns.below(limit, first), rest = columns.below(N, first);
        if (kLooped && chunk < held) fetch(first, left);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < rest) {
                float out[kVec] = {};
                if (i * step < left) {
                    float(&s)[kVec] = r[kLooped ? 0 : i];
                    if (kLooped) scores(i, s);
#pragma unroll
                    for (int j = 0; j < kVec; j++)
                        out[j] = result(kLooped && !kLog ? exponential<kExact>(s[j] - base) : s[j]);
                }
                put<T, kVec, true>(p.y, p.y_dtype, at_y + (first + i * step) * along(p.stride_y), out);
            }
    }
}

template <typename T, int kVec, int kThreads, int kHeld, bool kLooped>
__global__ void __launch_bounds__(kThreads > 32 ? kThreads : kWarpBlock, kThreads == kLong ? 2 : 1)
    softmax_bwd_kernel(const Backward p) {
    const Where<kThreads> where(p.lanes_log2);
    const auto along = [](const SoftmaxStrides& stride) { return kVec > 1 ? 1 : stride.n; };
    const bool inside = where.row < p.sizes.A * p.sizes.B * p.sizes.M;
    const Place place(inside ? where.row : 0, p.sizes);
    const int64_t at_dy = place.offset(p.stride_dy), at_y = place.offset(p.stride_y);
    const int64_t N = inside ? p.sizes.N : 0, limit = p.causal ? min(N, place.m + 1) : N;
    const Columns<T, kVec, kHeld> columns(where.lane, where.lanes, N, p.y, at_y);
    const int step = columns.step();

    Loaded<T, kVec> dy[kHeld], y[kHeld];
    const auto fetch = [&](int64_t first, int left) {
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < left) {
                dy[i].fetch(p.dy, p.dy_dtype, at_dy + (first + i * step) * along(p.stride_dy));
                y[i].fetch(p.y, p.y_dtype, at_y + (first + i * step) * along(p.stride_y));
            }
    };
    const auto attended = [&](int i, int j, int left) { return kVec == 1 || !p.causal || i * step + j < left; };

    float edge_dy = 0, edge_y = 0;
    Sum<sizeof(T) != 2> part = 0;
    if constexpr (kVec > 1)
        if (columns.edge < limit) {
            edge_dy = to_float(static_cast<const T*>(p.dy)[at_dy + columns.edge]);
            edge_y = to_float(static_cast<const T*>(p.y)[at_y + columns.edge]);
            part = edge_dy * (p.log ? 1.0f : edge_y);
        }
    const int64_t held = columns.chunks(limit) - 1;
    for (int64_t chunk = 0; chunk <= held; chunk++) {
        const int64_t first = columns.first(chunk);
        const int left = columns.below(limit, first);
        fetch(first, left);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < left) {
                float sum = 0;
#pragma unroll
                for (int j = 0; j < kVec; j++)
                    if (attended(i, j, left)) sum = fmaf(dy[i][j], p.log ? 1.0f : y[i][j], sum);
                part += sum;
            }
        if (!kLooped) break;
    }
    const auto total = static_cast<float>(reduce<kThreads>(part, where.lanes, Plus()));

    const auto gradient = [&](float dy, float y) { return score_gradient<T>(dy, y, total, p.scale, p.log); };
    if constexpr (kVec > 1)
        if (columns.edge < N) {
            const float out[] = {columns.edge < limit ? gradient(edge_dy, edge_y) : 0.0f};
            put<T, 1, false>(p.dx, p.dx_dtype, at_y + columns.edge, out);
        }
    for (int64_t chunk = columns.chunks(N) - 1; chunk >= 0; chunk--) {
        const int64_t first = columns.first(chunk);
        const int left = columns.below(limit, first), rest = columns.below(N, first);
        if (kLooped && chunk < held) fetch(first, left);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * step < rest) {
                float out[kVec];
#pragma unroll
                for (int j = 0; j < kVec; j++)
                    out[j] = i * step < left && attended(i, j, left) ? gradient(dy[i][j], y[i][j]) : 0.0f;
                put<T, kVec, false>(p.dx, p.dx_dtype, at_y + (first + i * step) * along(p.stride_y), out);
            }
        if (!kLooped) break;
    }
}

// A block whose dim N is not the contiguous one: thread (way, lane) has the columns column .. column + kVec - 1 along M
// and of them the rows n = way, way + ways, ...
constexpr int kAcrossThreads = 256;

template <int kVec>
struct Across {
    int lane, lanes, way, ways;
    int64_t column;
    Place place;

    __device__ Across(int lanes_log2, const SoftmaxSizes& sizes)
        : lane(threadIdx.x & ((1 << lanes_log2) - 1)), lanes(1 << lanes_log2), way(threadIdx.x >> lanes_log2),
          ways(blockDim.x >> lanes_log2), place(0, sizes) {
        const int64_t blocks = (sizes.M + lanes * kVec - 1) / (lanes * kVec), outer = blockIdx.x / blocks;
        column = ((blockIdx.x - outer * blocks) * lanes + lane) * kVec;
        place.a = outer / sizes.B, place.b = outer % sizes.B, place.m = column;
    }
    // Folds v over all ways. Every Op has an sPart of its own, so that nobody waits for the readers of another one's; a
    // kernel may fold once with each.
    template <typename Op>
    __device__ void reduce(float (&v)[kVec], Op op) const {
        for (int step = lanes; step < 32; step *= 2)
#pragma unroll
            for (int j = 0; j < kVec; j++) v[j] = op(v[j], __shfl_xor_sync(0xffffffffu, v[j], step));
        const int warps = min(static_cast<int>(blockDim.x) / 32, ways);  // that share columns, in every one of `width`
        if (warps < 2) return;
        SMEM_ARRAY(float, sPart, [kAcrossThreads * kVec]);
        const int warp = threadIdx.x / max(32, lanes);
        if (lanes >= 32 || threadIdx.x % 32 < lanes)
#pragma unroll
            for (int j = 0; j < kVec; j++) sPart[(warp * kVec + j) * lanes + lane] = v[j];
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kVec; j++) v[j] = sPart[j * lanes + lane];
        for (int w = 1; w < warps; w++)
#pragma unroll
            for (int j = 0; j < kVec; j++) v[j] = op(v[j], sPart[(w * kVec + j) * lanes + lane]);
    }
};

template <typename T, int kVec, int kHeld, bool kLog, bool kExact>
__global__ void __launch_bounds__(kAcrossThreads, 2) softmax_fwd_across_kernel(const Forward p) {
    const Across<kVec> across(p.lanes_log2, p.sizes);
    const int64_t at_x = across.place.offset(p.stride_x), at_y = across.place.offset(p.stride_y);
    const int64_t N = across.column < p.sizes.M ? p.sizes.N : 0, span = int64_t{across.ways} * kHeld;
    const int64_t held = (N + span - 1) / span - 1;

    float r[kHeld][kVec];
    const auto fetch = [&](int64_t n) {
        Loaded<T, kVec> x[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (n + i * across.ways < N) x[i].fetch(p.x, p.x_dtype, at_x + (n + i * across.ways) * p.stride_x.n);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                float v = n + i * across.ways < N ? x[i][j] : -INFINITY;
                if (std::is_same_v<T, Any> && p.y_dtype != p.x_dtype) v = rounded(v, p.y_dtype);
                r[i][j] = v;
            }
    };

    float m[kVec], denom[kVec], all[kVec];
#pragma unroll
    for (int j = 0; j < kVec; j++) m[j] = -INFINITY, denom[j] = 0;
    for (int64_t chunk = 0; chunk <= held; chunk++) {
        fetch(chunk * span + across.way);
#pragma unroll
        for (int j = 0; j < kVec; j++) {
            float top = m[j], sum = 0;
#pragma unroll
            for (int i = 0; i < kHeld; i++) top = fmaxf(top, r[i][j]);
            const float base = finite(top);
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const float e = exponential<kExact>(r[i][j] - base);
                sum += e;
                if (!kLog) r[i][j] = e;
            }
            denom[j] = denom[j] * exponential<kExact>(m[j] - base) + sum;
            m[j] = top;
        }
    }

#pragma unroll
    for (int j = 0; j < kVec; j++) all[j] = m[j];
    across.reduce(all, Max());
#pragma unroll
    for (int j = 0; j < kVec; j++) denom[j] *= exponential<kExact>(m[j] - finite(all[j]));
    across.reduce(denom, Plus());

    float last[kVec];
#pragma unroll
    for (int j = 0; j < kVec; j++) {
        const float rescale = exponential<kExact>(m[j] - finite(all[j]));
        last[j] = kLog ? logf(denom[j]) : 1.0f / denom[j];
        if (!kLog)
#pragma unroll
            for (int i = 0; i < kHeld; i++) r[i][j] *= rescale;
    }
    for (int64_t chunk = held; chunk >= 0; chunk--) {
        const int64_t n = chunk * span + across.way;
        if (chunk < held) {
            fetch(n);
            if (!kLog)
#pragma unroll
                for (int i = 0; i < kHeld; i++)
#pragma unroll
                    for (int j = 0; j < kVec; j++) r[i][j] = exponential<kExact>(r[i][j] - finite(all[j]));
        }
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (n + i * across.ways < N) {
                float out[kVec];
#pragma unroll
                for (int j = 0; j < kVec; j++)
                    out[j] = kLog ? r[i][j] - finite(all[j]) - last[j] : quotient<kExact>(r[i][j], denom[j], last[j]);
                put<T, kVec, true>(p.y, p.y_dtype, at_y + (n + i * across.ways) * p.stride_y.n, out);
            }
    }
}

template <typename T, int kVec, int kHeld>
__global__ void __launch_bounds__(kAcrossThreads, 2) softmax_bwd_across_kernel(const Backward p) {
    const Across<kVec> across(p.lanes_log2, p.sizes);
    const int64_t at_dy = across.place.offset(p.stride_dy), at_y = across.place.offset(p.stride_y);
    const int64_t N = across.column < p.sizes.M ? p.sizes.N : 0, span = int64_t{across.ways} * kHeld;
    const int64_t held = (N + span - 1) / span - 1;

    Loaded<T, kVec> dy[kHeld], y[kHeld];
    const auto fetch = [&](int64_t n) {
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (n + i * across.ways < N) {
                dy[i].fetch(p.dy, p.dy_dtype, at_dy + (n + i * across.ways) * p.stride_dy.n);
                y[i].fetch(p.y, p.y_dtype, at_y + (n + i * across.ways) * p.stride_y.n);
            }
    };

    float total[kVec] = {};
    for (int64_t chunk = 0; chunk <= held; chunk++) {
        const int64_t n = chunk * span + across.way;
        fetch(n);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (n + i * across.ways < N)
#pragma unroll
                for (int j = 0; j < kVec; j++) total[j] = fmaf(dy[i][j], p.log ? 1.0f : y[i][j], total[j]);
    }
    across.reduce(total, Plus());

    for (int64_t chunk = held; chunk >= 0; chunk--) {
        const int64_t n = chunk * span + across.way;
        if (chunk < held) fetch(n);
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (n + i * across.ways < N) {
                float out[kVec];
#pragma unroll
                for (int j = 0; j < kVec; j++) out[j] = score_gradient<T>(dy[i][j], y[i][j], total[j], p.scale, p.log);
                put<T, kVec, false>(p.dx, p.dx_dtype, at_y + (n + i * across.ways) * p.stride_y.n, out);
            }
    }
}

// Row lengths at which the next variant takes over, ascending; never timed on a GPU yet.
template <typename Kernel>
struct Variant {
    int64_t limit;
    Kernel kernel;
    int threads;  // a row
};
using ForwardKernel = void (*)(const Forward);
using BackwardKernel = void (*)(const Backward);

template <typename T>
constexpr int kWidth = 16 / sizeof(T);
template <>
constexpr int kWidth<Any> = 1;

constexpr int64_t kEndless = INT64_MAX;

template <typename T, int kThreads, int kColumns>
constexpr int kHeldBy = kColumns / (kThreads < 32 ? 32 : kThreads) / kWidth<T>;
template <typename T, bool kLog, bool kExact, int kThreads, int kColumns, bool kLooped = false>
constexpr auto rows_fwd =
    softmax_fwd_kernel<T, kWidth<T>, kThreads, kHeldBy<T, kThreads, kColumns>, kLooped, kLog, kExact>;
template <typename T, int kThreads, int kColumns, bool kLooped = false>
constexpr auto rows_bwd = softmax_bwd_kernel<T, kWidth<T>, kThreads, kHeldBy<T, kThreads, kColumns>, kLooped>;

template <typename T, bool kLog, bool kExact>
const Variant<ForwardKernel> kForward[] = {
    {256, rows_fwd<T, kLog, kExact, kUpToWarp, 256>, kUpToWarp},
    {1024, rows_fwd<T, kLog, kExact, 32, 1024>, 32},
    {3072, rows_fwd<T, kLog, kExact, 32, 3072>, 32},
    {8192, rows_fwd<T, kLog, kExact, 256, 8192>, 256},
    {kEndless, rows_fwd<T, kLog, kExact, kLong, kKept / sizeof(T), true>, kLong},
};
template <bool kLog>
const Variant<ForwardKernel> kForwardAny[] = {
    {256, rows_fwd<Any, kLog, true, kUpToWarp, 256>, kUpToWarp},
    {kEndless, rows_fwd<Any, kLog, true, 256, 1024, true>, 256},
};
template <typename T>
const Variant<BackwardKernel> kBackward[] = {
    {256, rows_bwd<T, kUpToWarp, 256>, kUpToWarp},
    {1024, rows_bwd<T, 32, 1024>, 32},
    {4096, rows_bwd<T, 256, 4096>, 256},
    {kEndless, rows_bwd<T, kLong, kKeptTwice / sizeof(T), true>, kLong},
};
const Variant<BackwardKernel> kBackwardAny[] = {
    {256, rows_bwd<Any, kUpToWarp, 256>, kUpToWarp},
    {kEndless, rows_bwd<Any, 256, 1024, true>, 256},
};

constexpr int kAcrossHeld = 4;  // rows n of a thread
// 4 columns, whose fp32 results are 16 bytes, where an exact exp takes its registers.
template <typename T, bool kExact>
constexpr int kAcrossWidth = kExact && kWidth<T> > 4 ? 4 : kWidth<T>;
template <typename T, bool kLog, bool kExact>
constexpr ForwardKernel across_fwd = softmax_fwd_across_kernel<T, kAcrossWidth<T, kExact>, kAcrossHeld, kLog, kExact>;
template <typename T>
constexpr BackwardKernel across_bwd = softmax_bwd_across_kernel<T, kWidth<T>, kAcrossHeld>;

int log2_above(int64_t n) {
    int log2 = 0;
    while (int64_t{1} << log2 < n) log2++;
    return log2;
}

// A tensor that moves beside x (or, in backward, y).
struct Beside {
    const void* pointer;
    SoftmaxStrides stride;
    int bytes;  // an element
};

// Whether all tensors are contiguous along kAlong, n or m, and vectors that are whole for the first tensor are so for
// the others. whole: no row may have elements outside of vectors.
template <int64_t SoftmaxStrides::*kAlong>
bool in_vectors(const Beside* tensors, int count, const SoftmaxSizes& sizes, bool whole) {
    const int64_t width = 16 / tensors[0].bytes;
    const auto start = [](const Beside& t) {
        return static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.pointer) / t.bytes);
    };
    const std::pair<int64_t SoftmaxStrides::*, int64_t> dims[] = {
        {&SoftmaxStrides::a, sizes.A}, {&SoftmaxStrides::b, sizes.B}, {&SoftmaxStrides::m, sizes.M},
        {&SoftmaxStrides::n, sizes.N}};
    for (int i = 0; i < count; i++) {
        const Beside& t = tensors[i];
        if (t.stride.*kAlong != 1) return false;
        const int64_t shared = std::min<int64_t>(width, 16 / t.bytes) - 1;
        if ((start(t) - (whole ? 0 : start(tensors[0]))) & shared) return false;
        for (auto [stride, size] : dims)
            if (stride != kAlong && size > 1 && (t.stride.*stride - (whole ? 0 : tensors[0].stride.*stride)) & shared)
                return false;
    }
    return true;
}

template <typename Parameters, typename Kernel, size_t kVariants>
int launch_rows(const Variant<Kernel> (&variants)[kVariants], int width, Parameters p, void* stream) {
    const Variant<Kernel>* variant = variants;
    while (p.sizes.N > variant->limit) variant++;
    const int64_t rows = p.sizes.A * p.sizes.B * p.sizes.M;
    p.lanes_log2 = std::min(5, log2_above((p.sizes.N + width - 1) / width));
    const int threads = variant->threads == kUpToWarp ? 1 << p.lanes_log2 : variant->threads;
    const int block = std::max(threads, kWarpBlock);
    const int64_t grid = (rows + block / threads - 1) / (block / threads);
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    return KLAUNCH(variant->kernel, static_cast<unsigned>(grid), block, 0, stream, p);
}

template <typename Parameters>
int launch_across(void (*kernel)(const Parameters), int width, Parameters p, void* stream) {
    const int ways_log2 = std::min(5, log2_above((p.sizes.N + kAcrossHeld - 1) / kAcrossHeld));
    p.lanes_log2 = std::min(8 - ways_log2, log2_above((p.sizes.M + width - 1) / width));
    const int threads = std::max(32, 1 << (ways_log2 + p.lanes_log2));
    const int64_t columns = int64_t{width} << p.lanes_log2;
    const int64_t grid = p.sizes.A * p.sizes.B * ((p.sizes.M + columns - 1) / columns);
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    return KLAUNCH(kernel, static_cast<unsigned>(grid), threads, 0, stream, p);
}

int bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Rows this short are not worth their edges: vectors only where they have none.
constexpr int64_t kEdges = 128;

template <typename T, bool kLog, bool kExact>
int forward(const Forward& p, bool vectors, bool across, void* stream) {
    if (across && vectors) return launch_across(across_fwd<T, kLog, kExact>, kAcrossWidth<T, kExact>, p, stream);
    if (across) return launch_across(across_fwd<Any, kLog, true>, 1, p, stream);
    if (vectors) return launch_rows(kForward<T, kLog, kExact>, kWidth<T>, p, stream);
    return launch_rows(kForwardAny<kLog>, 1, p, stream);
}

template <typename T>
int forward(const Forward& p, bool vectors, bool across, void* stream) {
    constexpr bool kExact = sizeof(T) == 4;
    if (p.log) return forward<T, true, kExact>(p, vectors, across, stream);
    // Autocast's fp32 result of 16-bit x deserves what fp32 gets.
    if (p.y_dtype == kFloat32) return forward<T, false, true>(p, vectors, across, stream);
    return forward<T, false, kExact>(p, vectors, across, stream);
}

template <typename T>
int backward(const Backward& p, bool vectors, bool across, void* stream) {
    if (across && vectors) return launch_across(across_bwd<T>, kWidth<T>, p, stream);
    if (across) return launch_across(across_bwd<Any>, 1, p, stream);
    if (vectors) return launch_rows(kBackward<T>, kWidth<T>, p, stream);
    return launch_rows(kBackwardAny, 1, p, stream);
}

template <typename Parameters>
int dispatch(int (*const (&by_dtype)[3])(const Parameters&, bool, bool, void*), int dtype, const Parameters& p,
             const Beside* tensors, int count, bool vectors, void* stream) {
    const int64_t width = 16 / tensors[0].bytes;
    const bool across = tensors[1].stride.n != 1;  // the output's
    if (across)
        vectors = vectors && p.sizes.M % width == 0 && in_vectors<&SoftmaxStrides::m>(tensors, count, p.sizes, true);
    else
        vectors = vectors && in_vectors<&SoftmaxStrides::n>(tensors, count, p.sizes, p.sizes.N < kEdges) &&
                  (p.sizes.N >= kEdges || p.sizes.N % width == 0);
    return by_dtype[dtype](p, vectors, across, stream);
}

template <typename Kernel>
int load_kernel(Kernel kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

template <typename Kernel, size_t kVariants>
int load_kernels(const Variant<Kernel> (&variants)[kVariants], Kernel across) {
    int error = load_kernel(across);
    for (const auto& variant : variants)
        if (!error) error = load_kernel(variant.kernel);
    return error;
}

template <typename T>
int load_kernels() {
    constexpr bool kExact = sizeof(T) == 4;
    int error = load_kernels(kForward<T, true, kExact>, across_fwd<T, true, kExact>);
    if (!error) error = load_kernels(kForward<T, false, kExact>, across_fwd<T, false, kExact>);
    if (!error) error = load_kernels(kForward<T, false, true>, across_fwd<T, false, true>);
    return error ? error : load_kernels(kBackward<T>, across_bwd<T>);
}

template <>
int load_kernels<Any>() {
    int error = load_kernels(kForwardAny<true>, across_fwd<Any, true, true>);
    if (!error) error = load_kernels(kForwardAny<false>, across_fwd<Any, false, true>);
    return error ? error : load_kernels(kBackwardAny, across_bwd<Any>);
}

}  // namespace

extern "C" int softmax_fwd(const void* x, const void* mask, void* y, SoftmaxStrides stride_x,
                           SoftmaxStrides stride_mask, SoftmaxStrides stride_y, SoftmaxSizes sizes, int x_dtype,
                           int y_dtype, float scale, bool log, bool masked, bool causal, void* stream) {
    const Forward p{x,       mask,    y, stride_x, stride_mask, stride_y, sizes,
                    x_dtype, y_dtype, 0, scale,    log,         masked,   causal};
    const Beside tensors[] = {
        {x, stride_x, bytes_of(x_dtype)}, {y, stride_y, bytes_of(y_dtype)}, {mask, stride_mask, 1}};
    // A mask that is the same for all columns is read once a row.
    const int count = mask && stride_mask.n != 0 ? 3 : 2;
    const bool vectors = y_dtype == x_dtype || y_dtype == kFloat32;
    return dispatch({forward<float>, forward<__half>, forward<__nv_bfloat16>}, x_dtype, p, tensors, count, vectors,
                    stream);
}

extern "C" int softmax_bwd(const void* dy, const void* y, void* dx, SoftmaxStrides stride_dy, SoftmaxStrides stride_y,
                           SoftmaxSizes sizes, int dy_dtype, int y_dtype, int dx_dtype, float scale, bool log,
                           bool causal, void* stream) {
    const Backward p{dy, y, dx, stride_dy, stride_y, sizes, dy_dtype, y_dtype, dx_dtype, 0, scale, log, causal};
    const Beside tensors[] = {
        {y, stride_y, bytes_of(y_dtype)}, {dx, stride_y, bytes_of(dx_dtype)}, {dy, stride_dy, bytes_of(dy_dtype)}};
    const bool vectors = dy_dtype == y_dtype && (dx_dtype == y_dtype || y_dtype == kFloat32);
    return dispatch({backward<float>, backward<__half>, backward<__nv_bfloat16>}, y_dtype, p, tensors, 3, vectors,
                    stream);
}

extern "C" int softmax_prepare() {
    for (auto load : {load_kernels<float>, load_kernels<__half>, load_kernels<__nv_bfloat16>, load_kernels<Any>})
        if (const int error = load()) return error;
    return cudaSuccess;
}
