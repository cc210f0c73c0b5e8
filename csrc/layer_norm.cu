// Layer and RMS normalisation of rows, alone or after a residual add with dropout, forward and backward.
//
//   r = residual + dropout(x)                       (r = x without a residual), rounded to residual's dtype
//   y = (r - mean) * rstd * weight + bias,          rstd = 1 / sqrt(var + eps)
//   g = dy * weight, x_hat = (r - mean) * rstd
//   dr = rstd * (g - x_hat * sum(g * x_hat) / N - sum(g) / N),  dweight = sum_m dy * x_hat,  dbias = sum_m dy
//
// RMS drops the mean, the bias and the sum(g) term. Arithmetic is fp32, sums have a fixed order, nothing is atomic.
//
// Forward: 8 threads own a row of up to 256 columns, a warp one of up to 3072, a block a longer one. A row of up to
// 64 KB stays in registers; a longer one is read twice, backwards the second time. Each thread sums the distances of its
// values, and their squares, from a number near their mean; moving these sums to the row's mean loses nothing, however
// large the mean is. Bound by memory: 2 MN elements plain, 4 MN with residual and r. At 80 registers 768 threads an SM
// keep 48 KB of loads in flight, which covers the DRAM's latency; predicted: 90 % of a copy's bandwidth.
// Backward: one block an SM walks all rows. Rows arrive through a ring of asynchronous copies, 2 to 8 rows deep, in which
// each thread reads back only what it copied itself, so that no barrier guards it; registers hold the thread's share of
// dweight and dbias, one fp32 row of partial sums a block is written, and a second kernel adds these. Bound by memory:
// 3 MN, and 16 N bytes of partials written and read an SM (2 % of a 16-bit call from M = 18000 on); 64 KB in flight;
// predicted: 85 %. Rows that the ring does not take (of more than 16384 columns, fewer where tensors are fp32) or that are
// unaligned cost two kernels, the two sums of each row, then dx and the partial sums by blocks of columns: 5 MN.

#include "rt.cuh"

#include "launchers.h"
#include "philox.cuh"
#include "ptx.cuh"

#include <cstring>
#include <type_traits>

namespace {

// Calls body with a value of the dtype of what stands beside x: float where `wide`, else T.
template <typename T, typename Body>
__device__ void with_dtype(bool wide, Body body) {
    if (std::is_same_v<T, float> || wide)
        body(float{});
    else
        body(T{});
}

// The part of a row that one thread sees at a time: up to kHeld vectors of kVec neighbouring columns, kStep apart.
template <int kVec, int kThreads, int kHeld>
struct Chunk {
    static constexpr int kStep = kVec * kThreads, kColumns = kStep * kHeld;

    int64_t first;  // column
    int left;       // columns of the row from there on

    __device__ Chunk(int64_t start, int thread, int64_t N) : first(start + thread * kVec) {
        left = static_cast<int>(N - first < kColumns ? N - first : kColumns);
    }

    // visit(i, at): vector i, which starts `at` columns after the first.
    template <typename Visit>
    __device__ void each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (i * kStep < left) visit(i, i * kStep);
    }

    // As each, but in a loop: where nothing in registers is indexed by i.
    template <typename Visit>
    __device__ void each_rolled(Visit visit) const {
#pragma unroll 1
        for (int i = 0; i * kStep < left; i++) visit(i, i * kStep);
    }

    __device__ int vectors() const { return left <= 0 ? 0 : left > kColumns - kStep ? kHeld : (left + kStep - 1) / kStep; }
};

// kVec neighbours of T or, where wide, of float, as they lie in memory: loads into several of these wait for nothing.
template <typename T, int kVec>
struct Raw {
    uint32_t bits[kVec];

    __device__ void load(const void* from, bool wide, int64_t at) {
        if (std::is_same_v<T, float> || wide)
            move(static_cast<const float*>(from) + at);
        else
            move(static_cast<const T*>(from) + at);
    }

    __device__ void get(bool wide, float (&v)[kVec]) const {
        Vec<float, kVec> floats;
        Vec<T, kVec> narrow;
        memcpy(&floats, bits, sizeof floats);
        memcpy(&narrow, bits, sizeof narrow);
#pragma unroll
        for (int j = 0; j < kVec; j++) v[j] = wide ? floats.at[j] : to_float(narrow.at[j]);
    }

