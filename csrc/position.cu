// Positional encodings and the embeddings of a transformer's first layer, each one pass over the rows.
//
//   add_positional_encoding   y = dropout(scale * x + E[p])     E[p] a table's row, or with no table
//                             E[p, 2i] = sin(p w_i), E[p, 2i+1] = cos(p w_i), w_i = 10000^(-2i/C)   (arXiv 1706.03762)
//                             dx = scale * dropout(dy),  dE[p] = sum of dropout(dy) over the rows at position p
//
//   embeddings                x = token[id] + type[t] + position[p],  xhat = (x - mean) * rstd
//                             y = dropout(xhat * w + b), or dropout(x) without the norm
//                             g = w * dropout(dy),  dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//                             dw = sum of dropout(dy) * xhat, db = sum of dropout(dy), a table's row the sum of its dx
//
// Rows are (b, s), b over the leading dims and s over the last one. To add an encoding, a thread takes 16 bytes of
// columns of up to 16 rows: neighbouring threads have neighbouring columns, whatever C is, and the next row is on its
// way while one is computed. An encoding that all b share is made once for a thread's rows, and the gradient of a table
// indexed by s is summed over them in registers; fp32 partials of several threads meet in sum_partials_kernel. For the
// embeddings a warp or a block has a row, in registers unless it is very long, and in backward a run of them, whose
// sums for the norm and the positions it keeps. Rows addressed by ids are sorted first: segment_sum_kernel adds the
// runs of equal ids inside chunks, segment_join_kernel the runs that cross chunks. Every sum has one fixed order and no
// atomic is used. What is not contiguous or not aligned to 16 bytes goes one column a thread.
//
// The sinusoidal angle is exact: a frequency is an integer F_i = 2^64 w_i / 2 pi of turns, p * F_i modulo 2^64 is the
// fraction of a turn with nothing lost to rounding, and polynomials on [-pi/4, pi/4] give sin and cos to 2e-7 for every
// p below 2^24 (F_i is good to 2^-47 of itself). Everything is fp32 after the load. Ids are clamped into their table: a
// wrong one gives wrong numbers, never a fault.
//
// Bytes, in M C elements: add 2, and 2 backward; dtable by ids 1 more and up to 2 fp32 rows of partials a chunk of 16
// to 128; embeddings 2 (token rows and y; the other tables stay in the L2), backward 3 (dy, token rows, dx) and 1 more
// for dtoken, up to 0.2 of partials and, for every table, its size. Memory bounds all of it: 90 % of a copy's rate is
// predicted for the adds (1024 threads an SM by their 59 to 64 registers, each with a 16-byte load on its way, where a
// copy's latency asks for 11 KB; a sinusoid that no b shares, with dropout, takes 20 of the 24 instructions an element
// has), 80 % for the embeddings, whose rows come by way of their ids, 70 % for their backward, which has 2 to 12 rows
// of an SM on their way. Nothing has run on a GPU yet.

#include "rt.cuh"

#include "philox.cuh"

namespace {

constexpr int kThreads = 256;

// Where a thread stands: its first column and its first row; the following ones are b_lanes and s_lanes further.
struct Place {
    int64_t n, b, s;
};

// False for the threads past the last lane.
template <int kVec>
__device__ bool find_place(const Walk& walk, Place& at) {
    const int64_t groups = (walk.C + kVec - 1) / kVec;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, lane = thread / groups;
    at = {thread % groups * kVec, lane / walk.s_lanes, lane % walk.s_lanes};
    return at.b < walk.b_lanes;
}

__device__ inline int64_t clamped(int64_t id, int64_t rows) { return id < 0 ? 0 : id < rows ? id : rows - 1; }

__device__ inline int64_t id_at(const Ids& ids, int64_t b, int64_t s) {
    const int64_t at = b * ids.stride_b + s * ids.stride_s;
    return ids.wide ? static_cast<const int64_t*>(ids.data)[at] : static_cast<const int32_t*>(ids.data)[at];
}

// kVec numbers at element `at` of an array of any dtype.
template <int kVec>
__device__ void store_as(void* to, int dtype, int64_t at, const float (&v)[kVec]) {
    if (dtype == kFloat32)
        store<kVec>(static_cast<float*>(to) + at, v);
    else if (dtype == kFloat16)
        store<kVec>(static_cast<__half*>(to) + at, v);
    else
        store<kVec>(static_cast<__nv_bfloat16*>(to) + at, v);
}

template <int kVec, typename T>
__device__ void widen(const Vec<T, kVec>& from, float (&to)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i++) to[i] = to_float(from.at[i]);
}

template <int kVec>
__device__ void add(float (&to)[kVec], const float (&v)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i++) to[i] += v[i];
}

