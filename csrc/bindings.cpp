// fastattn._C: Python tensors in, kernels launched on torch's current stream, error codes out as exceptions.
// Importing it calls no CUDA function, so that a process may still fork. The same sources, compiled for the CPU on top of
// emulation/, are fastattn._C_emulated.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>

#include "binding.h"
#include "launchers.h"

void bind_attention(py::module_& m);
void bind_attention_decode(py::module_& m);
void bind_layer_norm(py::module_& m);
void bind_position(py::module_& m);
void bind_softmax(py::module_& m);

namespace {

int prepare_kernels() {
    for (auto prepare : {attention_prepare, attention_backward_prepare, attention_decode_prepare, attention_sm90_prepare,
                         layer_norm_prepare, position_prepare, softmax_prepare})
        if (const int code = prepare()) return code;
    return cudaSuccess;
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

}  // namespace

bool read_plain(py::handle object, DlpackTensor& t) {
    const Torch& torch = Torch::get();
    const PyTypeObject* type = Py_TYPE(object.ptr());
    if (type != torch.tensor && type != torch.parameter) return false;
    if (torch.exchange->read(object.ptr(), &t) != 0) {
        PyErr_Clear();
        return false;
    }
    const bool memory = t.data || std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim;
    return memory && t.device_type == kDevice && t.lanes == 1;
}

namespace {

// Whether the tensors (Nones left out) are plain memory on one device that this build serves, the first one is of a dtype
// it knows and the other floating ones are of that or float32: the usual call, told in a tenth of the time that
// backend.plain_why_not takes to find nothing to say.
bool plain(const py::args& tensors) {
    int32_t device = -1;
    uint8_t type_code = 0, bits = 0;  // of the first
    for (py::handle object : tensors) {
        if (object.is_none()) continue;
        DlpackTensor t;
        if (!read_plain(object, t) || (device >= 0 && t.device_index != device) || t.type_code == 5) return false;
        device = t.device_index;
        const bool floating = t.type_code == 2 || t.type_code == 4;
        if (!bits) {
            if (!floating || (t.bits != 16 && t.bits != 32)) return false;
            type_code = t.type_code;
            bits = t.bits;
        }
        const bool as_first = t.type_code == type_code && t.bits == bits, wide = t.type_code == 2 && t.bits == 32;
        if (floating && !as_first && !wide) return false;
    }
    return true;
}

}  // namespace

#ifdef FASTATTN_EMULATION

#include "emulation/engine.h"

void bind_emulation(py::module_& m);

void check(int code, const std::string& what) {
    if (code != cudaSuccess) throw std::runtime_error(what + ": " + emulation::last_error());
}
void prepare(int) {
    static const int code = prepare_kernels();
    check(code, "prepare");
}
int sm_count(int) { return emulation::kMultiprocessors; }
void* current_stream(int) { return nullptr; }
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

PYBIND11_MODULE(_C_emulated, m) {
    bind_emulation(m);
#else

namespace {
constexpr int kMaxDevices = 64;
std::array<int, kMaxDevices> multiprocessors;  // 0: not prepared yet; guarded by the GIL
}  // namespace

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

DeviceGuard::DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) before_ = -1;
    if (before_ != -1) check(cudaSetDevice(device), "cudaSetDevice");
}
DeviceGuard::~DeviceGuard() {
    if (before_ != -1) cudaSetDevice(before_);
}

void* current_stream(int device) {
    void* stream = nullptr;
    if (Torch::get().exchange->current_stream(kDlpackCuda, device, &stream) != 0) throw py::error_already_set();
    return stream;
}

void prepare(int device) {
    if (device >= 0 && device < kMaxDevices && multiprocessors[device]) return;
    int count = 0;
    check(cudaGetDeviceCount(&count), "prepare");
    if (device < 0 || device >= count || device >= kMaxDevices)
        throw py::value_error("prepare: device is " + std::to_string(device) + ", this machine has " +
                              std::to_string(count));
    DeviceGuard guard(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const auto asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(current_stream(device)), &status);
    if (asked != cudaSuccess || status != cudaStreamCaptureStatusNone) {
        cudaGetLastError();  // so that no later launch finds it
        throw std::runtime_error("the first CUDA kernel on a device cannot run inside a graph capture: "
                                 "call fastattn.warmup() before it");
    }
    check(prepare_kernels(), "prepare");
    int sms = 0;
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "prepare");
    multiprocessors[device] = sms;
}

int sm_count(int device) {
    prepare(device);
    return multiprocessors[device];
}

namespace {
// The CUDA version that the installed driver supports, as 13000 for 13.0; 0 without a driver.
int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
}
}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("driver_version", &driver_version);
#endif
    m.attr("archs") = FASTATTN_ARCHS;
    m.attr("runtime_version") = CUDART_VERSION;
    m.def("prepare", &prepare, py::arg("device"));
    m.def("sm_count", &sm_count, py::arg("device"));
    m.def("plain", &plain);
    m.def("describe", &describe, py::arg("tensor"));
    bind_attention(m);
    bind_attention_decode(m);
    bind_layer_norm(m);
    bind_position(m);
    bind_softmax(m);
}