  private:
    template <typename S>
    __device__ void move(const S* from) {
        READS(from, sizeof(S) * kVec);
        const auto vec = *reinterpret_cast<const Vec<S, kVec>*>(from);
        memcpy(bits, &vec, sizeof vec);
    }
};

// Forward.

constexpr int kSmallBlock = 128;
__host__ __device__ constexpr int fwd_block(int threads) { return threads > kSmallBlock ? threads : kSmallBlock; }

template <typename T, int kVec, int kThreads, int kHeld, bool kLoop>
__global__ void __launch_bounds__(fwd_block(kThreads)) layer_norm_fwd_kernel(const LayerNormFwd a) {
    using Columns = Chunk<kVec, kThreads, kHeld>;
    constexpr int kRows = fwd_block(kThreads) / kThreads;
    const int64_t m = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads;
    if (kThreads >= 32 && m >= a.M) return;
    const int64_t N = m < a.M ? a.N : 0;  // a part of a warp beyond the last row has no columns, but takes part in sums
    const int thread = threadIdx.x % kThreads;
    const auto dropout = a.dropout.seed ? row_dropout_key(a.dropout) : RowDropoutKey{};

    float v[kHeld][kVec];
    const auto load_row = [&](const Columns& c, bool keep) {
        // All loads first, then what waits for them.
        const auto has = [&](int i) { return i * c.kStep < c.left; };
        const int64_t x_stride = kVec > 1 ? 1 : a.x_rows.stride_n, stride = kVec > 1 ? 1 : a.residual_rows.stride_n;
        const int64_t x_start = row_start(a.x_rows, m) + c.first * x_stride;
        Raw<T, kVec> raw_x[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            if (has(i)) raw_x[i].load(a.x, false, x_start + i * c.kStep * x_stride);
        const auto get_x = [&](int i) {
            float zero[kVec] = {};
            memcpy(v[i], zero, sizeof zero);
            if (has(i)) raw_x[i].get(false, v[i]);
        };
        if (!a.residual) {
#pragma unroll
            for (int i = 0; i < kHeld; i++) get_x(i);
            return;
        }

        const int64_t residual_start = row_start(a.residual_rows, m) + c.first * stride;
        constexpr int kMost = (kThreads < 512 ? 32 : 8) / kVec, kBatch = kHeld < kMost ? kHeld : kMost;
#pragma unroll
        for (int i0 = 0; i0 < kHeld; i0 += kBatch) {
            Raw<T, kVec> raw[kBatch];
#pragma unroll
            for (int i = i0; i < i0 + kBatch; i++)
                if (has(i)) raw[i - i0].load(a.residual, a.residual_wide, residual_start + i * c.kStep * stride);
#pragma unroll
            for (int i = i0; i < i0 + kBatch; i++) {
                get_x(i);
                if (!has(i)) continue;
                const int64_t n = c.first + i * c.kStep;
                if (a.dropout.seed) drop(dropout, m, n, v[i]);
                float u[kVec];
                raw[i - i0].get(a.residual_wide, u);
#pragma unroll
                for (int j = 0; j < kVec; j++) {
                    v[i][j] += u[j];
                    if (!a.residual_wide) v[i][j] = to_float(from_float<T>(v[i][j]));
                }
                if (keep && a.r) store_either<T>(a.r, a.residual_wide, m * N + n, v[i]);
            }
        }
    };

    // Of this thread's values: how many, a number near their mean, the sums of their distances from it and of the squares.
    float count = 0, near = 0, excess = 0, squares = 0;
    int64_t start = 0;
    for (;; start += Columns::kColumns) {
        const Columns c(start, thread, N);
        load_row(c, true);
        float sum = 0, excess_here = 0, squares_here = 0;
#pragma unroll
        for (int i = 0; i < kHeld; i++)
#pragma unroll
            for (int j = 0; j < kVec; j++) sum += v[i][j];
        const float more = c.vectors() * kVec, near_here = a.rms || more == 0 ? 0.0f : __fdividef(sum, more);
        c.each([&](int i, int) {
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                const float d = v[i][j] - near_here;
                excess_here += d;
                squares_here += d * d;
            }
        });
        if (!kLoop) {
            count = more;
            near = near_here;
            excess = excess_here;
            squares = squares_here;
            break;
        }
        if (more > 0) {
            const float between = near + (near_here - near) * __fdividef(more, count + more);
            const float d = near - between, d_here = near_here - between;
            squares += d * (2 * excess + d * count) + squares_here + d_here * (2 * excess_here + d_here * more);
            excess += d * count + excess_here + d_here * more;
            count += more;
            near = between;
        }
        if (start + Columns::kColumns >= N) break;
    }

    const float inverse = 1.0f / static_cast<float>(a.N);
    const float about = group_sum<kThreads>(a.rms ? 0.0f : near * count) * inverse;
    const float d = count > 0 ? near - about : 0.0f;
    float sums[] = {excess + d * count, squares + d * (2 * excess + d * count)};
    group_sum<kThreads>(sums);
    const float rest = a.rms ? 0.0f : sums[0] * inverse;  // what rounding has left in `about`
    const float variance = sums[1] * inverse - rest * rest;
    const float rstd = __frsqrt_rn((variance < 0 ? 0.0f : variance) + a.eps);

    for (bool held = true;; held = false, start -= Columns::kColumns) {
        const Columns c(start, thread, N);
        if (kLoop && !held) load_row(c, false);
        with_dtype<T>(a.weights_wide, [&](auto zero) {
            using W = decltype(zero);
            const W* weight = static_cast<const W*>(a.weight) + c.first;
            const W* bias = static_cast<const W*>(a.bias) + c.first;
            c.each([&](int i, int at) {
                float w[kVec], out[kVec];
#pragma unroll
                for (int j = 0; j < kVec; j++) out[j] = (v[i][j] - about - rest) * rstd;
                if (a.weight) {
                    load<kVec>(weight + at, w);
#pragma unroll
                    for (int j = 0; j < kVec; j++) out[j] *= w[j];
                }
                if (a.bias) {
                    load<kVec>(bias + at, w);
#pragma unroll
                    for (int j = 0; j < kVec; j++) out[j] += w[j];
                }
                store_either<T>(a.y, a.y_wide, m * N + c.first + at, out);
            });
        });
        if (!kLoop || start == 0) break;
    }

    if (thread == 0 && m < a.M) {
        if (a.mean) a.mean[m] = about + rest;
        if (a.rstd) a.rstd[m] = rstd;
    }
}