// The sine and cosine of phase * 2^-64 turns.
__device__ inline void sine_cosine(uint64_t phase, float& sine, float& cosine) {
    const uint64_t shifted = phase + (uint64_t{1} << 61);
    const auto quarter = static_cast<unsigned>(shifted >> 62);  // the nearest quarter turn
    const auto rest = static_cast<int32_t>(static_cast<uint32_t>(shifted >> 30) ^ 0x80000000u);  // in 2^-34 turns
    const float angle = static_cast<float>(rest) * 3.65729520e-10f;  // 2 pi / 2^34
    const float u = angle * angle;
    const float s = angle + angle * u * (-1.6666655e-1f + u * (8.3321781e-3f + u * -1.9517297e-4f));
    const float c = 1.0f + u * (-0.5f + u * (4.1666647e-2f + u * (-1.3887367e-3f + u * 2.4438449e-5f)));
    sine = quarter & 1 ? c : s;
    cosine = quarter & 1 ? s : c;
    if (quarter & 2) sine = -sine;
    if ((quarter + 1) & 2) cosine = -cosine;
}

// The sinusoidal encoding of kVec columns from n on.
template <int kVec>
struct Sinusoid {
    uint64_t turns[(kVec + 1) / 2];  // 2^64 a turn, for each pair of columns

    // step is 2^56 * 2 log2(10000) / C, so that log2(F_i) = 64 - log2(2 pi) - i * step * 2^-56.
    __device__ void prepare(int64_t n, int64_t step) {
#pragma unroll
        for (int i = 0; i < (kVec + 1) / 2; i++) {
            const int64_t exponent = 4420625586736734346 - (n / 2 + i) * step;  // 2^56 * (64 - log2(2 pi))
            turns[i] = static_cast<uint64_t>(exp2(static_cast<double>(exponent) * 0x1p-56));
        }
    }

    __device__ void at(int64_t position, int64_t n, float (&e)[kVec]) const {
        if constexpr (kVec == 1) {
            float cosine;
            sine_cosine(static_cast<uint64_t>(position) * turns[0], e[0], cosine);
            if (n % 2) e[0] = cosine;
        } else {
#pragma unroll
            for (int i = 0; i < kVec; i += 2)
                sine_cosine(static_cast<uint64_t>(position) * turns[i / 2], e[i], e[i + 1]);
        }
    }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    add_positional_encoding_fwd_kernel(const T* gX, Rows rows, Table table, Ids ids, T* gY, RowDropout dropout,
                                       Walk walk, int64_t offset, int64_t step, float scale) {
    Place at;
    if (!find_place<kVec>(walk, at)) return;
    const int64_t n = at.n;
    const T* x = gX + n * rows.stride_n;
    RowDropoutKey key;
    if (dropout.seed) key = row_dropout_key(dropout);
    Sinusoid<kVec> sinusoid;
    if (!table.data) sinusoid.prepare(n, step);
    const bool one_for_all_b = !ids.data || ids.stride_b == 0;

    int64_t b = at.b, s = at.s;
    float e[kVec];
    auto next = load_raw<kVec>(x + b * rows.stride_outer + s * rows.stride_inner);
    while (s < walk.S) {
        float v[kVec];
        widen<kVec>(next, v);
        const int64_t m = b * walk.S + s;
        if (b == at.b || !one_for_all_b) {
            const int64_t position = ids.data ? id_at(ids, b, s) : s + offset;
            if (table.data)
                load_either<T>(table.data, table.wide, clamped(position, table.rows) * table.stride + n, e);
            else
                sinusoid.at(position, n, e);
        }
        b += walk.b_lanes;
        if (b >= walk.B) {
            b = at.b;
            s += walk.s_lanes;
        }
        if (s < walk.S) next = load_raw<kVec>(x + b * rows.stride_outer + s * rows.stride_inner);

#pragma unroll
        for (int i = 0; i < kVec; i++) v[i] = scale * v[i] + e[i];
        if (dropout.seed) drop<kVec>(key, m, n, v);
        store<kVec>(gY + m * walk.C + n, v);
    }
}

// dx = scale * dropout(dy), and sums[b lane, s] = dropout(dy) summed over the lane's b; either may be absent.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    add_positional_encoding_bwd_kernel(const T* gDy, Rows rows, T* gDx, void* gSums, int sums_dtype, RowDropout dropout,
                                       Walk walk, float scale) {
    Place at;
    if (!find_place<kVec>(walk, at)) return;
    const int64_t n = at.n;
    const T* dy = gDy + n * rows.stride_n;
    RowDropoutKey key;
    if (dropout.seed) key = row_dropout_key(dropout);

    int64_t b = at.b, s = at.s;
    float sum[kVec] = {};
    auto next = load_raw<kVec>(dy + b * rows.stride_outer + s * rows.stride_inner);
    while (s < walk.S) {
        float v[kVec];
        widen<kVec>(next, v);
        const int64_t m = b * walk.S + s, s_now = s;
        b += walk.b_lanes;
        if (b >= walk.B) {
            b = at.b;
            s += walk.s_lanes;
        }
        if (s < walk.S) next = load_raw<kVec>(dy + b * rows.stride_outer + s * rows.stride_inner);

        if (dropout.seed) drop<kVec>(key, m, n, v);
#pragma unroll
        for (int i = 0; i < kVec; i++) {
            sum[i] += v[i];
            v[i] *= scale;
        }
        if (gDx) store<kVec>(gDx + m * walk.C + n, v);
        if (s != s_now) {  // that was the last b
            if (gSums) store_as<kVec>(gSums, sums_dtype, (at.b * walk.S + s_now) * walk.C + n, sum);
#pragma unroll
            for (int i = 0; i < kVec; i++) sum[i] = 0;
        }
    }
}

