// fastattn._C: Python tensors in, kernels launched on torch's current stream, error codes out as exceptions.
// Importing it calls no CUDA function, so that a process may still fork.

#include <cuda_runtime_api.h>

#include <array>

#include "launchers.h"
#include "tensor.h"

namespace {

constexpr int kMaxDevices = 64;
std::array<bool, kMaxDevices> prepared;  // guarded by the GIL

void check(int code, const std::string& what) {
    if (code == cudaSuccess) return;
    const auto error = static_cast<cudaError_t>(code);
    std::string message = what + ": ";
    if (error == cudaErrorNoDevice || error == cudaErrorStubLibrary || error == cudaErrorInsufficientDriver)
        message += "no GPU that this build can use: ";
    if (error == cudaErrorNoKernelImageForDevice)
        message += "this build has code for sm " FASTATTN_ARCHS ", none for this GPU (FASTATTN_CUDA_ARCHS chooses): ";
    throw std::runtime_error(message + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Makes a device current while it lives. torch's default stream is handle 0 on every device: launched on under another
// current device, it runs on the wrong GPU without an error.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ == device) before_ = -1;
        if (before_ != -1) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (before_ != -1) cudaSetDevice(before_);
    }

  private:
    int before_ = -1;
};

void* current_stream(int device) {
    void* stream = nullptr;
    if (Torch::get().exchange->current_stream(kDlpackCuda, device, &stream) != 0) throw py::error_already_set();
    return stream;
}

// Once per process and device, before its first launch: loads every kernel, which CUDA does lazily otherwise.
void prepare(int device) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "prepare");
    if (device < 0 || device >= count || device >= kMaxDevices)
        throw py::value_error("prepare: device is " + std::to_string(device) + ", this machine has " +
                              std::to_string(count));
    if (prepared[device]) return;
    DeviceGuard guard(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const auto asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(current_stream(device)), &status);
    if (asked != cudaSuccess || status != cudaStreamCaptureStatusNone) {
        cudaGetLastError();  // so that no later launch finds it
        throw std::runtime_error("the first CUDA kernel on a device cannot run inside a graph capture: "
                                 "call fastattn.warmup() before it");
    }
    check(layer_norm_prepare(), "prepare");
    prepared[device] = true;
}

void layer_norm(py::handle x_, py::handle weight_, py::handle bias_, py::handle y_, py::handle mean_, py::handle rstd_,
                double eps) {
    const Tensor x(x_, "x"), y(y_, "y"), mean(mean_, "mean"), rstd(rstd_, "rstd");
    const int device = x.dl.device_index;
    x.require(x.dl.device_type == kDlpackCuda && x.dl.ndim == 2, "(M, N) on a CUDA device");
    const int64_t M = x.dl.shape[0], N = x.dl.shape[1];

    const auto beside_x = [&](const Tensor& t) {
        return t.dl.device_type == kDlpackCuda && t.dl.device_index == device && t.contiguous();
    };
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

    if (device >= kMaxDevices || !prepared[device]) prepare(device);
    void* stream = current_stream(device);
    int code;
    {
        py::gil_scoped_release release;
        DeviceGuard guard(device);
        code = layer_norm_fwd(x.data(), weight, bias, y.data(), reinterpret_cast<float*>(mean.data()),
                              reinterpret_cast<float*>(rstd.data()), x.dl.strides[0], x.dl.strides[1], M, N, x.dtype(),
                              w_dtype, static_cast<float>(eps), stream);
    }
    check(code, "layer_norm_fwd");
}

// What the boundary reads of a tensor, of any device and dtype.
py::dict describe(py::handle object) {
    const Tensor t(object, "tensor");
    py::tuple shape(t.dl.ndim), strides(t.dl.ndim);
    for (int i = 0; i < t.dl.ndim; i++) {
        shape[i] = t.dl.shape[i];
        strides[i] = t.dl.strides[i];
    }
    py::dict d;
    d["dtype"] = t.dtype_name();
    d["shape"] = shape;
    d["strides"] = strides;
    d["device"] = t.device_name();
    d["data_ptr"] = reinterpret_cast<uintptr_t>(t.data());
    d["contiguous"] = t.contiguous();
    return d;
}

// The CUDA version that the installed driver supports, as 13000 for 13.0; 0 without a driver.
int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("archs") = FASTATTN_ARCHS;
    m.attr("runtime_version") = CUDART_VERSION;
    m.def("driver_version", &driver_version);
    m.def("prepare", &prepare, py::arg("device"));
    m.def("describe", &describe, py::arg("tensor"));
    m.def("layer_norm_fwd", &layer_norm);
}