// Backward.

// A gradient and the normalised value it belongs to.
template <int kVec>
struct Pair {
    float dy[kVec], x_hat[kVec];

    __device__ void normalise(float mean, float rstd) {
#pragma unroll
        for (int j = 0; j < kVec; j++) x_hat[j] = (x_hat[j] - mean) * rstd;
    }
};

// v *= weight at columns n ..
template <typename T, int kVec>
__device__ void times_weight(const LayerNormBwd& a, int64_t n, float (&v)[kVec]) {
    if (!a.weight) return;
    float w[kVec];
    load_either<T>(a.weight, a.weights_wide, n, w);
#pragma unroll
    for (int j = 0; j < kVec; j++) v[j] *= w[j];
}

// The gradient of r at columns n .. of row m, to the residual as it is, to x through the dropout.
template <typename T, int kVec>
__device__ void store_gradient(const LayerNormBwd& a, const RowDropoutKey& dropout, int64_t m, int64_t n,
                               float (&v)[kVec]) {
    if (a.dresidual) store_either<T>(a.dresidual, a.r_wide, m * a.N + n, v);
    if (!a.dx) return;
    if (a.dropout.seed) drop(dropout, m, n, v);
    store_global<kVec>(static_cast<T*>(a.dx) + m * a.N + n, v);
}

// Rows on their way: `stages` of them for each group of threads, each of `vectors` vectors of dy, r and, if given, dr for
// every thread. Pieces of 16 bytes, those of neighbouring threads side by side.
struct Ring {
    int stages, vectors;
};

template <typename T>
constexpr int kPieceElements = 16 / sizeof(T);

// Pieces to a vector of T, or as many floats.
template <typename T>
__host__ __device__ constexpr int pieces(bool wide) {
    return wide ? sizeof(float) / sizeof(T) : 1;
}

template <typename T>
__host__ __device__ int stage_pieces(const LayerNormBwd& a, int vectors) {
    return vectors * (pieces<T>(a.dy_wide) + (a.dr ? 2 : 1) * pieces<T>(a.r_wide));
}

template <typename T, int kBlock>
__device__ void copy_vector(unsigned char* to, const void* from, bool wide, int64_t at) {
    if (!wide) return ptx::cp_async_16(to, static_cast<const T*>(from) + at);
#pragma unroll
    for (int p = 0; p < pieces<T>(true); p++)
        ptx::cp_async_16_cached(to + p * kBlock * 16, static_cast<const float*>(from) + at + 4 * p);
}

