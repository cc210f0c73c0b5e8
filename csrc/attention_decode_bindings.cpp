// Decoding at Python's side: checks the tensors, then launches.

#include "binding.h"
#include "launchers.h"

namespace {

// A (a, b, c, width) tensor of q's dtype beside it, of unit stride and rows on 16 bytes.
void require_rows(const Tensor& t, const Call& call, Dtype dtype, const int64_t (&shape)[4]) {
    bool fits = t.dl.ndim == 4 && call.beside(t) && t.dtype() == dtype && shape[3] % 8 == 0 && shape[3] <= 256;
    for (int d = 0; d < 4 && fits; d++) fits = t.dl.shape[d] == shape[d];
    if (fits && t.numel() > 0) {
        fits = t.dl.strides[3] == 1 && reinterpret_cast<uintptr_t>(t.data()) % 16 == 0;
        for (int d = 0; d < 3; d++) fits &= t.dl.shape[d] == 1 || t.dl.strides[d] % 8 == 0;
    }
    if (!fits)
        t.refuse("of q's dtype and device and of shape (" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " +
                 std::to_string(shape[2]) + ", " + std::to_string(shape[3]) +
                 "), the last a multiple of 8 up to 256, its rows of unit stride and each on 16 bytes");
}

HeadRows head_rows(const Tensor& t) { return {t.data(), t.dl.strides[0], t.dl.strides[1], t.dl.strides[2]}; }

Ids integers(const Tensor& t, const Call& call, int ndim, const char* need) {
    const bool whole = t.dl.type_code == 0 && (t.dl.bits == 32 || t.dl.bits == 64);
    t.require(call.beside(t) && whole && t.dl.ndim == ndim &&
                  (t.numel() == 0 || t.dl.shape[ndim - 1] == 1 || t.dl.strides[ndim - 1] == 1),
              need);
    return {t.data(), ndim == 2 ? t.dl.strides[0] : 0, 1, t.dl.bits == 64};
}

float* floats(py::handle object, const char* name, const Call& call, int64_t numel) {
    const Tensor t(object, name);
    t.require(call.beside(t) && t.contiguous() && t.dtype() == kFloat32 && t.numel() == numel,
              std::to_string(numel) + " contiguous float32 on q's device");
    return reinterpret_cast<float*>(t.data());
}

// parts and statistics (tops, then sums) are None with one split.
void decode(py::handle q_, py::handle k_, py::handle v_, py::handle o_, py::handle lse, py::handle lens_, py::handle table,
            py::handle k_new, py::handle v_new, py::handle slopes, py::handle sinks, py::handle parts, py::handle statistics,
            int splits, int64_t left, double softcap, double scale) {
    const Tensor q(q_, "q"), k(k_, "k_cache"), v(v_, "v_cache"), o(o_, "o"), lens(lens_, "cache_lens");
    const Call call(q);
    AttentionDecode a{};
    a.dtype = q.dtype();
    q.require(q.dl.ndim == 4 && a.dtype != kFloat32, "float16 or bfloat16 (B, H, S_q, D)");
    k.require(k.dl.ndim == 4 && v.dl.ndim == 4, "four dims, as v_cache");
    const bool paged = !table.is_none();
    const int64_t B = q.dl.shape[0], H = q.dl.shape[1], S_q = q.dl.shape[2], D = q.dl.shape[3], Dv = v.dl.shape[3];
    const int64_t H_kv = k.dl.shape[paged ? 2 : 1];
    require_rows(q, call, a.dtype, {B, H, S_q, D});
    require_rows(o, call, a.dtype, {B, H, S_q, Dv});
    const auto cache = [&](const Tensor& t, int64_t width) -> Cache {
        const int64_t* shape = k.dl.shape;
        if (paged)
            require_rows(t, call, a.dtype, {shape[0], shape[1], H_kv, width});
        else
            require_rows(t, call, a.dtype, {B, H_kv, shape[2], width});
        return {t.data(), t.dl.strides[0], t.dl.strides[paged ? 2 : 1], t.dl.strides[paged ? 1 : 2]};
    };
    a.k = cache(k, D);
    a.v = cache(v, Dv);
    if (H_kv < 1 ? H > 0 : H % H_kv) q.refuse("of a number of heads that is a multiple of k_cache's");
    a.lens = integers(lens, call, 1, "int32 or int64 (B,) on q's device");
    lens.require(lens.numel() == B, "one number a sequence");
    int64_t capacity = k.dl.shape[2], S_new = 0;
    if (paged) {
        const Tensor t(table, "block_table");
        a.table = integers(t, call, 2, "int32 or int64 (B, n) of unit stride on q's device");
        t.require(t.dl.shape[0] == B, "one row a sequence");
        a.pages = static_cast<int32_t>(k.dl.shape[0]);
        a.page_size = static_cast<int32_t>(k.dl.shape[1]);
        capacity = a.pages ? t.dl.shape[1] * a.page_size : 0;
        if (capacity == 0) a.table = {};
        for (a.page_shift = 0; a.page_shift < 31 && 1 << a.page_shift < a.page_size;) a.page_shift++;
        if (1 << a.page_shift != a.page_size) a.page_shift = -1;
    }
    if (!k_new.is_none()) {
        const Tensor new_k(k_new, "k_new"), new_v(v_new, "v_new");
        new_k.require(new_k.dl.ndim == 4, "(B, H_kv, S_new, D)");
        S_new = new_k.dl.shape[2];
        require_rows(new_k, call, a.dtype, {B, H_kv, S_new, D});
        require_rows(new_v, call, a.dtype, {B, H_kv, S_new, Dv});
        a.k_new = head_rows(new_k);
        a.v_new = head_rows(new_v);
    }
    if (capacity + S_new + S_q > INT32_MAX || B * H > INT32_MAX) q.refuse("shorter: positions and heads have 31 bits");
    a.q = head_rows(q);
    a.o = head_rows(o);
    a.lse = floats(lse, "lse", call, B * H * S_q);
    if (!slopes.is_none()) {
        const Tensor t(slopes, "alibi_slopes");
        const bool each = t.dl.ndim == 2;
        t.require(call.beside(t) && t.dtype() == kFloat32 && (each || t.dl.ndim == 1) && t.dl.shape[each] == H &&
                      (!each || t.dl.shape[0] == B),
                  "float32 (H,) or (B, H) on q's device");
        a.slopes = reinterpret_cast<const float*>(t.data());
        a.slopes_stride_b = each ? t.dl.strides[0] : 0;
        a.slopes_stride_h = t.dl.strides[each];
    }
    if (!sinks.is_none()) {
        const Tensor t(sinks, "sinks");
        t.require(call.beside(t) && t.contiguous() && t.numel() == H, "(H,), contiguous, on q's device");
        a.sinks = t.data();
        a.sinks_dtype = t.dtype();
    }
    if (splits < 1) throw py::value_error("attention_decode takes at least one split");
    if (splits > 1) {
        a.parts = floats(parts, "parts", call, B * H * S_q * splits * Dv);
        a.tops = floats(statistics, "statistics", call, 2 * B * H * S_q * splits);
        a.sums = a.tops + B * H * S_q * splits;
    }
    a.B = static_cast<int32_t>(B);
    a.H = static_cast<int32_t>(H);
    a.H_kv = static_cast<int32_t>(H_kv);
    a.S_q = static_cast<int32_t>(S_q);
    a.S_new = static_cast<int32_t>(S_new);
    a.capacity = static_cast<int32_t>(capacity);
    a.splits = splits;
    a.left = static_cast<int32_t>(left < 0 ? -1 : left < capacity + S_q ? left : capacity + S_q);
    a.D = static_cast<int32_t>(D);
    a.Dv = static_cast<int32_t>(Dv);
    a.scale = static_cast<float>(scale);
    a.softcap = static_cast<float>(softcap);
    call.run("attention_decode", [&](void* stream) { return attention_decode(&a, stream); });
}

}  // namespace

void bind_attention_decode(py::module_& m) { m.def("attention_decode", &decode); }
