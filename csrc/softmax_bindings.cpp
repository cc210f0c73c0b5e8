// Softmax at Python's side: checks the tensors, merges their dims, then launches.

#include <algorithm>
#include <array>
#include <optional>

#include "binding.h"
#include "launchers.h"

namespace {

struct Layout {
    SoftmaxSizes sizes;
    std::array<SoftmaxStrides, 3> strides;  // of each tensor
};

// All dims but `dim`, merged where every tensor's strides allow; nothing if more than three are left. keep_last: the last
// but one dim stays by itself, since causality needs the query's index. A null tensor has no strides to fit.
std::optional<Layout> merged_dims(const std::array<const Tensor*, 3>& tensors, int dim, bool keep_last) {
    const DlpackTensor& first = tensors[0]->dl;
    struct Merged {
        int64_t size;
        std::array<int64_t, 3> strides;
    };
    std::array<Merged, 3> merged;
    int count = 0;
    const auto along = [&](int d) {
        std::array<int64_t, 3> strides{};
        for (int t = 0; t < 3; t++)
            if (tensors[t]) strides[t] = tensors[t]->dl.strides[d];
        return strides;
    };
    for (int d = 0; d < first.ndim; d++) {
        const int64_t size = first.shape[d];
        const bool query = keep_last && d == first.ndim - 2;
        if (d == dim || (size == 1 && !query)) continue;
        const auto strides = along(d);
        bool fits = count > 0 && !query;
        for (int t = 0; t < 3 && fits; t++) fits = merged[count - 1].strides[t] == size * strides[t];
        if (fits) {
            merged[count - 1] = {merged[count - 1].size * size, strides};
        } else {
            if (count == 3) return std::nullopt;
            merged[count++] = {size, strides};
        }
    }
    while (count < 3) {
        std::move_backward(merged.begin(), merged.begin() + count, merged.begin() + count + 1);
        merged[0] = {1, {}};
        count++;
    }
    Layout layout{{merged[0].size, merged[1].size, merged[2].size, first.shape[dim]}, {}};
    const auto n = first.shape[dim] > 1 ? along(dim) : std::array<int64_t, 3>{1, 1, 1};
    for (int t = 0; t < 3; t++)
        layout.strides[t] = {merged[0].strides[t], merged[1].strides[t], merged[2].strides[t], n[t]};
    return layout;
}

void same_shape(const Tensor& t, const Tensor& as, const Call& call) {
    bool fits = call.beside(t) && t.dl.ndim == as.dl.ndim;
    for (int d = 0; d < t.dl.ndim && fits; d++) fits = t.dl.shape[d] == as.dl.shape[d];
    t.require(fits, std::string("of ") + as.name + "'s shape, on its device");
}

void has_dim(const Tensor& t, int dim, bool causal) {
    t.require(0 <= dim && dim < t.dl.ndim && !(causal && dim != t.dl.ndim - 1),
              "a tensor with dim " + std::to_string(dim) + ", the last one under causality");
}

// False where the dims do not merge, and nothing was computed: contiguous inputs always do.
bool forward(py::handle x_, py::handle mask_, py::handle y_, int dim, double scale, bool log, bool masked, bool causal) {
    const Tensor x(x_, "x"), y(y_, "y");
    const Call call(x);
    has_dim(x, dim, causal);
    same_shape(y, x, call);
    y.require(y.contiguous(), "contiguous");
    std::optional<Tensor> mask;
    if (!mask_.is_none()) {
        mask.emplace(mask_, "mask");
        same_shape(*mask, x, call);
        mask->require(mask->dtype_name() == "bool", "bool");
    }
    const Dtype x_dtype = x.dtype(), y_dtype = y.dtype();
    if (x.numel() == 0) return true;
    const auto layout = merged_dims({&x, &y, mask ? &*mask : nullptr}, dim, causal);
    if (!layout) return false;
    call.run("softmax_fwd", [&](void* stream) {
        return softmax_fwd(x.data(), mask ? mask->data() : nullptr, y.data(), layout->strides[0], layout->strides[2],
                           layout->strides[1], layout->sizes, x_dtype, y_dtype, static_cast<float>(scale), log, masked,
                           causal, stream);
    });
    return true;
}

bool backward(py::handle dy_, py::handle y_, py::handle dx_, int dim, double scale, bool log, bool causal) {
    const Tensor dy(dy_, "dy"), y(y_, "y"), dx(dx_, "dx");
    const Call call(y);
    has_dim(y, dim, causal);
    same_shape(dy, y, call);
    same_shape(dx, y, call);
    for (const Tensor* t : {&y, &dx}) t->require(t->contiguous(), "contiguous");
    const Dtype dy_dtype = dy.dtype(), y_dtype = y.dtype(), dx_dtype = dx.dtype();
    if (y.numel() == 0) return true;
    const auto layout = merged_dims({&y, &dy, nullptr}, dim, causal);
    if (!layout) return false;
    call.run("softmax_bwd", [&](void* stream) {
        return softmax_bwd(dy.data(), y.data(), dx.data(), layout->strides[1], layout->strides[0], layout->sizes, dy_dtype,
                           y_dtype, dx_dtype, static_cast<float>(scale), log, causal, stream);
    });
    return true;
}

}  // namespace

void bind_softmax(py::module_& m) {
    m.def("softmax_fwd", &forward);
    m.def("softmax_bwd", &backward);
}