// to += v, or to = v where nothing is there yet.
template <int kVec>
__device__ void accumulate(float* to, const float (&v)[kVec], bool begun) {
    float total[kVec] = {};
    if (begun) load<kVec>(to, total);
    add(total, v);
    store<kVec>(to, total);
}

// Where the table rows that add up to row (b, s) of the embeddings start, in elements.
struct TableRows {
    int64_t token, type, position;
};

__device__ inline TableRows look_up(const Lookups& lookups, int64_t b, int64_t s) {
    const auto start = [](const Table& table, int64_t id) { return clamped(id, table.rows) * table.stride; };
    TableRows row = {start(lookups.token, id_at(lookups.ids, b, s)), 0, 0};
    if (lookups.type_ids.data) row.type = start(lookups.type, id_at(lookups.type_ids, b, s));
    if (lookups.position.data)
        row.position = start(lookups.position, lookups.position_ids.data ? id_at(lookups.position_ids, b, s) : s);
    return row;
}

// Columns n .. n + kVec - 1 of their sum.
template <typename T, int kVec>
__device__ void load_sum(const Lookups& lookups, const TableRows& row, int64_t n, float (&x)[kVec]) {
    load<kVec>(static_cast<const T*>(lookups.token.data) + row.token + n, x);
    float v[kVec];
    if (lookups.type.data) {
        load_either<T>(lookups.type.data, lookups.type.wide, row.type + n, v);
        add(x, v);
    }
    if (lookups.position.data) {
        load_either<T>(lookups.position.data, lookups.position.wide, row.position + n, v);
        add(x, v);
    }
}

// The columns of one of the kRowThreads threads that own a row: visit(i, n) for each of its vectors, which are columns
// n .. n + kVec - 1. There are up to kHeld, and i counts them; with kHeld = 0 there are any number, and i is 0.
template <int kVec, int kRowThreads, int kHeld, typename Visit>
__device__ void each_vector(int64_t C, Visit visit) {
    const int thread = threadIdx.x % kRowThreads;
    if constexpr (kHeld > 0) {
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int n = (i * kRowThreads + thread) * kVec;
            if (n < C) visit(i, n);
        }
    } else {
        for (int64_t n = thread * kVec; n < C; n += kRowThreads * kVec) visit(0, n);
    }
}

template <typename T, int kVec, int kRowThreads, int kHeld>
__global__ void __launch_bounds__(kRowThreads == 32 ? 128 : kRowThreads, 1)
    embeddings_fwd_kernel(Lookups lookups, T* gY, float* gMean, float* gRstd, RowDropout dropout, int64_t M, int64_t S,
                          int64_t C, float eps) {
    constexpr int kRows = kRowThreads == 32 ? 4 : 1;
    const int64_t m = int64_t{blockIdx.x} * kRows + threadIdx.x / kRowThreads;
    if (m >= M) return;  // a whole warp; where a block owns the row, there is one for each
    const TableRows row = look_up(lookups, m / S, m % S);
    const auto each = [&](auto visit) { each_vector<kVec, kRowThreads, kHeld>(C, visit); };

    float x[kHeld ? kHeld : 1][kVec];
    float mean = 0, rest = 0, rstd = 1;
    if (kHeld) each([&](int i, int64_t n) { load_sum<T>(lookups, row, n, x[i]); });
    if (lookups.weight) {
        float sum = 0;
        each([&](int i, int64_t n) {
            if (!kHeld) load_sum<T>(lookups, row, n, x[i]);
#pragma unroll
            for (int j = 0; j < kVec; j++) sum += x[i][j];
        });
        mean = group_sum<kRowThreads>(sum) / static_cast<float>(C);
        float sums[2] = {};
        each([&](int i, int64_t n) {
            if (!kHeld) load_sum<T>(lookups, row, n, x[i]);
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                const float centred = x[i][j] - mean;
                sums[0] += centred;
                sums[1] += centred * centred;
            }
        });
        group_sum<kRowThreads>(sums);
        rest = sums[0] / static_cast<float>(C);  // what rounding has left in the mean
        const float variance = sums[1] / static_cast<float>(C) - rest * rest;
        rstd = __frsqrt_rn((variance < 0 ? 0.0f : variance) + eps);
        if (threadIdx.x % kRowThreads == 0) {
            gMean[m] = mean + rest;
            gRstd[m] = rstd;
        }
    }

    RowDropoutKey key;
    if (dropout.seed) key = row_dropout_key(dropout);
    each([&](int i, int64_t n) {
        if (!kHeld) load_sum<T>(lookups, row, n, x[i]);
        if (lookups.weight) {
            float w[kVec];
            load_either<T>(lookups.weight, lookups.weight_wide, n, w);
#pragma unroll
            for (int j = 0; j < kVec; j++) x[i][j] = (x[i][j] - mean - rest) * rstd * w[j];
            if (lookups.bias) {
                load_either<T>(lookups.bias, lookups.bias_wide, n, w);
                add(x[i], w);
            }
        }
        if (dropout.seed) drop<kVec>(key, m, n, x[i]);
        store<kVec>(gY + m * C + n, x[i]);
    });
}