template <typename T, int kBlock, int kVec>
__device__ void read_vector(const unsigned char* from, bool wide, float (&v)[kVec]) {
    if (!wide) return load<kVec>(reinterpret_cast<const T*>(from), v);
#pragma unroll
    for (int p = 0; p < pieces<T>(true); p++) {
        float four[4];
        load<4>(reinterpret_cast<const float*>(from + p * kBlock * 16), four);
#pragma unroll
        for (int j = 0; j < 4; j++) v[4 * p + j] = four[j];
    }
}

template <typename T, int kThreads, int kHeld, int kBlock>
__global__ void __launch_bounds__(kBlock, 1) layer_norm_bwd_kernel(const LayerNormBwd a, const Ring ring) {
    constexpr int kVec = kPieceElements<T>, kRows = kBlock / kThreads;
    constexpr int kPiece = kBlock * 16;  // bytes from one piece of a thread to its next
    using Columns = Chunk<kVec, kThreads, kHeld>;
    const int group = threadIdx.x / kThreads;
    const int64_t step = int64_t{gridDim.x} * kRows;
    const auto dropout = a.dropout.seed ? row_dropout_key(a.dropout) : RowDropoutKey{};
    const int dy_pieces = pieces<T>(a.dy_wide), r_pieces = pieces<T>(a.r_wide);
    const int stage_bytes = stage_pieces<T>(a, ring.vectors) * kPiece;
    SMEM_DYN(sRing, 16);
    unsigned char* sMine = sRing + threadIdx.x * 16;
    // Where dy, r and dr of vector i lie in a stage.
    const auto dy_at = [&](int i) { return i * dy_pieces * kPiece; };
    const auto r_at = [&](int i) { return (ring.vectors * dy_pieces + i * r_pieces) * kPiece; };
    const auto dr_at = [&](int i) { return (ring.vectors * (dy_pieces + r_pieces) + i * r_pieces) * kPiece; };

    const auto fetch = [&](int64_t m, int stage) {
        if (m < a.M) {
            const Columns c(0, threadIdx.x % kThreads, a.N);
            unsigned char* to = sMine + stage * stage_bytes;
            const int64_t dy = row_start(a.dy_rows, m) + c.first, r = row_start(a.r_rows, m) + c.first;
            c.each_rolled([&](int i, int at) {
                copy_vector<T, kBlock>(to + dy_at(i), a.dy, a.dy_wide, dy + at);
                copy_vector<T, kBlock>(to + r_at(i), a.r, a.r_wide, r + at);
            });
            if (a.dr) {
                const int64_t dr = row_start(a.dr_rows, m) + c.first;
                c.each_rolled([&](int i, int at) { copy_vector<T, kBlock>(to + dr_at(i), a.dr, a.r_wide, dr + at); });
            }
        }
        ptx::cp_async_commit();
    };

    float dweight[kHeld][kVec] = {}, dbias[kHeld][kVec] = {};
    int64_t first = int64_t{blockIdx.x} * kRows;  // of the rows that this block's groups work on
    for (int s = 0; s < ring.stages - 1; s++) fetch(first + s * step + group, s);
    float mean_next = 0, rstd_next = 0;
    const auto load_statistics = [&](int64_t m) {
        if (m >= a.M) return;
        if (!a.rms) mean_next = a.mean[m];
        rstd_next = a.rstd[m];
    };
    load_statistics(first + group);

    for (int stage = 0; first < a.M; first += step, stage = stage + 1 == ring.stages ? 0 : stage + 1) {
        const int64_t m = first + group;
        const float mean = mean_next, rstd = rstd_next;
        load_statistics(m + step);
        fetch(m + (ring.stages - 1) * step, stage == 0 ? ring.stages - 1 : stage - 1);
        ptx::cp_async_wait(ring.stages - 1);

        const Columns c(0, threadIdx.x % kThreads, m < a.M ? a.N : 0);
        const unsigned char* from = sMine + stage * stage_bytes;
        const auto read = [&](int i) {
            Pair<kVec> pair;
            read_vector<T, kBlock>(from + dy_at(i), a.dy_wide, pair.dy);
            read_vector<T, kBlock>(from + r_at(i), a.r_wide, pair.x_hat);
            pair.normalise(mean, rstd);
            return pair;
        };

        float sums[2] = {};
        c.each([&](int i, int at) {
            Pair<kVec> pair = read(i);
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                dweight[i][j] += pair.dy[j] * pair.x_hat[j];
                dbias[i][j] += pair.dy[j];
            }
            times_weight<T>(a, c.first + at, pair.dy);
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                sums[0] += pair.dy[j] * pair.x_hat[j];
                sums[1] += pair.dy[j];
            }
        });
        group_sum<kThreads>(sums);
        const float slope = sums[0] / static_cast<float>(a.N), level = a.rms ? 0.0f : sums[1] / static_cast<float>(a.N);

        c.each_rolled([&](int i, int at) {
            Pair<kVec> pair = read(i);
            times_weight<T>(a, c.first + at, pair.dy);
            float out[kVec], dr[kVec];
#pragma unroll
            for (int j = 0; j < kVec; j++) out[j] = (pair.dy[j] - pair.x_hat[j] * slope - level) * rstd;
            if (a.dr) {
                read_vector<T, kBlock>(from + dr_at(i), a.r_wide, dr);
#pragma unroll
                for (int j = 0; j < kVec; j++) out[j] += dr[j];
            }
            store_gradient<T>(a, dropout, m, c.first + at, out);
        });
    }

    // The groups' shares, added in the order of the groups.
    const Columns c(0, threadIdx.x % kThreads, a.N);
    const auto combine = [&](const float(&share)[kHeld][kVec], float* gPartial) {
        if (!gPartial) return;
        gPartial += blockIdx.x * a.N;
        if constexpr (kRows == 1) {
            c.each([&](int i, int at) { store<kVec>(gPartial + c.first + at, share[i]); });
        } else {
            float* sShare = reinterpret_cast<float*>(sRing);
            __syncthreads();  // the ring, and then what the call before this one left in it, has been read
            c.each([&](int i, int at) { store<kVec>(sShare + group * a.N + c.first + at, share[i]); });
            __syncthreads();
            for (int n = threadIdx.x; n < a.N; n += kBlock) {
                float sum = 0;
                for (int g = 0; g < kRows; g++) sum += sShare[g * a.N + n];
                gPartial[n] = sum;
            }
        }
    };
    combine(dweight, a.partial_dweight);
    combine(dbias, a.partial_dbias);
}

