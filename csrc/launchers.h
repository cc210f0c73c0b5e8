// What bindings.cpp calls: one launcher a kernel file, plain pointers and a stream in, a cudaError_t out.
#pragma once

#include <cmath>
#include <cstdint>

enum Dtype : int { kFloat32, kFloat16, kBFloat16 };

// The rows of a tensor (..., N): row m starts at m / inner * stride_outer + m % inner * stride_inner, its column n lies
// n * stride_n further. Leading dims that lie evenly in memory are one; inner is 1 where all are. Strides in elements.
struct Rows {
    int64_t inner, stride_outer, stride_inner, stride_n;
};

// Dropout of a row op: `seed` points to two int64 on the device, seed and offset; null where nothing is dropped.
// An element stays, times rescale, where its 16 random bits are not below threshold.
struct RowDropout {
    const int64_t* seed;
    uint32_t threshold;
    float rescale;
};

// For a probability in [0, 1], which is rounded to a multiple of 2^-16, halves to even.
inline RowDropout row_dropout(const int64_t* seed, double p) {
    const auto k = static_cast<uint32_t>(std::nearbyint(p * 65536.0));
    return {seed, k, k < 65536 ? static_cast<float>(65536.0 / (65536 - k)) : 0.0f};
}

// One call of the norms. r = residual + dropout(x), or x itself; y = norm(r). Everything but the inputs of Rows is
// contiguous; null means absent. M and N are at least 1.
struct LayerNormFwd {
    const void *x, *residual;     // (M, N)
    const void *weight, *bias;    // (N,)
    void *y, *r;                  // (M, N)
    float *mean, *rstd;           // (M,)
    Rows x_rows, residual_rows;
    RowDropout dropout;
    int64_t M, N;
    float eps;
    Dtype dtype;  // of x, and of whatever below is not wide, which means fp32
    bool rms;
    bool residual_wide;  // residual and r
    bool weights_wide, y_wide;
};

// Gradients of that, from dy and dr, which is what came for r itself. dx is (M, N) of dtype, through the dropout;
// dresidual of r's. sums and the partial sums are workspace: sums (M, 2), each partial (partial_rows, N), null where that
// gradient is not wanted. A persistent grid has at most partial_rows blocks.
struct LayerNormBwd {
    const void *dy, *dr, *r;      // (M, N)
    const void *weight;           // (N,)
    const float *mean, *rstd;     // (M,)
    void *dx, *dresidual;         // (M, N)
    void *dweight, *dbias;        // (N,) of gradient_dtype
    float *partial_dweight, *partial_dbias, *sums;
    Rows dy_rows, dr_rows, r_rows;
    RowDropout dropout;
    int64_t M, N, partial_rows;
    Dtype dtype, gradient_dtype;
    bool rms;
    bool dy_wide, weights_wide;
    bool r_wide;  // r, dr and dresidual
};

// The rows of a table (rows, C), columns side by side, `stride` elements apart; fp32 where `wide`, else of the dtype of
// the rows it is added to. data is null where there is no table.
struct Table {
    const void* data;
    int64_t rows, stride;
    bool wide;
};

// An id for each row (b, s), int64 where `wide`, else int32; data is null where none are given.
struct Ids {
    const void* data;
    int64_t stride_b, stride_s;
    bool wide;
};

// How threads share the rows (b, s) of (B, S, C): every b_lanes-th b and every s_lanes-th s are one thread's.
// 1 <= b_lanes <= B and 1 <= s_lanes <= S.
struct Walk {
    int64_t B, S, C, b_lanes, s_lanes;
};

// What makes up the rows (b, s) of the embeddings: token[ids] + type[type_ids] + position[position_ids]. Without
// type_ids the type is 0, without position_ids the position is s. weight and bias (C,) of the norm, null without one.
struct Lookups {
    Table token, type, position;
    Ids ids, type_ids, position_ids;
    const void *weight, *bias;
    bool weight_wide, bias_wide;
};

// The dims of a softmax over N, merged by the strides of all tensors together.
struct SoftmaxSizes {
    int64_t A, B, M, N;
};
struct SoftmaxStrides {
    int64_t a, b, m, n;
};

// (B, H, rows, width) of stride-1 width, each row on 16 bytes; stride_b is 0 for packed sequences. Strides in elements.
struct HeadRows {
    void* data;
    int64_t stride_b, stride_h, stride_m;
};