// dx, and the sums that launchers.h names. A group of kRowThreads threads walks rows as one thread of
// add_positional_encoding_bwd_kernel does. With kHeld = 0 a row is read twice and the sums stay in memory, where each
// number is one thread's.
template <typename T, int kVec, int kRowThreads, int kHeld, int kBlock>
__global__ void __launch_bounds__(kBlock, kBlock == 256 ? 2 : kRowThreads == 32 ? 3 : 1)
    embeddings_bwd_kernel(const T* gDy, Rows rows, Lookups lookups, const float* gMean, const float* gRstd, T* gDx,
                          float* gSums, float* gNormSums, RowDropout dropout, Walk walk) {
    constexpr int kGroups = kBlock / kRowThreads, kSome = kHeld ? kHeld : 1;
    static_assert(kHeld > 0 || kGroups == 1);
    const int64_t group = int64_t{blockIdx.x} * kGroups + threadIdx.x / kRowThreads;
    const int64_t b_first = group / walk.s_lanes, C = walk.C;
    RowDropoutKey key;
    if (dropout.seed) key = row_dropout_key(dropout);
    const auto each = [&](auto visit) { each_vector<kVec, kRowThreads, kHeld>(C, visit); };
    const auto norm_sums = [&](int64_t n) { return gNormSums + int64_t{blockIdx.x} * 2 * C + n; };

    float dw[kSome][kVec] = {}, db[kSome][kVec] = {};
    bool begun = false;  // norm_sums in memory
    for (int64_t s = b_first < walk.b_lanes ? group % walk.s_lanes : walk.S; s < walk.S; s += walk.s_lanes) {
        float sum[kSome][kVec] = {};
        const auto sums = [&](int64_t n) { return gSums + (b_first * walk.S + s) * C + n; };
        TableRows next = look_up(lookups, b_first, s);
        for (int64_t b = b_first; b < walk.B; b += walk.b_lanes) {
            const int64_t m = b * walk.S + s;
            const T* dy = gDy + b * rows.stride_outer + s * rows.stride_inner;
            const TableRows row = next;
            if (b + walk.b_lanes < walk.B) next = look_up(lookups, b + walk.b_lanes, s);
            const float mean = gMean[m], rstd = gRstd[m];

            float g[kSome][kVec], xhat[kSome][kVec];
            const auto load_row = [&](int i, int64_t n) {
                load<kVec>(dy + n * rows.stride_n, g[i]);
                load_sum<T>(lookups, row, n, xhat[i]);
                if (dropout.seed) drop<kVec>(key, m, n, g[i]);
#pragma unroll
                for (int j = 0; j < kVec; j++) xhat[i][j] = (xhat[i][j] - mean) * rstd;
            };
            const auto times_weight = [&](int i, int64_t n) {
                float w[kVec];
                load_either<T>(lookups.weight, lookups.weight_wide, n, w);
#pragma unroll
                for (int j = 0; j < kVec; j++) g[i][j] *= w[j];
            };

            if (kHeld) each(load_row);
            float means[2] = {};  // of g and of g * xhat
            each([&](int i, int64_t n) {
                if (!kHeld) load_row(i, n);
#pragma unroll
                for (int j = 0; j < kVec; j++) {
                    dw[i][j] = (kHeld ? dw[i][j] : 0.0f) + g[i][j] * xhat[i][j];
                    db[i][j] = (kHeld ? db[i][j] : 0.0f) + g[i][j];
                }
                if (!kHeld && gNormSums) {
                    accumulate(norm_sums(n), dw[i], begun);
                    accumulate(norm_sums(C + n), db[i], begun);
                }
                times_weight(i, n);
#pragma unroll
                for (int j = 0; j < kVec; j++) {
                    means[0] += g[i][j];
                    means[1] += g[i][j] * xhat[i][j];
                }
            });
            begun = true;
            group_sum<kRowThreads>(means);
            for (float& v : means) v /= static_cast<float>(C);
            each([&](int i, int64_t n) {
                if (!kHeld) {
                    load_row(i, n);
                    times_weight(i, n);
                }
                float dx[kVec];
#pragma unroll
                for (int j = 0; j < kVec; j++) dx[j] = (g[i][j] - means[0] - xhat[i][j] * means[1]) * rstd;
                if (gDx) store<kVec>(gDx + m * C + n, dx);
                if (kHeld)
                    add(sum[i], dx);
                else if (gSums)
                    accumulate(sums(n), dx, b > b_first);
            });
        }
        if (kHeld && gSums) each([&](int i, int64_t n) { store<kVec>(sums(n), sum[i]); });
    }

    if constexpr (kHeld > 0) {
        if (!gNormSums) return;
        // Group after group adds its own, and the last one has them all.
        if constexpr (kGroups > 1) {
            SMEM_ARRAY(float, sNorm, [2][kRowThreads * kHeld * kVec]);
            for (int turn = 0; turn < kGroups; turn++) {
                if (turn == threadIdx.x / kRowThreads)
                    each([&](int i, int64_t n) {
#pragma unroll
                        for (int j = 0; j < kVec; j++) {
                            if (turn > 0) {
                                dw[i][j] += sNorm[0][n + j];
                                db[i][j] += sNorm[1][n + j];
                            }
                            sNorm[0][n + j] = dw[i][j];
                            sNorm[1][n + j] = db[i][j];
                        }
                    });
                __syncthreads();
            }
        }
        if (threadIdx.x / kRowThreads == kGroups - 1)
            each([&](int i, int64_t n) {
                store<kVec>(norm_sums(n), dw[i]);
                store<kVec>(norm_sums(C + n), db[i]);
            });
    }
}