constexpr int kSumWarps = 8;

// dweight and dbias of 32 columns from the G rows of partial sums.
__global__ void __launch_bounds__(32 * kSumWarps) layer_norm_bwd_partials_kernel(const LayerNormBwd a, int64_t G) {
    const float* gPartial = blockIdx.y ? a.partial_dbias : a.partial_dweight;
    void* gOut = blockIdx.y ? a.dbias : a.dweight;
    if (!gPartial) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t n = int64_t{blockIdx.x} * 32 + lane;
    SMEM_ARRAY(float, sSum, [kSumWarps][32]);
    float sum = 0;
    if (n < a.N) {
#pragma unroll 4
        for (int64_t g = warp; g < G; g += kSumWarps) sum += gPartial[g * a.N + n];
    }
    sSum[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || n >= a.N) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < kSumWarps; w++) sum += sSum[w][lane];
    const float one[] = {sum};
    if (a.gradient_dtype == kFloat16)
        store<1>(static_cast<__half*>(gOut) + n, one);
    else if (a.gradient_dtype == kBFloat16)
        store<1>(static_cast<__nv_bfloat16*>(gOut) + n, one);
    else
        store<1>(static_cast<float*>(gOut) + n, one);
}

// dy and x_hat of columns n .. of row m.
template <typename T, int kVec>
__device__ Pair<kVec> load_pair(const LayerNormBwd& a, int64_t m, int64_t n, float mean, float rstd) {
    Pair<kVec> pair;
    load_either<T>(a.dy, a.dy_wide, row_start(a.dy_rows, m) + n * a.dy_rows.stride_n, pair.dy);
    load_either<T>(a.r, a.r_wide, row_start(a.r_rows, m) + n * a.r_rows.stride_n, pair.x_hat);
    pair.normalise(mean, rstd);
    return pair;
}

