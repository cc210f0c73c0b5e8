// The norms at Python's side: checks the tensors, then launches.

#include "binding.h"
#include "launchers.h"

namespace {

// The tensors of one call, beside its first one, which is (..., N). Absent ones are None and null.
class Rowwise : public Call {
  public:
    Rowwise(const Tensor& first, Dtype dtype) : Call(first), dtype(dtype) {
        first.require(first.dl.ndim >= 1, "(..., N)");
        N = first.dl.shape[first.dl.ndim - 1];
        M = 1;
        for (int i = 0; i < first.dl.ndim - 1; i++) M *= first.dl.shape[i];
    }

    // Rows of any strides, of dtype or, if wide, float32.
    const void* rows(py::handle object, const char* name, Rows& at, bool& wide) const {
        return object.is_none() ? nullptr : rows(Tensor(object, name), at, wide);
    }
    const void* rows(const Tensor& t, Rows& at, bool& wide) const {
        if (!beside(t) || !t.dl.ndim || t.dl.shape[t.dl.ndim - 1] != N || t.numel() != M * N || !t.rows(at))
            t.refuse(std::to_string(M) + " rows of N = " + std::to_string(N) +
                     " no more than two strides apart, on the first tensor's device");
        wide = is_wide(t);
        return t.data();
    }

    // Contiguous elements, of dtype or, if wide, float32.
    void* flat(py::handle object, const char* name, int64_t numel, bool& wide) const {
        return object.is_none() ? nullptr : flat(Tensor(object, name), numel, wide);
    }
    void* flat(const Tensor& t, int64_t numel, bool& wide) const {
        wide = is_wide(t);
        return flat(t, numel);
    }
    void* flat(py::handle object, const char* name, int64_t numel, Dtype of) const {
        if (object.is_none()) return nullptr;
        const Tensor t(object, name);
        if (t.dtype() != of) t.refuse("of dtype " + std::string(of == kFloat32 ? "float32" : "of the first tensor"));
        return flat(t, numel);
    }

    RowDropout dropout(py::handle object, double p) const {
        if (object.is_none()) return {};
        const Tensor seed(object, "seed");
        seed.require(beside(seed) && seed.contiguous() && seed.numel() == 2 && seed.dl.type_code == 0 && seed.dl.bits == 64,
                     "int64 (2,), contiguous, on the first tensor's device");
        return row_dropout(reinterpret_cast<const int64_t*>(seed.data()), p);
    }

    Dtype dtype;
    int64_t M, N;

