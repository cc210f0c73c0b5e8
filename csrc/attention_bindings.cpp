// Attention at Python's side: checks the tensors, then launches.

#include <algorithm>
#include <cmath>

#include "binding.h"
#include "launchers.h"

namespace {

// The tensors of one call, beside q: (B, H, S_q, D), or packed (T_q, H, D).
class Heads : public Call {
  public:
    explicit Heads(const Tensor& q) : Call(q), dtype(q.dtype()), packed(q.dl.ndim == 3) {
        q.require(q.dl.ndim == 3 || q.dl.ndim == 4, "(B, H, S, D), or packed (T, H, D)");
        q.require(dtype != kFloat32, "float16 or bfloat16");
    }

    int64_t heads(const Tensor& t) const { return t.dl.shape[1]; }
    int64_t rows(const Tensor& t) const { return t.dl.shape[packed ? 0 : 2]; }
    int64_t width(const Tensor& t) const { return t.dl.shape[t.dl.ndim - 1]; }

    HeadRows rows_of(const Tensor& t, int64_t B, int64_t H, int64_t S, int64_t W) const {
        const bool shaped = t.dl.ndim == (packed ? 3 : 4) && (packed || t.dl.shape[0] == B) && heads(t) == H && rows(t) == S &&
                            width(t) == W;
        if (!shaped || t.dtype() != dtype || !beside(t) || W % 8 || W > 256)
            t.refuse("of q's dtype and device, " + std::to_string(H) + " heads of " + std::to_string(S) + " rows of " +
                     std::to_string(W) + ", a multiple of 8 up to 256");
        if (t.numel() == 0) return {t.data(), 0, 0, 0};
        const int64_t* stride = t.dl.strides;
        const HeadRows at{t.data(), packed ? 0 : stride[0], stride[1], stride[packed ? 0 : 2]};
        const bool sixteen = reinterpret_cast<uintptr_t>(at.data) % 16 == 0 && at.stride_b % 8 == 0 &&
                             at.stride_h % 8 == 0 && at.stride_m % 8 == 0;
        t.require(sixteen && (W == 1 || stride[t.dl.ndim - 1] == 1), "rows of unit stride that each start on 16 bytes");
        return at;
    }

    HeadStats stats_of(const Tensor& t, int64_t B, int64_t H, int64_t S) const {
        const bool shaped = t.dl.ndim == (packed ? 2 : 3) && t.dl.shape[t.dl.ndim - 2] == H && t.dl.shape[t.dl.ndim - 1] == S &&
                            (packed || t.dl.shape[0] == B);
        if (!shaped || t.dtype() != kFloat32 || !beside(t) || (S > 1 && t.dl.strides[t.dl.ndim - 1] != 1))
            t.refuse("float32 (B, H, S_q), or packed (H, T_q), of unit stride on q's device");
        return {reinterpret_cast<float*>(t.data()), packed ? 0 : t.dl.strides[0], t.dl.strides[packed ? 0 : 1]};
    }

    Plane plane(py::handle object, const char* name, const AttentionRules& r) const {
        if (object.is_none()) return {};
        const Tensor t(object, name);
        const int64_t shape[] = {r.B, r.H, r.S_q, r.S_k};
        bool fits = t.dl.ndim == 4 && beside(t);
        for (int d = 0; d < 4 && fits; d++) fits = t.dl.shape[d] == shape[d];
        t.require(fits, "(B, H, S_q, S_k) on q's device");
        const int64_t* stride = t.dl.strides;
        const bool mask = std::string(name) == "mask";
        if (mask) t.require(t.dtype_name() == "bool", "bool");
        return {t.data(), stride[0], stride[1], stride[2], stride[3], mask ? kFloat32 : t.dtype()};
    }

    const int32_t* ints(py::handle object, const char* name, int64_t count) const {
        if (object.is_none()) return nullptr;
        const Tensor t(object, name);
        t.require(beside(t) && t.contiguous() && t.numel() == count && t.dtype_name() == "int32",
                  "int32 (" + std::to_string(count) + ",), contiguous, on q's device");
        return reinterpret_cast<const int32_t*>(t.data());
    }

    RowDropout dropout(py::handle object, double p) const {
        if (object.is_none()) return {};
        const Tensor seed(object, "seed");
        seed.require(beside(seed) && seed.contiguous() && seed.numel() == 2 && seed.dtype_name() == "int64",
                     "int64 (2,), contiguous, on q's device");
        const auto k = static_cast<uint32_t>(std::nearbyint(p * 256.0));
        return {reinterpret_cast<const int64_t*>(seed.data()), k, k < 256 ? static_cast<float>(256.0 / (256 - k)) : 0.0f};
    }

    void sinks(py::handle object, const AttentionRules& r, const void*& data, Dtype& dtype_of) const {
        if (object.is_none()) return;
        const Tensor t(object, "sinks");
        t.require(beside(t) && t.contiguous() && t.numel() == r.H, "(H,), contiguous, on q's device");
        data = t.data();
        dtype_of = t.dtype();
    }