constexpr int kSlices = kThreads / 32;  // of one sum, each a warp's

// Adds the slices of a sum, warp by warp, over the block; warp 0 has the result. Lanes are columns.
template <int kVec>
__device__ void join_slices(float (&v)[kVec]) {
    SMEM_ARRAY(float, sPart, [kSlices][kVec][32]);
    const int slice = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kVec; i++) sPart[slice][i][lane] = v[i];
    __syncthreads();
    if (slice == 0)
#pragma unroll
        for (int other = 1; other < kSlices; other++)
#pragma unroll
            for (int i = 0; i < kVec; i++) v[i] += sPart[other][i][lane];
}

// The sum of partials[g, r] over g: first[r] for r below split, second[r - split] from there on.
template <int kVec>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* gPartials, int64_t stride_g, int64_t G, int64_t R, int64_t split, void* gFirst,
                        int first_dtype, void* gSecond, int second_dtype) {
    const int64_t r = (int64_t{blockIdx.x} * 32 + threadIdx.x % 32) * kVec;
    float sum[kVec] = {};
    if (r < R)
#pragma unroll 4
        for (int64_t g = threadIdx.x / 32; g < G; g += kSlices) {
            float v[kVec];
            load<kVec>(gPartials + g * stride_g + r, v);
            add(sum, v);
        }
    join_slices<kVec>(sum);
    if (r >= R || threadIdx.x >= 32) return;
    if (r < split)
        store_as<kVec>(gFirst, first_dtype, r, sum);
    else if (gSecond)
        store_as<kVec>(gSecond, second_dtype, r - split, sum);
}

// out[id] = the sum of dx over the rows of that id, for the runs inside this thread's chunk of the sorted rows.
// The sum of a run that began in an earlier chunk goes to partials[chunk, 0], of one that goes on in the next to
// partials[chunk, 1]; segment_join_kernel adds those. Rows of id `skip` are left alone.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    segment_sum_kernel(const T* gDx, Rows rows, const int32_t* gKeys, const int64_t* gOrder, void* gOut, int out_dtype,
                       float* gPartials, RowDropout dropout, int64_t M, int64_t C, int64_t V, int64_t skip, int chunk) {
    constexpr int kAhead = 4;  // rows on their way at once
    const int64_t groups = (C + kVec - 1) / kVec;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, index = thread / groups;
    const int64_t n = thread % groups * kVec, first = index * chunk;
    if (first >= M) return;
    const int64_t end = first + chunk < M ? first + chunk : M;
    const T* dx = gDx + n * rows.stride_n;
    float* partials = gPartials + index * 2 * C + n;
    RowDropoutKey key;
    if (dropout.seed) key = row_dropout_key(dropout);
    const int32_t top = V - 1 < INT32_MAX ? static_cast<int32_t>(V - 1) : INT32_MAX;
    const auto id_of = [&](int64_t j) { return j < 0 || j >= M ? -1 : min(max(gKeys[j], 0), top); };

    const int32_t before = id_of(first - 1);
    float sum[kVec] = {};
    for (int64_t j0 = first; j0 < end; j0 += kAhead) {
        int32_t ids[kAhead + 1];
        int64_t m[kAhead];
        Vec<T, kVec> next[kAhead];
#pragma unroll
        for (int a = 0; a <= kAhead; a++) ids[a] = id_of(j0 + a);
#pragma unroll
        for (int a = 0; a < kAhead; a++)
            if (j0 + a < end && ids[a] != skip) {
                m[a] = gOrder[j0 + a];
                next[a] = load_raw<kVec>(dx + row_start(rows, m[a]));
            }
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
            if (j0 + a >= end || ids[a] == skip) continue;
            float v[kVec];
            widen<kVec>(next[a], v);
            if (dropout.seed) drop<kVec>(key, m[a], n, v);
            add(sum, v);
            const bool run_ends = ids[a + 1] != ids[a];
            if (!run_ends && j0 + a + 1 < end) continue;
            if (ids[a] == before)
                store<kVec>(partials, sum);
            else if (!run_ends)
                store<kVec>(partials + C, sum);
            else
                store_as<kVec>(gOut, out_dtype, int64_t{ids[a]} * C + n, sum);
#pragma unroll
            for (int i = 0; i < kVec; i++) sum[i] = 0;
        }
    }
}