// (B, H, rows) of stride-1 rows.
struct HeadStats {
    float* data;
    int64_t stride_b, stride_h;
};

// (B, H, S_q, S_k), stride 0 where it is broadcast; null where there is none. A mask is bytes.
struct Plane {
    const void* data;
    int64_t stride_b, stride_h, stride_m, stride_n;
    Dtype dtype;
};

// All that happens between q.k and the product with v: logits softcap(scale * q.k) + bias - slope * |distance|, excluded by
// mask, lengths and the band. Null means absent, a softcap of 0 none.
struct AttentionRules {
    Plane bias, mask;
    const float* slopes;                  // (B, H)
    int64_t slopes_stride_b, slopes_stride_h;
    const int32_t *q_lens, *kv_lens;      // (B,), of padded sequences
    const int32_t *cu_q, *cu_k;           // (B + 1,), of packed ones
    RowDropout dropout;                   // its threshold is of 8 bits
    int32_t B, H, group, S_q, S_k, D, Dv; // query head h reads key head h / group
    int32_t left, right;                  // how far a key may lie before and after its query's position; -1: open
    bool bottom_right;                    // whether the last query's position is the last key's
    float scale, softcap;
    Dtype dtype;                          // of q, k, v and o
};

// o, lse = log(sum of exp(logit), sink included), -inf where nothing is attended. D and Dv are multiples of 8 up to 256.
struct AttentionFwd {
    AttentionRules rules;
    HeadRows q, k, v, o;
    HeadStats lse;
    const void* sinks;                    // (H,)
    Dtype sinks_dtype;
    int32_t max_seqlen_q;
};

// A key/value cache (B, H_kv, S, width), or pages (pages, page_size, H_kv, width): stride_b is of its first dim, stride_n of
// positions. Unit stride and rows on 16 bytes, as HeadRows.
struct Cache {
    void* data;
    int64_t stride_b, stride_h, stride_n;
};

// o and lse of the last S_q positions of each sequence, which has lens + S_new of at most `capacity` keys once the new rows
// are in the cache. With several splits parts (B, H, S_q, splits, Dv), tops and sums (B, H, S_q, splits) are workspace.
struct AttentionDecode {
    HeadRows q, o, k_new, v_new;      // new rows (B, H_kv, S_new, width)
    Cache k, v;
    Ids lens, table;                  // (B,), (B, n) of unit stride_s; table is null for a contiguous cache
    const float* slopes;              // (B, H), null where there are none
    int64_t slopes_stride_b, slopes_stride_h;
    const void* sinks;                // (H,)
    Dtype sinks_dtype;
    float *lse, *parts, *tops, *sums; // lse (B, H, S_q)
    int32_t B, H, H_kv, S_q, S_new, capacity, pages, page_size, page_shift;  // page_size is 2 to page_shift, or that is -1
    int32_t splits, left, D, Dv;      // left: how far back a key may lie, -1 for anywhere
    float scale, softcap;
    Dtype dtype;
};

// How a bias' gradient comes about. kPlane: ds as it is, kSum: over the planes it is broadcast over, both in dbias; kColumns,
// kRows: sums over queries or keys of every head in bias_sums, (B, H, S_k) or (B, H, S_q), to be added up further.
enum class BiasGradient : int { kNone, kPlane, kSum, kColumns, kRows };

// Gradients of that for do_, like o, and dlse, like lse; dlse.data is null where it is zero. stats is workspace of
// attention_bwd_stats floats, dsinks (B, H, ceil(max_seqlen_q / kAttentionStatsRows)) to be summed over all but H; null
// where that gradient is not wanted.
struct AttentionBwd {
    AttentionRules rules;
    HeadRows q, k, v, o, do_, dq, dk, dv;
    HeadStats lse, dlse;
    float *stats, *dsinks;
    BiasGradient dbias_of;
    Plane dbias;
    HeadStats bias_sums;
    const void* sinks;                    // (H,)
    Dtype sinks_dtype;
    int32_t max_seqlen_q, max_seqlen_k;
};

constexpr int kAttentionStatsRows = 64;

