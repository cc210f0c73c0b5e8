// The norms at Python's side: checks the tensors, then launches.

#include "binding.h"
#include "launchers.h"

namespace {

void forward(py::handle x_, py::handle weight_, py::handle bias_, py::handle y_, py::handle mean_, py::handle rstd_,
             double eps) {
    const Tensor x(x_, "x"), y(y_, "y"), mean(mean_, "mean"), rstd(rstd_, "rstd");
    const Call call(x);
    x.require(x.dl.ndim == 2, "(M, N)");
    const int64_t M = x.dl.shape[0], N = x.dl.shape[1];

    const auto beside_x = [&](const Tensor& t) { return call.beside(t) && t.contiguous(); };
    y.require(beside_x(y) && y.dtype() == x.dtype() && y.numel() == M * N, "contiguous, of x's shape, dtype and device");
    for (const Tensor* t : {&mean, &rstd})
        t->require(beside_x(*t) && t->dtype() == kFloat32 && t->numel() == M, "float32 (M,), contiguous, on x's device");

    const void *weight = nullptr, *bias = nullptr;
    Dtype w_dtype = x.dtype();
    const auto parameter = [&](py::handle object, const char* name, const void*& pointer) {
        if (object.is_none()) return;
        const Tensor t(object, name);
        const bool first = !weight;
        t.require(beside_x(t) && t.numel() == N && (t.dtype() == kFloat32 || t.dtype() == x.dtype()) &&
                      (first || t.dtype() == w_dtype),
                  "N = " + std::to_string(N) + " contiguous elements on x's device, of x's dtype or float32, weight and "
                  "bias alike");
        w_dtype = t.dtype();
        pointer = t.data();
    };
    parameter(weight_, "weight", weight);
    parameter(bias_, "bias", bias);
    if (M == 0 || N == 0) return;

    call.run("layer_norm_fwd", [&](void* stream) {
        return layer_norm_fwd(x.data(), weight, bias, y.data(), reinterpret_cast<float*>(mean.data()),
                              reinterpret_cast<float*>(rstd.data()), x.dl.strides[0], x.dl.strides[1], M, N, x.dtype(),
                              w_dtype, static_cast<float>(eps), stream);
    });
}

}  // namespace

void bind_layer_norm(py::module_& m) { m.def("layer_norm_fwd", &forward); }