// out[id] for the run of an id that begins in this block's chunk and goes on: its end there plus the beginnings that
// continue it, which lie in the chunks whose first id it is.
template <int kVec>
__global__ void __launch_bounds__(kThreads)
    segment_join_kernel(const int32_t* gKeys, const float* gPartials, void* gOut, int out_dtype, int64_t M, int64_t C,
                        int64_t V, int64_t skip, int chunk) {
    const int64_t tiles = (C + 32 * kVec - 1) / (32 * kVec), index = blockIdx.x / tiles;
    const int64_t n = (blockIdx.x % tiles * 32 + threadIdx.x % 32) * kVec;
    const auto id_of = [&](int64_t j) { return clamped(gKeys[j], V); };

    const int64_t id = id_of((index + 1) * chunk - 1);  // the grid has no block for the last chunk
    if (id == skip || id_of((index + 1) * chunk) != id) return;
    if (index > 0 && id_of(index * chunk - 1) == id) return;  // began earlier
    int64_t last = index + 1, past = (M + chunk - 1) / chunk;
    while (past - last > 1) {
        const int64_t middle = last + (past - last) / 2;
        (id_of(middle * chunk) == id ? last : past) = middle;
    }

    float sum[kVec] = {};
    if (n < C)
#pragma unroll 4
        for (int64_t i = index + threadIdx.x / 32; i <= last; i += kSlices) {
            float v[kVec];
            load<kVec>(gPartials + (i * 2 + (i == index)) * C + n, v);
            add(sum, v);
        }
    join_slices<kVec>(sum);
    if (n < C && threadIdx.x < 32) store_as<kVec>(gOut, out_dtype, id * C + n, sum);
}

template <typename T_, int kVec_>
struct Access {
    using T = T_;
    static constexpr int kVec = kVec_;
};

// use(Access<T, kVec>) for the dtype of the rows, by vectors of 16 bytes or one column at a time.
template <typename Use>
int with_access(int dtype, bool vectors, Use use) {
    if (dtype == kFloat16) return vectors ? use(Access<__half, 8>()) : use(Access<__half, 1>());
    if (dtype == kBFloat16) return vectors ? use(Access<__nv_bfloat16, 8>()) : use(Access<__nv_bfloat16, 1>());
    return vectors ? use(Access<float, 4>()) : use(Access<float, 1>());
}

int vector_width(int dtype) { return dtype == kFloat32 ? 4 : 8; }

bool even(int64_t length, int width) { return length % width == 0; }

bool fits_vectors(const void* data, const Rows& rows, int width) {
    return aligned(data) && rows.stride_n == 1 && even(rows.stride_outer, width) && even(rows.stride_inner, width);
}

bool fits_vectors(const Table& table, int width) { return aligned(table.data) && even(table.stride, width); }

int64_t blocks(int64_t items, int64_t each) { return (items + each - 1) / each; }

int64_t walk_blocks(const Walk& walk, int width) {
    return blocks(walk.b_lanes * walk.s_lanes * blocks(walk.C, width), kThreads);
}

bool fits_vectors(const Lookups& lookups, int64_t C, int width) {
    for (const Table* table : {&lookups.token, &lookups.type, &lookups.position})
        if (!fits_vectors(*table, width)) return false;
    return even(C, width) && aligned(lookups.weight) && aligned(lookups.bias);
}

template <typename Kernel>
struct Choice {
    Kernel kernel;
    int block;  // threads
    int rows;   // of a block at a time
};

// Widest rows of each variant, ascending; never timed on a GPU.
constexpr int64_t kFwdWidths[] = {1024, 8192, 8193};
constexpr int64_t kBwdWidths[] = {512, 1024, 4096, 4097};