extern "C" {

int layer_norm_fwd(const LayerNormFwd* call, void* stream);
int layer_norm_bwd(const LayerNormBwd* call, void* stream);

// Loads every kernel of layer_norm.cu onto the current device, which a first launch inside a graph capture could not.
int layer_norm_prepare();

// y (B, S, C) contiguous = dropout(scale * x + E), of `dtype` like x, whose rows have inner = S. E is the table's row
// at ids, or at s + offset where there are none; without a table the sinusoid of that position.
int add_positional_encoding_fwd(const void* x, Rows rows, Table table, Ids ids, void* y, RowDropout dropout, Walk walk,
                                int64_t offset, int dtype, float scale, void* stream);

// dx (B, S, C) contiguous = scale * dropout(dy); sums (b_lanes, S, C) contiguous = dropout(dy) over each lane's b.
// Either may be null.
int add_positional_encoding_bwd(const void* dy, Rows rows, void* dx, void* sums, RowDropout dropout, Walk walk,
                                int dtype, int sums_dtype, float scale, void* stream);

// y (B, S, C) contiguous of the token table's dtype = dropout(norm(x)), x the row that was looked up; mean and rstd
// (B * S,) of x, written where there is a norm.
int embeddings_fwd(Lookups lookups, void* y, float* mean, float* rstd, RowDropout dropout, int64_t B, int64_t S,
                   int64_t C, int dtype, float eps, void* stream);

// Backward of that with a norm. dx (B, S, C) contiguous, of x; sums (b_lanes, S, C) = dx summed over each lane's b;
// dweight, dbias (C,) by way of norm_sums (b_lanes * s_lanes, 2, C). Any of them may be null, dweight with norm_sums.
int embeddings_bwd(const void* dy, Rows rows, Lookups lookups, const float* mean, const float* rstd, void* dx,
                   float* sums, float* norm_sums, void* dweight, void* dbias, RowDropout dropout, Walk walk, int dtype,
                   int dweight_dtype, int dbias_dtype, void* stream);

// out (R,) = partials (G, R) summed over G, rows of partials stride_g apart. The columns from `split` on are those of a
// second array.
int sum_partials(const float* partials, int64_t stride_g, int64_t G, int64_t R, int64_t split, void* first,
                 int first_dtype, void* second, int second_dtype, void* stream);

// Sums the M rows of dx, dropped out, into those of out (V, C) contiguous that keys name, except `skip`: keys (M,) are
// the sorted ids, order (M,) the row of each. Rows of out that no key names are left alone. partials is workspace of
// 2 * ceil(M / chunk) * C fp32.
int segment_sums(const void* dx, Rows rows, const int32_t* keys, const int64_t* order, void* out, float* partials,
                 RowDropout dropout, int64_t M, int64_t C, int64_t V, int64_t skip, int chunk, int dtype, int out_dtype,
                 void* stream);

int position_prepare();

// Softmax over N of x rounded to y_dtype, or its logarithm. masked: of scale * x where mask (bytes; null: everywhere) and,
// if causal, n <= m; a row with nothing attended is 0. Strides in elements. No size is 0.
int softmax_fwd(const void* x, const void* mask, void* y, SoftmaxStrides stride_x, SoftmaxStrides stride_mask,
                SoftmaxStrides stride_y, SoftmaxSizes sizes, int x_dtype, int y_dtype, float scale, bool log,
                bool masked, bool causal, void* stream);

// dx of softmax_fwd's y, with y's strides.
int softmax_bwd(const void* dy, const void* y, void* dx, SoftmaxStrides stride_dy, SoftmaxStrides stride_y,
                SoftmaxSizes sizes, int dy_dtype, int y_dtype, int dx_dtype, float scale, bool log, bool causal,
                void* stream);

// Loads every kernel of softmax.cu onto the current device.
int softmax_prepare();

// dtype is 16 bits wide.
int attention_fwd(const AttentionFwd* call, void* stream);
int attention_prepare();

// Hopper's own kernel, attention_sm90.cu, which attention_fwd hands every call that it serves: a sentence if it does not.
const char* attention_sm90_why_not(const AttentionFwd* call);
int attention_sm90_fwd(const AttentionFwd* call, void* stream);
int attention_sm90_prepare();

// dtype is 16 bits wide. Appends first, where S_new is not 0.
int attention_decode(const AttentionDecode* call, void* stream);
int attention_decode_prepare();

int attention_bwd(const AttentionBwd* call, void* stream);
int64_t attention_bwd_stats(const AttentionRules* rules);
int attention_backward_prepare();
}