// sums[m] = sum(g * x_hat) / N, sum(g) / N.
template <typename T, int kVec, int kThreads>
__global__ void __launch_bounds__(256) layer_norm_bwd_sums_kernel(const LayerNormBwd a) {
    constexpr int kRows = 256 / kThreads;
    const int64_t m = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads;
    if (m >= a.M) return;  // a whole warp, or the block
    const float mean = a.rms ? 0.0f : a.mean[m], rstd = a.rstd[m];
    float sums[2] = {};
#pragma unroll 2
    for (int64_t n = threadIdx.x % kThreads * kVec; n < a.N; n += kThreads * kVec) {
        Pair<kVec> pair = load_pair<T, kVec>(a, m, n, mean, rstd);
        times_weight<T>(a, n, pair.dy);
#pragma unroll
        for (int j = 0; j < kVec; j++) {
            sums[0] += pair.dy[j] * pair.x_hat[j];
            sums[1] += pair.dy[j];
        }
    }
    group_sum<kThreads>(sums);
    if (threadIdx.x % kThreads == 0) {
        a.sums[2 * m] = sums[0] / static_cast<float>(a.N);
        a.sums[2 * m + 1] = a.rms ? 0.0f : sums[1] / static_cast<float>(a.N);
    }
}

// dx, and the share of dweight and dbias, of `width` vectors of columns and every gridDim.y-th group of 256 / width rows.
template <typename T, int kVec>
__global__ void __launch_bounds__(256) layer_norm_bwd_columns_kernel(const LayerNormBwd a, int width) {
    const int lane = threadIdx.x % width, rows = 256 / width;
    const int64_t n = (int64_t{blockIdx.x} * width + lane) * kVec;
    const auto dropout = a.dropout.seed ? row_dropout_key(a.dropout) : RowDropoutKey{};
    float dweight[kVec] = {}, dbias[kVec] = {}, w[kVec];
    if (n < a.N) {
#pragma unroll
        for (int j = 0; j < kVec; j++) w[j] = 1;
        times_weight<T>(a, n, w);
        for (int64_t m = int64_t{blockIdx.y} * rows + threadIdx.x / width; m < a.M; m += int64_t{gridDim.y} * rows) {
            const float rstd = a.rstd[m], slope = a.sums[2 * m], level = a.sums[2 * m + 1];
            const auto pair = load_pair<T, kVec>(a, m, n, a.rms ? 0.0f : a.mean[m], rstd);
            float out[kVec], dr[kVec] = {};
            if (a.dr) load_either<T>(a.dr, a.r_wide, row_start(a.dr_rows, m) + n * a.dr_rows.stride_n, dr);
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                dweight[j] += pair.dy[j] * pair.x_hat[j];
                dbias[j] += pair.dy[j];
                out[j] = (pair.dy[j] * w[j] - pair.x_hat[j] * slope - level) * rstd + dr[j];
            }
            store_gradient<T>(a, dropout, m, n, out);
        }
    }

    using Share = Vec<float, kVec>;
    SMEM_ARRAY(Share, sShare, [256]);
    const auto combine = [&](const float(&share)[kVec], float* gPartial) {
        if (!gPartial) return;
        __syncthreads();
        store<kVec>(sShare[threadIdx.x].at, share);
        __syncthreads();
        if (threadIdx.x >= width || n >= a.N) return;
        float sum[kVec] = {};
        for (int row = 0; row < rows; row += 16) {  // of sums of 16: less rounding than one long sum
            float some[kVec] = {}, part[kVec];
            for (int i = row; i < row + 16 && i < rows; i++) {
                load<kVec>(sShare[i * width + lane].at, part);
#pragma unroll
                for (int j = 0; j < kVec; j++) some[j] += part[j];
            }
#pragma unroll
            for (int j = 0; j < kVec; j++) sum[j] += some[j];
        }
        store<kVec>(gPartial + blockIdx.y * a.N + n, sum);
    };
    combine(dweight, a.partial_dweight);
    combine(dbias, a.partial_dbias);
}

// Choice of kernels. The limits come from register counts; none has been timed on a GPU yet.

struct Forward {
    int64_t longest;  // row
    void (*kernel)(LayerNormFwd);
    int threads;  // to a row
};

constexpr int64_t kAnyLength = INT64_MAX;

