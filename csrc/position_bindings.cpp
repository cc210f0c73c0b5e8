// Positional encodings and embeddings at Python's side: checks the tensors, then launches.

#include "binding.h"
#include "launchers.h"

namespace {

// The rows of (B, S, C), b and s each with a stride of its own.
Rows rows_of(const Tensor& t) {
    // The stride of a dim of size 1 means nothing and could look unaligned.
    const auto stride = [&](int dim) { return t.dl.shape[dim] == 1 ? 0 : t.dl.strides[dim]; };
    return {t.dl.shape[1], stride(0), stride(1), t.dl.shape[2] == 1 ? 1 : t.dl.strides[2]};
}

// Reads what one launch takes, and refuses what the kernels could not.
class Arguments {
  public:
    Arguments(const Call& call, Dtype dtype) : call_(call), dtype_(dtype) {}

    Table table(py::handle object, const char* name, int64_t C) const {
        if (object.is_none()) return {};
        const Tensor t(object, name);
        const bool fine = call_.beside(t) && t.dl.ndim == 2 && t.dl.shape[0] > 0 && t.dl.shape[1] == C &&
                          (C == 1 || t.dl.strides[1] == 1) && (t.dtype() == kFloat32 || t.dtype() == dtype_);
        if (!fine)
            t.refuse("(rows, " + std::to_string(C) +
                     ") with a row at least and unit stride in its columns, float32 or "
                     "the dtype of the rows it is added to, on their device");
        return {t.data(), t.dl.shape[0], t.dl.shape[0] == 1 ? 0 : t.dl.strides[0], t.dtype() == kFloat32};
    }

    Ids ids(py::handle object, const char* name, int64_t B, int64_t S) const {
        if (object.is_none()) return {};
        const Tensor t(object, name);
        const bool fine = call_.beside(t) && t.dl.type_code == 0 && (t.dl.bits == 32 || t.dl.bits == 64) &&
                          t.dl.ndim == 2 && t.dl.shape[0] == B && t.dl.shape[1] == S;
        if (!fine)
            t.refuse("int32 or int64 (" + std::to_string(B) + ", " + std::to_string(S) + ") on the rows' device");
        return {t.data(), t.dl.strides[0], t.dl.strides[1], t.dl.bits == 64};
    }

    RowDropout dropout(py::handle seed, double p) const {
        if (seed.is_none()) return {};
        const Tensor t(seed, "seed");
        t.require(call_.beside(t) && t.dl.type_code == 0 && t.dl.bits == 64 && t.numel() == 2 && t.contiguous(),
                  "int64 (2,), contiguous, on the rows' device");
        return row_dropout(reinterpret_cast<const int64_t*>(t.data()), p);
    }

    const void* parameter(py::handle object, const char* name, int64_t C, bool& wide) const {
        if (object.is_none()) return nullptr;
        const Tensor t(object, name);
        wide = t.dtype() == kFloat32;
        if (!(call_.beside(t) && t.numel() == C && t.contiguous() && (wide || t.dtype() == dtype_)))
            t.refuse(std::to_string(C) +
                     " elements, contiguous, float32 or the token table's dtype, on the ids' device");
        return t.data();
    }

    // Memory that a kernel writes: null where it is None.
    void* output(py::handle object, const char* name, int64_t numel, Dtype* dtype = nullptr) const {
        if (object.is_none()) return nullptr;
        const Tensor t(object, name);
        const Dtype found = t.dtype();
        if (!(call_.beside(t) && t.contiguous() && t.numel() == numel && (dtype || found == dtype_)))
            t.refuse("contiguous, of " + std::to_string(numel) + " elements, on the rows' device" +
                     (dtype ? "" : " and of their dtype"));
        if (dtype) *dtype = found;
        return t.data();
    }