template <typename T, int kVec>
auto choose_fwd(int64_t C) {
    using Kernel = decltype(&embeddings_fwd_kernel<T, kVec, 512, 0>);
    if constexpr (kVec > 1) {
        if (C <= kFwdWidths[0]) return Choice<Kernel>{embeddings_fwd_kernel<T, kVec, 32, 32 / kVec>, 128, 4};
        if (C <= kFwdWidths[1]) return Choice<Kernel>{embeddings_fwd_kernel<T, kVec, 256, 32 / kVec>, 256, 1};
    } else if (C <= kFwdWidths[0]) {  // columns in registers would need as many addresses beside them
        return Choice<Kernel>{embeddings_fwd_kernel<T, kVec, 32, 0>, 128, 4};
    }
    return Choice<Kernel>{embeddings_fwd_kernel<T, kVec, 512, 0>, 512, 1};
}

template <typename T, int kVec>
auto choose_bwd(int64_t C) {
    using Kernel = decltype(&embeddings_bwd_kernel<T, kVec, 512, 0, 512>);
    if constexpr (kVec > 1) {
        if (C <= kBwdWidths[0]) return Choice<Kernel>{embeddings_bwd_kernel<T, kVec, 32, 16 / kVec, 128>, 128, 4};
        if (C <= kBwdWidths[1]) return Choice<Kernel>{embeddings_bwd_kernel<T, kVec, 128, 8 / kVec, 128>, 128, 1};
        if (C <= kBwdWidths[2]) return Choice<Kernel>{embeddings_bwd_kernel<T, kVec, 256, 16 / kVec, 256>, 256, 1};
    } else if (C <= kBwdWidths[0]) {
        return Choice<Kernel>{embeddings_bwd_kernel<T, kVec, 32, 0, 32>, 32, 1};
    }
    return Choice<Kernel>{embeddings_bwd_kernel<T, kVec, 512, 0, 512>, 512, 1};
}

// A grid has up to 2^31 - 1 blocks.
bool too_many(int64_t blocks) { return blocks > INT32_MAX; }

template <typename Kernel>
int loaded(Kernel kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

}  // namespace

extern "C" int add_positional_encoding_fwd(const void* x, Rows rows, Table table, Ids ids, void* y, RowDropout dropout,
                                           Walk walk, int64_t offset, int dtype, float scale, void* stream) {
    const int width = vector_width(dtype);
    const bool vectors =
        even(walk.C, width) && fits_vectors(x, rows, width) && aligned(y) && fits_vectors(table, width);
    const auto step = static_cast<int64_t>(std::ldexp(2 * std::log2(10000.0) / static_cast<double>(walk.C), 56));
    return with_access(dtype, vectors, [&](auto access) -> int {
        using A = decltype(access);
        using T = typename A::T;
        const int64_t grid = walk_blocks(walk, A::kVec);
        if (too_many(grid)) return cudaErrorInvalidConfiguration;
        return KLAUNCH((add_positional_encoding_fwd_kernel<T, A::kVec>), static_cast<unsigned>(grid), kThreads, 0,
                       stream, static_cast<const T*>(x), rows, table, ids, static_cast<T*>(y), dropout, walk, offset,
                       step, scale);
    });
}

extern "C" int add_positional_encoding_bwd(const void* dy, Rows rows, void* dx, void* sums, RowDropout dropout,
                                           Walk walk, int dtype, int sums_dtype, float scale, void* stream) {
    const int width = vector_width(dtype);
    const bool vectors = even(walk.C, width) && fits_vectors(dy, rows, width) && aligned(dx) && aligned(sums);
    return with_access(dtype, vectors, [&](auto access) -> int {
        using A = decltype(access);
        using T = typename A::T;
        const int64_t grid = walk_blocks(walk, A::kVec);
        if (too_many(grid)) return cudaErrorInvalidConfiguration;
        return KLAUNCH((add_positional_encoding_bwd_kernel<T, A::kVec>), static_cast<unsigned>(grid), kThreads, 0,
                       stream, static_cast<const T*>(dy), rows, static_cast<T*>(dx), sums, sums_dtype, dropout, walk,
                       scale);
    });
}

extern "C" int embeddings_fwd(Lookups lookups, void* y, float* mean, float* rstd, RowDropout dropout, int64_t B,
                              int64_t S, int64_t C, int dtype, float eps, void* stream) {
    const bool vectors = fits_vectors(lookups, C, vector_width(dtype)) && aligned(y);
    return with_access(dtype, vectors, [&](auto access) -> int {
        using T = typename decltype(access)::T;
        const auto [kernel, block, rows] = choose_fwd<T, decltype(access)::kVec>(C);
        const int64_t grid = blocks(B * S, rows);
        if (too_many(grid)) return cudaErrorInvalidConfiguration;
        return KLAUNCH(kernel, static_cast<unsigned>(grid), block, 0, stream, lookups, static_cast<T*>(y), mean, rstd,
                       dropout, B * S, S, C, eps);
    });
}