  private:
    bool is_wide(const Tensor& t) const {
        t.require(t.dtype() == dtype || t.dtype() == kFloat32, "of x's dtype or float32");
        return t.dtype() != dtype;
    }
    void* flat(const Tensor& t, int64_t numel) const {
        if (!beside(t) || !t.contiguous() || t.numel() != numel)
            t.refuse(std::to_string(numel) + " contiguous elements on the first tensor's device");
        return t.data();
    }
};

float* floats(void* p) { return static_cast<float*>(p); }

// statistics: every row's rstd, then, unless rms, every mean; None where no backward will want them.
void forward(py::handle x_, py::handle residual, py::handle weight, py::handle bias, py::handle y, py::handle r,
             py::handle statistics, py::handle seed, double eps, double dropout_p, bool rms) {
    const Tensor x(x_, "x");
    const Rowwise call(x, x.dtype());
    LayerNormFwd f{};
    bool wide = false;
    f.M = call.M;
    f.N = call.N;
    f.eps = static_cast<float>(eps);
    f.dtype = call.dtype;
    f.rms = rms;
    f.x = call.rows(x, f.x_rows, wide);
    f.residual = call.rows(residual, "residual", f.residual_rows, f.residual_wide);
    f.weight = call.flat(weight, "weight", f.N, f.weights_wide);
    f.bias = call.flat(bias, "bias", f.N, wide);
    if (f.weight && f.bias && wide != f.weights_wide) throw py::type_error("weight and bias must have one dtype");
    f.weights_wide = f.bias ? wide : f.weights_wide;
    f.y = call.flat(Tensor(y, "y"), f.M * f.N, f.y_wide);
    f.r = call.flat(r, "r", f.M * f.N, f.residual_wide ? kFloat32 : f.dtype);
    f.rstd = floats(call.flat(statistics, "statistics", rms ? f.M : 2 * f.M, kFloat32));
    f.mean = f.rstd && !rms ? f.rstd + f.M : nullptr;
    f.dropout = call.dropout(seed, dropout_p);
    if (f.M == 0 || f.N == 0) return;
    call.run("layer_norm_fwd", [&](void* stream) { return layer_norm_fwd(&f, stream); });
}

// dx may be None, where dresidual is it. workspace: 2 M floats and partial_rows * N for each parameter's gradient.
void backward(py::handle dy, py::handle dr, py::handle r_, py::handle weight, py::handle statistics,
              py::handle seed, py::handle dx, py::handle dresidual, py::handle dweight, py::handle dbias,
              py::handle workspace, int64_t partial_rows, double dropout_p, bool rms) {
    const Tensor r(r_, "r");
    const Rowwise call(r, dx.is_none() ? r.dtype() : Tensor(dx, "dx").dtype());
    LayerNormBwd b{};
    bool wide = false;
    b.M = call.M;
    b.N = call.N;
    b.dtype = call.dtype;
    b.rms = rms;
    b.r = call.rows(r, b.r_rows, b.r_wide);
    b.dy = call.rows(dy, "dy", b.dy_rows, b.dy_wide);
    b.dr = call.rows(dr, "dr", b.dr_rows, wide);
    if (b.dr && wide != b.r_wide) throw py::type_error("dr must have r's dtype");
    b.weight = call.flat(weight, "weight", b.N, b.weights_wide);
    b.rstd = floats(call.flat(statistics, "statistics", rms ? b.M : 2 * b.M, kFloat32));
    b.mean = b.rstd && !rms ? b.rstd + b.M : nullptr;
    b.dx = call.flat(dx, "dx", b.M * b.N, call.dtype);
    b.dresidual = call.flat(dresidual, "dresidual", b.M * b.N, b.r_wide ? kFloat32 : call.dtype);
    b.dropout = call.dropout(seed, dropout_p);

    b.gradient_dtype = kFloat32;
    for (py::handle gradient : {dweight, dbias})
        if (!gradient.is_none()) b.gradient_dtype = Tensor(gradient, "a parameter's gradient").dtype();
    b.dweight = call.flat(dweight, "dweight", b.N, b.gradient_dtype);
    b.dbias = call.flat(dbias, "dbias", b.N, b.gradient_dtype);
    b.partial_rows = partial_rows;
    const int64_t partials = partial_rows * b.N * ((b.dweight != nullptr) + (b.dbias != nullptr));
    float* free = floats(call.flat(workspace, "workspace", partials + 2 * b.M, kFloat32));
    if (b.dweight) b.partial_dweight = free;
    if (b.dbias) b.partial_dbias = free + partials - partial_rows * b.N;
    b.sums = free + partials;
    if (b.M == 0 || b.N == 0) return;
    if (partial_rows < 1 || !b.rstd || !b.sums)
        throw py::value_error("layer_norm_bwd takes statistics, a workspace and at least one partial row");
    call.run("layer_norm_bwd", [&](void* stream) { return layer_norm_bwd(&b, stream); });
}

// What fastattn/cuda/layer_norm.py says of it.
int64_t usual(py::handle x, py::handle normalized_shape, py::handle weight, py::handle bias) {
    DlpackTensor t, w;
    if (!read_plain(x, t) || !PyTuple_CheckExact(normalized_shape.ptr()) || PyTuple_GET_SIZE(normalized_shape.ptr()) != 1)
        return 0;
    const bool half = t.bits == 16 && (t.type_code == 2 || t.type_code == 4), wide = t.bits == 32 && t.type_code == 2;
    if (!(half || wide) || !t.ndim || !contiguous(t)) return 0;
    const int64_t N = t.shape[t.ndim - 1];
    PyObject* asked = PyTuple_GET_ITEM(normalized_shape.ptr(), 0);
    if (!PyLong_CheckExact(asked) || PyLong_AsLongLong(asked) != N) return 0;
    int weight_code = -1;
    for (py::handle object : {weight, bias}) {
        if (object.is_none()) continue;
        if (!read_plain(object, w) || w.device_index != t.device_index || w.ndim != 1 || w.shape[0] != N || !contiguous(w))
            return 0;
        const int code = w.type_code * 256 + w.bits;
        const bool as_x = w.type_code == t.type_code && w.bits == t.bits, as_float = w.type_code == 2 && w.bits == 32;
        if (!(as_x || as_float) || (weight_code >= 0 && weight_code != code)) return 0;
        weight_code = code;
    }
    int64_t M = 1;
    for (int i = 0; i < t.ndim - 1; i++) M *= t.shape[i];
    return N ? M : 0;
}

}  // namespace

void bind_layer_norm(py::module_& m) {
    m.def("layer_norm_fwd", &forward);
    m.def("layer_norm_bwd", &backward);
    m.def("layer_norm_usual", &usual);
    m.def("rows_fit", [](py::handle object) {
        Rows rows;
        return Tensor(object, "tensor").rows(rows);
    });
}