template <typename T, bool kVectors>
const auto& forward_table() {
    if constexpr (kVectors) {
        constexpr int kVec = kPieceElements<T>, kHeld = 32 / kVec;
        static const Forward table[] = {
            {256, layer_norm_fwd_kernel<T, kVec, 8, kHeld, false>, 8},
            {1024, layer_norm_fwd_kernel<T, kVec, 32, kHeld, false>, 32},
            {3072, layer_norm_fwd_kernel<T, kVec, 32, 3 * kHeld, false>, 32},
            {8192, layer_norm_fwd_kernel<T, kVec, 256, kHeld, false>, 256},
            {64 * 1024 / sizeof(T), layer_norm_fwd_kernel<T, kVec, 512, 8, false>, 512},
            {kAnyLength, layer_norm_fwd_kernel<T, kVec, 256, kHeld, true>, 256},
        };
        return table;
    } else {
        static const Forward table[] = {
            {256, layer_norm_fwd_kernel<T, 1, 32, 8, false>, 32},
            {2048, layer_norm_fwd_kernel<T, 1, 256, 8, false>, 256},
            {8192, layer_norm_fwd_kernel<T, 1, 512, 16, false>, 512},
            {kAnyLength, layer_norm_fwd_kernel<T, 1, 512, 8, true>, 512},
        };
        return table;
    }
}

struct Backward {
    int64_t longest;  // row
    void (*kernel)(LayerNormBwd, Ring);
    int threads, block;  // to a row, to a block
};

template <typename T>
const auto& backward_table() {
    constexpr int kHeld = 32 / kPieceElements<T>;
    static const Backward table[] = {
        {256, layer_norm_bwd_kernel<T, 8, kHeld, 256>, 8, 256},
        {1024, layer_norm_bwd_kernel<T, 32, kHeld, 256>, 32, 256},
        {2048, layer_norm_bwd_kernel<T, 32, 2 * kHeld, 256>, 32, 256},
        {8192, layer_norm_bwd_kernel<T, 256, kHeld, 256>, 256, 256},
        {16384, layer_norm_bwd_kernel<T, 512, kHeld, 512>, 512, 512},
    };
    return table;
}

// The two kernels of rows that the ring does not take; two sizes of the first.
struct ByColumns {
    void (*warp_sums)(LayerNormBwd);
    void (*block_sums)(LayerNormBwd);
    void (*columns)(LayerNormBwd, int);
    int vec;
};

template <typename T, bool kVectors>
ByColumns by_columns() {
    constexpr int kVec = kVectors ? kPieceElements<T> : 1;
    return {layer_norm_bwd_sums_kernel<T, kVec, 32>, layer_norm_bwd_sums_kernel<T, kVec, 256>,
            layer_norm_bwd_columns_kernel<T, kVec>, kVec};
}

template <typename Body>
int with_element(int dtype, Body body) {
    if (dtype == kFloat16) return body(__half{});
    if (dtype == kBFloat16) return body(__nv_bfloat16{});
    return body(float{});
}

int element_bytes(int dtype, bool wide) { return wide || dtype == kFloat32 ? 4 : 2; }

// Whether every row of a tensor (absent ones are null) starts on 16 bytes and is contiguous.
bool vector_rows(const void* base, const Rows& rows, int bytes) {
    return !base || (aligned(base) && rows.stride_n == 1 && rows.stride_outer * bytes % 16 == 0 &&
                     rows.stride_inner * bytes % 16 == 0);
}

// Shared memory that a block may have here beside `fixed` bytes of its own.
int shared_memory(int fixed) {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    return bytes - fixed;
}

constexpr int kInFlight = 64 * 1024;       // bytes under way on an SM that are enough
constexpr int kReductionBytes = 1024;  // at least what group_sum takes