extern "C" int embeddings_bwd(const void* dy, Rows rows, Lookups lookups, const float* mean, const float* rstd,
                              void* dx, float* sums, float* norm_sums, void* dweight, void* dbias, RowDropout dropout,
                              Walk walk, int dtype, int dweight_dtype, int dbias_dtype, void* stream) {
    const int width = vector_width(dtype);
    const bool vectors = fits_vectors(lookups, walk.C, width) && fits_vectors(dy, rows, width) && aligned(dx) &&
                         aligned(sums) && aligned(norm_sums);
    int64_t grid = 0;
    const int code = with_access(dtype, vectors, [&](auto access) -> int {
        using T = typename decltype(access)::T;
        const auto [kernel, block, groups] = choose_bwd<T, decltype(access)::kVec>(walk.C);
        grid = blocks(walk.b_lanes * walk.s_lanes, groups);
        if (too_many(grid)) return cudaErrorInvalidConfiguration;
        return KLAUNCH(kernel, static_cast<unsigned>(grid), block, 0, stream, static_cast<const T*>(dy), rows, lookups,
                       mean, rstd, static_cast<T*>(dx), sums, norm_sums, dropout, walk);
    });
    if (code != cudaSuccess || !norm_sums) return code;
    return sum_partials(norm_sums, 2 * walk.C, grid, 2 * walk.C, walk.C, dweight, dweight_dtype, dbias, dbias_dtype,
                        stream);
}

extern "C" int sum_partials(const float* partials, int64_t stride_g, int64_t G, int64_t R, int64_t split, void* first,
                            int first_dtype, void* second, int second_dtype, void* stream) {
    const bool vectors =
        even(R, 4) && even(split, 4) && even(stride_g, 4) && aligned(partials) && aligned(first) && aligned(second);
    const int64_t grid = blocks(R, vectors ? 32 * 4 : 32);
    if (too_many(grid)) return cudaErrorInvalidConfiguration;
    return KLAUNCH((vectors ? sum_partials_kernel<4> : sum_partials_kernel<1>), static_cast<unsigned>(grid), kThreads,
                   0, stream, partials, stride_g, G, R, split, first, first_dtype, second, second_dtype);
}

extern "C" int segment_sums(const void* dx, Rows rows, const int32_t* keys, const int64_t* order, void* out,
                            float* partials, RowDropout dropout, int64_t M, int64_t C, int64_t V, int64_t skip,
                            int chunk, int dtype, int out_dtype, void* stream) {
    const int width = vector_width(dtype);
    const bool vectors = even(C, width) && fits_vectors(dx, rows, width) && aligned(out) && aligned(partials);
    const int64_t chunks = blocks(M, chunk);
    const int code = with_access(dtype, vectors, [&](auto access) -> int {
        using A = decltype(access);
        using T = typename A::T;
        const int64_t grid = blocks(chunks * blocks(C, A::kVec), kThreads);
        if (too_many(grid)) return cudaErrorInvalidConfiguration;
        return KLAUNCH((segment_sum_kernel<T, A::kVec>), static_cast<unsigned>(grid), kThreads, 0, stream,
                       static_cast<const T*>(dx), rows, keys, order, out, out_dtype, partials, dropout, M, C, V, skip,
                       chunk);
    });
    if (code != cudaSuccess || chunks == 1) return code;
    const int64_t grid = (chunks - 1) * blocks(C, vectors ? 32 * 4 : 32);
    if (too_many(grid)) return cudaErrorInvalidConfiguration;
    return KLAUNCH((vectors ? segment_join_kernel<4> : segment_join_kernel<1>), static_cast<unsigned>(grid), kThreads,
                   0, stream, keys, partials, out, out_dtype, M, C, V, skip, chunk);
}

extern "C" int position_prepare() {
    for (int dtype : {kFloat32, kFloat16, kBFloat16})
        for (bool vectors : {false, true}) {
            const int code = with_access(dtype, vectors, [](auto access) -> int {
                using A = decltype(access);
                using T = typename A::T;
                for (const int code :
                     {loaded(add_positional_encoding_fwd_kernel<T, A::kVec>),
                      loaded(add_positional_encoding_bwd_kernel<T, A::kVec>), loaded(segment_sum_kernel<T, A::kVec>)})
                    if (code != cudaSuccess) return code;
                for (const int64_t C : kFwdWidths)
                    if (const int code = loaded(choose_fwd<T, A::kVec>(C).kernel)) return code;
                for (const int64_t C : kBwdWidths)
                    if (const int code = loaded(choose_bwd<T, A::kVec>(C).kernel)) return code;
                return cudaSuccess;
            });
            if (code != cudaSuccess) return code;
        }
    for (const int code : {loaded(sum_partials_kernel<1>), loaded(sum_partials_kernel<4>),
                           loaded(segment_join_kernel<1>), loaded(segment_join_kernel<4>)})
        if (code != cudaSuccess) return code;
    return cudaSuccess;
}