  private:
    const Call& call_;
    Dtype dtype_;
};

Walk walk_of(const Tensor& rows, int64_t b_lanes, int64_t s_lanes) {
    rows.require(rows.dl.ndim == 3 && rows.numel() > 0, "(B, S, C) and not empty");
    const int64_t* shape = rows.dl.shape;
    if (b_lanes < 1 || b_lanes > shape[0] || s_lanes < 1 || s_lanes > shape[1])
        throw py::value_error("lanes are " + std::to_string(b_lanes) + " and " + std::to_string(s_lanes) +
                              ", must be 1 .. B and 1 .. S");
    return {shape[0], shape[1], shape[2], b_lanes, s_lanes};
}

// What both directions of the embeddings take: three ids, three tables, weight and bias of the norm.
Lookups lookups_of(const Arguments& from, const py::args& objects, int64_t B, int64_t S, int64_t C) {
    if (objects.size() != 8) throw py::type_error("embeddings take 3 ids, 3 tables, weight and bias");
    Lookups l = {};
    l.ids = from.ids(objects[0], "input_ids", B, S);
    l.type_ids = from.ids(objects[1], "type_ids", B, S);
    l.position_ids = from.ids(objects[2], "position_ids", B, S);
    l.token = from.table(objects[3], "token_table", C);
    l.type = from.table(objects[4], "type_table", C);
    l.position = from.table(objects[5], "position_table", C);
    l.weight = from.parameter(objects[6], "norm_weight", C, l.weight_wide);
    l.bias = from.parameter(objects[7], "norm_bias", C, l.bias_wide);
    return l;
}

void add_fwd(py::handle x_, py::handle table_, py::handle ids_, py::handle y_, py::handle seed_, int64_t offset,
             double scale, double dropout_p, int64_t b_lanes, int64_t s_lanes) {
    const Tensor x(x_, "x");
    const Call call(x);
    const Walk walk = walk_of(x, b_lanes, s_lanes);
    const Arguments from(call, x.dtype());
    const Table table = from.table(table_, "table", walk.C);
    const Ids ids = from.ids(ids_, "position_ids", walk.B, walk.S);
    const RowDropout dropout = from.dropout(seed_, dropout_p);
    void* y = from.output(y_, "y", x.numel());
    call.run("add_positional_encoding_fwd", [&](void* stream) {
        return add_positional_encoding_fwd(x.data(), rows_of(x), table, ids, y, dropout, walk, offset, x.dtype(),
                                           static_cast<float>(scale), stream);
    });
}

void add_bwd(py::handle dy_, py::handle dx_, py::handle sums_, py::handle seed_, double scale, double dropout_p,
             int64_t b_lanes, int64_t s_lanes) {
    const Tensor dy(dy_, "dy");
    const Call call(dy);
    const Walk walk = walk_of(dy, b_lanes, s_lanes);
    const Arguments from(call, dy.dtype());
    const RowDropout dropout = from.dropout(seed_, dropout_p);
    void* dx = from.output(dx_, "dx", dy.numel());
    Dtype sums_dtype = kFloat32;
    void* sums = from.output(sums_, "sums", b_lanes * walk.S * walk.C, &sums_dtype);
    call.run("add_positional_encoding_bwd", [&](void* stream) {
        return add_positional_encoding_bwd(dy.data(), rows_of(dy), dx, sums, dropout, walk, dy.dtype(), sums_dtype,
                                           static_cast<float>(scale), stream);
    });
}

void add_up(py::handle partials_, py::handle out_) {
    const Tensor partials(partials_, "partials");
    const Call call(partials);
    partials.require(partials.dtype() == kFloat32 && partials.dl.ndim == 2 && partials.numel() > 0 &&
                         (partials.dl.shape[1] == 1 || partials.dl.strides[1] == 1),
                     "float32 (G, R), not empty, with unit stride in R");
    const int64_t G = partials.dl.shape[0], R = partials.dl.shape[1];
    Dtype dtype;
    void* out = Arguments(call, kFloat32).output(out_, "out", R, &dtype);
    call.run("sum_partials", [&](void* stream) {
        return sum_partials(reinterpret_cast<const float*>(partials.data()), G == 1 ? 0 : partials.dl.strides[0], G, R,
                            R, out, dtype, nullptr, kFloat32, stream);
    });
}

void embed_fwd(py::handle y_, py::handle mean_, py::handle rstd_, py::handle seed_, double eps, double dropout_p,
               const py::args& looked_up) {
    const Tensor y(y_, "y");
    const Call call(y);
    y.require(y.dl.ndim == 3 && y.numel() > 0 && y.contiguous(), "(B, S, C), contiguous and not empty");
    const int64_t B = y.dl.shape[0], S = y.dl.shape[1], C = y.dl.shape[2];
    const Arguments from(call, y.dtype()), fp32(call, kFloat32);
    const Lookups lookups = lookups_of(from, looked_up, B, S, C);
    const RowDropout dropout = from.dropout(seed_, dropout_p);
    auto* mean = static_cast<float*>(fp32.output(mean_, "mean", B * S));
    auto* rstd = static_cast<float*>(fp32.output(rstd_, "rstd", B * S));
    if (!lookups.ids.data || !lookups.token.data || (lookups.weight && !(mean && rstd)) ||
        (lookups.bias && !lookups.weight))
        throw py::value_error("embeddings_fwd: ids and a token table are needed; a norm needs weight, mean and rstd");
    call.run("embeddings_fwd", [&](void* stream) {
        return embeddings_fwd(lookups, y.data(), mean, rstd, dropout, B, S, C, y.dtype(), static_cast<float>(eps),
                              stream);
    });
}

void embed_bwd(py::handle dy_, py::handle mean_, py::handle rstd_, py::handle dx_, py::handle sums_,
               py::handle norm_sums_, py::handle dweight_, py::handle dbias_, py::handle seed_, double dropout_p,
               int64_t b_lanes, int64_t s_lanes, const py::args& looked_up) {
    const Tensor dy(dy_, "dy");
    const Call call(dy);
    const Walk walk = walk_of(dy, b_lanes, s_lanes);
    const int64_t C = walk.C;
    const Arguments from(call, dy.dtype()), fp32(call, kFloat32);
    const Lookups lookups = lookups_of(from, looked_up, walk.B, walk.S, C);
    const RowDropout dropout = from.dropout(seed_, dropout_p);
    const auto* mean = static_cast<float*>(fp32.output(mean_, "mean", walk.B * walk.S));
    const auto* rstd = static_cast<float*>(fp32.output(rstd_, "rstd", walk.B * walk.S));
    void* dx = from.output(dx_, "dx", dy.numel());
    auto* sums = static_cast<float*>(fp32.output(sums_, "sums", b_lanes * walk.S * C));
    auto* norm_sums = static_cast<float*>(fp32.output(norm_sums_, "norm_sums", b_lanes * s_lanes * 2 * C));
    Dtype dweight_dtype = kFloat32, dbias_dtype = kFloat32;
    void* dweight = from.output(dweight_, "dweight", C, &dweight_dtype);
    void* dbias = from.output(dbias_, "dbias", C, &dbias_dtype);
    if (!lookups.ids.data || !lookups.token.data || !lookups.weight || !mean || !rstd || !norm_sums != !dweight)
        throw py::value_error(
            "embeddings_bwd: ids, token table, weight, mean and rstd are needed; dweight with norm_sums");
    call.run("embeddings_bwd", [&](void* stream) {
        return embeddings_bwd(dy.data(), rows_of(dy), lookups, mean, rstd, dx, sums, norm_sums, dweight, dbias, dropout,
                              walk, dy.dtype(), dweight_dtype, dbias_dtype, stream);
    });
}

void segments(py::handle dx_, py::handle keys_, py::handle order_, py::handle out_, py::handle partials_,
              py::handle seed_, double dropout_p, int64_t skip, int chunk) {
    const Tensor dx(dx_, "dx"), keys(keys_, "keys"), order(order_, "order"), out(out_, "out");
    const Call call(dx);
    dx.require(dx.dl.ndim == 3 && dx.numel() > 0, "(B, S, C) and not empty");
    const int64_t M = dx.dl.shape[0] * dx.dl.shape[1], C = dx.dl.shape[2];
    if (chunk < 1) throw py::value_error("chunk is " + std::to_string(chunk) + ", must be positive");
    for (const Tensor* t : {&keys, &order})
        t->require(call.beside(*t) && t->dl.type_code == 0 && t->dl.bits == (t == &keys ? 32 : 64) && t->contiguous() &&
                       t->numel() == M,
                   "int32 (keys) or int64 (order), one for each row of dx, contiguous, on its device");
    out.require(call.beside(out) && out.dl.ndim == 2 && out.dl.shape[0] > 0 && out.dl.shape[1] == C && out.contiguous(),
                "(V, C) with dx's C and a row at least, contiguous, on its device");
    Rows rows;
    dx.require(dx.rows(rows), "(B, S, C)");
    const Dtype out_dtype = out.dtype();
    const Arguments from(call, kFloat32);
    const RowDropout dropout = from.dropout(seed_, dropout_p);
    auto* partials = static_cast<float*>(from.output(partials_, "partials", (M + chunk - 1) / chunk * 2 * C));
    call.run("segment_sums", [&](void* stream) {
        return segment_sums(dx.data(), rows, reinterpret_cast<const int32_t*>(keys.data()),
                            reinterpret_cast<const int64_t*>(order.data()), out.data(), partials, dropout, M, C,
                            out.dl.shape[0], skip, chunk, dx.dtype(), out_dtype, stream);
    });
}

}  // namespace

void bind_position(py::module_& m) {
    m.def("add_positional_encoding_fwd", &add_fwd);
    m.def("add_positional_encoding_bwd", &add_bwd);
    m.def("embeddings_fwd", &embed_fwd);
    m.def("embeddings_bwd", &embed_bwd);
    m.def("sum_partials", &add_up);
    m.def("segment_sums", &segments);
}