template <typename T>
int backward(const LayerNormBwd& a, void* stream) {
    const bool vectors = a.N % kPieceElements<T> == 0 && vector_rows(a.dy, a.dy_rows, element_bytes(a.dtype, a.dy_wide)) &&
                         vector_rows(a.r, a.r_rows, element_bytes(a.dtype, a.r_wide)) &&
                         vector_rows(a.dr, a.dr_rows, element_bytes(a.dtype, a.r_wide)) && aligned(a.weight) &&
                         aligned(a.dx) && aligned(a.dresidual) && aligned(a.partial_dweight) && aligned(a.partial_dbias);
    int64_t G = 0;
    const int available = vectors ? shared_memory(kReductionBytes) : 0;
    for (const Backward& row : backward_table<T>()) {
        if (!vectors || a.N > row.longest) continue;
        const int64_t step = row.threads * kPieceElements<T>, rows = row.block / row.threads;
        Ring ring{0, static_cast<int>((a.N + step - 1) / step)};
        const int stage = stage_pieces<T>(a, ring.vectors) * row.block * 16;
        while (ring.stages <= ptx::kMostPending && (ring.stages + 1) * stage <= available &&
               (ring.stages < 2 || (ring.stages - 1) * stage < kInFlight))
            ring.stages++;
        if (ring.stages < 2) continue;
        const int64_t row_groups = (a.M + rows - 1) / rows;
        G = row_groups < a.partial_rows ? row_groups : a.partial_rows;
        const int code = KLAUNCH(row.kernel, static_cast<unsigned>(G), row.block, ring.stages * stage, stream, a, ring);
        if (code != cudaSuccess) return code;
        break;
    }
    if (G == 0) {
        const ByColumns kernels = vectors ? by_columns<T, true>() : by_columns<T, false>();
        const int64_t rows = a.N <= 1024 ? 8 : 1, grid = (a.M + rows - 1) / rows;
        if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
        const auto sums = rows > 1 ? kernels.warp_sums : kernels.block_sums;
        int code = KLAUNCH(sums, static_cast<unsigned>(grid), 256, 0, stream, a);
        if (code != cudaSuccess) return code;
        int width = 256;
        while (width > 1 && (width / 2) * kernels.vec >= a.N) width /= 2;
        const int64_t tiles = (a.N + width * kernels.vec - 1) / (width * kernels.vec), row_groups = (a.M * width + 255) / 256;
        G = row_groups < a.partial_rows ? row_groups : a.partial_rows;
        code = KLAUNCH(kernels.columns, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(G)), 256, 0, stream, a, width);
        if (code != cudaSuccess) return code;
    }
    if (!a.partial_dweight && !a.partial_dbias) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>((a.N + 31) / 32), 2);
    return KLAUNCH(layer_norm_bwd_partials_kernel, grid, 32 * kSumWarps, 0, stream, a, G);
}

template <typename T>
int forward(const LayerNormFwd& a, void* stream) {
    const bool vectors = a.N % kPieceElements<T> == 0 && vector_rows(a.x, a.x_rows, sizeof(T)) &&
                         vector_rows(a.residual, a.residual_rows, element_bytes(a.dtype, a.residual_wide)) &&
                         aligned(a.weight) && aligned(a.bias) && aligned(a.y) && aligned(a.r);
    const auto run = [&](const auto& table) -> int {
        const Forward* row = table;
        while (a.N > row->longest) row++;
        const int block = fwd_block(row->threads);
        const int64_t rows = block / row->threads, grid = (a.M + rows - 1) / rows;
        if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
        return KLAUNCH(row->kernel, static_cast<unsigned>(grid), block, 0, stream, a);
    };
    return vectors ? run(forward_table<T, true>()) : run(forward_table<T, false>());
}

template <typename... Kernel>
int load_kernels(Kernel... kernels) {
    int code = cudaSuccess;
    cudaFuncAttributes attributes;
    for (const void* kernel : {reinterpret_cast<const void*>(kernels)...})
        if (code == cudaSuccess) code = cudaFuncGetAttributes(&attributes, kernel);
    return code;
}

template <typename T>
int prepare() {
    int code = load_kernels(layer_norm_bwd_partials_kernel);
    const auto load_forward = [&](const auto& table) {
        for (const Forward& row : table)
            if (code == cudaSuccess) code = load_kernels(row.kernel);
    };
    load_forward(forward_table<T, true>());
    load_forward(forward_table<T, false>());
    for (const ByColumns& kernels : {by_columns<T, true>(), by_columns<T, false>()})
        if (code == cudaSuccess) code = load_kernels(kernels.warp_sums, kernels.block_sums, kernels.columns);
    for (const Backward& row : backward_table<T>()) {
        if (code == cudaSuccess) code = load_kernels(row.kernel);
        if (code == cudaSuccess)
            code = cudaFuncSetAttribute(reinterpret_cast<const void*>(row.kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory(kReductionBytes));
    }
    return code;
}

}  // namespace

extern "C" int layer_norm_fwd(const LayerNormFwd* call, void* stream) {
    return with_element(call->dtype, [&](auto zero) { return forward<decltype(zero)>(*call, stream); });
}

extern "C" int layer_norm_bwd(const LayerNormBwd* call, void* stream) {
    return with_element(call->dtype, [&](auto zero) { return backward<decltype(zero)>(*call, stream); });
}

extern "C" int layer_norm_prepare() {
    for (int dtype : {kFloat32, kFloat16, kBFloat16})
        if (const int code = with_element(dtype, [](auto zero) { return prepare<decltype(zero)>(); })) return code;
    return cudaSuccess;
}
