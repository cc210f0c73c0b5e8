// What the bindings of all ops share: the device and stream of one call, and errors as exceptions.
#pragma once

#include <string>

#include "tensor.h"

// The emulated build computes on CPU tensors, and there is no device to select and no stream to launch on.
#ifdef FASTATTN_EMULATION
constexpr int32_t kDevice = kDlpackCpu;
constexpr const char* kDeviceNeed = "on the CPU, where the emulated build runs";
#else
constexpr int32_t kDevice = kDlpackCuda;
constexpr const char* kDeviceNeed = "on a CUDA device";
#endif

// Whether this is plain memory on a device that this build serves, and if so, where and what.
bool read_plain(py::handle object, DlpackTensor& t);

// Raises a RuntimeError naming the CUDA error, unless `code` is success.
void check(int code, const std::string& what);

// Once per process and device, before its first launch: loads every kernel, which CUDA does lazily otherwise.
void prepare(int device);

// Number of multiprocessors of a device that is prepared: what a persistent grid is sized by.
int sm_count(int device);

// torch's current stream on a device.
void* current_stream(int device);

// Makes a device current while it lives. torch's default stream is handle 0 on every device: launched on under another
// current device, it runs on the wrong GPU without an error.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();

  private:
    int before_ = -1;
};

// One call of a launcher on the device of its first tensor.
class Call {
  public:
    explicit Call(const Tensor& first) : device_(first.dl.device_index) {
        first.require(first.dl.device_type == kDevice, kDeviceNeed);
    }

    bool beside(const Tensor& t) const { return t.dl.device_type == kDevice && t.dl.device_index == device_; }

    // launch(stream) returns the launcher's error code; it runs without the GIL.
    template <typename Launch>
    void run(const char* name, Launch launch) const {
        prepare(device_);
        void* stream = current_stream(device_);
        int code;
        {
            py::gil_scoped_release release;
            DeviceGuard guard(device_);
            code = launch(stream);
        }
        check(code, name);
    }

  private:
    int device_;
};