    // What sizes the grid: the longest packed sequence, as far as it can be, or all rows.
    int32_t longest(int64_t max_seqlen, int64_t S) const {
        return static_cast<int32_t>(packed ? std::min<int64_t>(std::max<int64_t>(max_seqlen, 0), S) : S);
    }

    Dtype dtype;
    bool packed;
};

// What stands between the tensors of every direction and their scalars, in the order of the launchers in Python.
struct Given {
    py::handle bias, mask, slopes, q_lens, kv_lens, cu_q, cu_k, seed;
    int causal;
    int64_t left, right;
    double softcap, dropout_p, scale;
};

AttentionRules rules_of(const Heads& call, const Tensor& q, const Tensor& k, const Tensor& v, const Given& given) {
    AttentionRules r{};
    if (call.packed != !given.cu_q.is_none() || call.packed != !given.cu_k.is_none())
        q.refuse("packed (T, H, D) with cu_seqlens, (B, H, S, D) without");
    const int64_t B = call.packed ? Tensor(given.cu_q, "cu_seqlens_q").numel() - 1 : q.dl.shape[0];
    const int64_t H = call.heads(q), H_kv = call.heads(k), S_q = call.rows(q), S_k = call.rows(k);
    if (S_q + S_k > INT32_MAX || B * H > INT32_MAX) q.refuse("shorter: positions and heads are counted in 31 bits");
    if (H_kv < 1 ? H > 0 : H % H_kv) q.refuse("of a number of heads that is a multiple of k's");
    r.B = static_cast<int32_t>(B);
    r.H = static_cast<int32_t>(H);
    r.group = H_kv ? static_cast<int32_t>(H / H_kv) : 1;
    r.S_q = static_cast<int32_t>(S_q);
    r.S_k = static_cast<int32_t>(S_k);
    r.D = static_cast<int32_t>(call.width(q));
    r.Dv = static_cast<int32_t>(call.width(v));
    r.bias = call.plane(given.bias, "bias", r);
    r.mask = call.plane(given.mask, "mask", r);
    if (!given.slopes.is_none()) {
        const Tensor slopes(given.slopes, "alibi_slopes");
        const bool each = slopes.dl.ndim == 2;
        slopes.require(call.beside(slopes) && slopes.dtype() == kFloat32 && (each || slopes.dl.ndim == 1) &&
                           slopes.dl.shape[each] == H && (!each || slopes.dl.shape[0] == B),
                       "float32 (H,) or (B, H) on q's device");
        r.slopes = reinterpret_cast<const float*>(slopes.data());
        r.slopes_stride_b = each ? slopes.dl.strides[0] : 0;
        r.slopes_stride_h = slopes.dl.strides[each];
    }
    r.q_lens = call.ints(given.q_lens, "q_lens", B);
    r.kv_lens = call.ints(given.kv_lens, "kv_lens", B);
    r.cu_q = call.ints(given.cu_q, "cu_seqlens_q", B + 1);
    r.cu_k = call.ints(given.cu_k, "cu_seqlens_k", B + 1);
    r.dropout = call.dropout(given.seed, given.dropout_p);
    const int64_t furthest = S_q + S_k;
    const auto reach = [&](int64_t w) { return static_cast<int32_t>(w < 0 ? -1 : w < furthest ? w : furthest); };
    r.left = reach(given.left);
    r.right = given.causal ? 0 : reach(given.right);
    r.bottom_right = given.causal == 2;
    r.scale = static_cast<float>(given.scale);
    r.softcap = static_cast<float>(given.softcap);
    r.dtype = call.dtype;
    return r;
}

py::object launch(const Heads& call, const AttentionFwd& f) {
    call.run("attention_fwd", [&](void* stream) { return attention_fwd(&f, stream); });
    return py::none();
}

// Why attention_fwd would not run such a call on Hopper's own kernel, or None.
py::object sm90_why_not(const Heads&, const AttentionFwd& f) {
    const char* const reason = attention_sm90_why_not(&f);
    return reason ? py::object(py::str(reason)) : py::object(py::none());
}

template <py::object (*kUse)(const Heads&, const AttentionFwd&)>
py::object forward(py::handle q_, py::handle k_, py::handle v_, py::handle o_, py::handle lse_, py::handle bias,
                   py::handle mask, py::handle slopes, py::handle sinks, py::handle q_lens, py::handle kv_lens,
                   py::handle cu_q, py::handle cu_k, py::handle seed, int64_t max_seqlen_q, int causal, int64_t left,
                   int64_t right, double softcap, double dropout_p, double scale) {
    const Tensor q(q_, "q"), k(k_, "k"), v(v_, "v"), o(o_, "o"), lse(lse_, "lse");
    const Heads call(q);
    AttentionFwd f{};
    f.rules = rules_of(call, q, k, v, {bias, mask, slopes, q_lens, kv_lens, cu_q, cu_k, seed, causal, left, right, softcap,
                                       dropout_p, scale});
    const AttentionRules& r = f.rules;
    f.q = call.rows_of(q, r.B, r.H, r.S_q, r.D);
    f.k = call.rows_of(k, r.B, r.H / r.group, r.S_k, r.D);
    f.v = call.rows_of(v, r.B, r.H / r.group, r.S_k, r.Dv);
    f.o = call.rows_of(o, r.B, r.H, r.S_q, r.Dv);
    f.lse = call.stats_of(lse, r.B, r.H, r.S_q);
    call.sinks(sinks, r, f.sinks, f.sinks_dtype);
    f.max_seqlen_q = call.longest(max_seqlen_q, r.S_q);
    return kUse(call, f);
}

void backward(py::handle do__, py::handle dlse, py::handle q_, py::handle k_, py::handle v_, py::handle o_, py::handle lse_,
              py::handle dq_, py::handle dk_, py::handle dv_, py::handle stats_, py::handle dsinks, py::handle dbias,
              py::handle bias_sums, int dbias_of, py::handle bias, py::handle mask, py::handle slopes, py::handle sinks, py::handle q_lens, py::handle kv_lens, py::handle cu_q,
              py::handle cu_k, py::handle seed, int64_t max_seqlen_q, int64_t max_seqlen_k, int causal, int64_t left,
              int64_t right, double softcap, double dropout_p, double scale) {
    const Tensor do_(do__, "do"), q(q_, "q"), k(k_, "k"), v(v_, "v"), o(o_, "o"), lse(lse_, "lse");
    const Tensor dq(dq_, "dq"), dk(dk_, "dk"), dv(dv_, "dv"), stats(stats_, "stats");
    const Heads call(q);
    AttentionBwd f{};
    f.rules = rules_of(call, q, k, v, {bias, mask, slopes, q_lens, kv_lens, cu_q, cu_k, seed, causal, left, right, softcap,
                                       dropout_p, scale});
    const AttentionRules& r = f.rules;
    const int64_t H_kv = r.H / r.group;
    f.q = call.rows_of(q, r.B, r.H, r.S_q, r.D);
    f.k = call.rows_of(k, r.B, H_kv, r.S_k, r.D);
    f.v = call.rows_of(v, r.B, H_kv, r.S_k, r.Dv);
    f.o = call.rows_of(o, r.B, r.H, r.S_q, r.Dv);
    f.do_ = call.rows_of(do_, r.B, r.H, r.S_q, r.Dv);
    f.dq = call.rows_of(dq, r.B, r.H, r.S_q, r.D);
    f.dk = call.rows_of(dk, r.B, H_kv, r.S_k, r.D);
    f.dv = call.rows_of(dv, r.B, H_kv, r.S_k, r.Dv);
    f.lse = call.stats_of(lse, r.B, r.H, r.S_q);
    if (!dlse.is_none()) f.dlse = call.stats_of(Tensor(dlse, "dlse"), r.B, r.H, r.S_q);
    const int64_t needed = attention_bwd_stats(&r);
    stats.require(call.beside(stats) && stats.contiguous() && stats.dtype() == kFloat32 && stats.numel() >= needed,
                  "float32, contiguous, of " + std::to_string(needed) + " elements on q's device");
    f.stats = reinterpret_cast<float*>(stats.data());
    f.max_seqlen_q = call.longest(max_seqlen_q, r.S_q);
    f.max_seqlen_k = call.longest(max_seqlen_k, r.S_k);
    if (!dsinks.is_none()) {
        call.sinks(sinks, r, f.sinks, f.sinks_dtype);
        const Tensor sums(dsinks, "dsinks");
        const int64_t tiles = (int64_t{f.max_seqlen_q} + kAttentionStatsRows - 1) / kAttentionStatsRows;
        sums.require(call.beside(sums) && sums.contiguous() && sums.dtype() == kFloat32 && sums.numel() == r.B * tiles * r.H,
                     "float32 (B, H, tiles), contiguous, on q's device");
        f.dsinks = reinterpret_cast<float*>(sums.data());
    }
    f.dbias_of = static_cast<BiasGradient>(dbias_of);
    f.dbias = call.plane(dbias, "dbias", r);
    const bool in_dbias = f.dbias_of == BiasGradient::kPlane || f.dbias_of == BiasGradient::kSum;
    const bool in_sums = f.dbias_of == BiasGradient::kColumns || f.dbias_of == BiasGradient::kRows;
    if (in_dbias != !dbias.is_none() || in_sums != !bias_sums.is_none() || (dbias_of && bias.is_none()))
        q.refuse("with a bias, and dbias or bias_sums, for dbias_of " + std::to_string(dbias_of));
    if (in_sums)
        f.bias_sums = call.stats_of(Tensor(bias_sums, "bias_sums"), r.B, r.H,
                                    f.dbias_of == BiasGradient::kColumns ? r.S_k : r.S_q);
    call.run("attention_bwd", [&](void* stream) { return attention_bwd(&f, stream); });
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_fwd", &forward<launch>);
    m.def("attention_sm90_why_not", &forward<sm90_why_not>);
    m.def("attention_bwd", &backward);
    m.attr("ATTENTION_STATS_ROWS") = kAttentionStatsRows;
}
