// Reading a torch.Tensor without a torch header: torch hands out a table of C functions as
// torch.Tensor.__dlpack_c_exchange_api__, laid out as DLPack 1.x specifies (dmlc.github.io/dlpack). Declared here is
// what we call; entries of that table that we do not use are void pointers.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "launchers.h"

namespace py = pybind11;

struct DlpackTensor {
    void* data;
    int32_t device_type, device_index;
    int32_t ndim;
    uint8_t type_code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DlpackExchange {
    uint32_t major, minor;
    void* older;
    void *allocate, *to_managed, *from_managed;
    int (*read)(void* object, DlpackTensor* out);  // borrows: valid while the tensor is
    int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

constexpr int32_t kDlpackCpu = 1, kDlpackCuda = 2;

inline bool contiguous(const DlpackTensor& t) {
    for (int i = 0; i < t.ndim; i++)
        if (t.shape[i] == 0) return true;
    int64_t expected = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        if (t.shape[i] != 1 && t.strides[i] != expected) return false;
        expected *= t.shape[i];
    }
    return true;
}

// Looked up at the first call, since nothing here imports torch.
struct Torch {
    PyTypeObject *tensor, *parameter;
    const DlpackExchange* exchange;

    static const Torch& get() {
        PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> once;
        return once.call_once_and_store_result([] { return Torch(); }).get_stored();
    }

  private:
    Torch() {
        // Never released: the types live as long as the process.
        py::object tensor_type = py::module_::import("torch").attr("Tensor");
        py::object parameter_type = py::module_::import("torch.nn").attr("Parameter");
        if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__"))
            throw py::import_error("this torch has no Tensor.__dlpack_c_exchange_api__; fastattn needs torch >= 2.11");
        py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
        exchange = static_cast<DlpackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (!exchange) throw py::error_already_set();
        if (exchange->major != 1 || !exchange->read)
            throw py::import_error("this torch speaks DLPack " + std::to_string(exchange->major) +
                                   "; fastattn knows version 1");
        tensor = reinterpret_cast<PyTypeObject*>(tensor_type.release().ptr());
        parameter = reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr());
    }
};

struct Tensor {
    const char* name;  // of the argument, for messages
    DlpackTensor dl;

    Tensor(py::handle object, const char* name) : name(name) {
        const Torch& torch = Torch::get();
        const PyTypeObject* type = Py_TYPE(object.ptr());
        // A subclass may keep its numbers elsewhere or nowhere; torch's own two types are plain memory.
        if (type != torch.tensor && type != torch.parameter)
            throw py::type_error(std::string(name) + " is a " + type->tp_name +
                                 ", must be exactly torch.Tensor or torch.nn.Parameter");
        if (torch.exchange->read(object.ptr(), &dl) != 0) {
            const std::string why = py::str(py::error_already_set().value());
            throw py::type_error(std::string(name) + " has no memory to read: " + why.substr(0, why.find('\n')));
        }
        if (!dl.data && numel() > 0) throw py::type_error(std::string(name) + " has no memory to read");
    }

    char* data() const { return static_cast<char*>(dl.data) + dl.byte_offset; }
    int64_t numel() const {
        int64_t n = 1;
        for (int i = 0; i < dl.ndim; i++) n *= dl.shape[i];
        return n;
    }
    bool contiguous() const { return ::contiguous(dl); }

    std::string dtype_name() const {
        static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
        const std::string kind = dl.type_code < 7 ? kinds[dl.type_code] : "type" + std::to_string(dl.type_code) + "_";
        return kind == "bool" ? kind : kind + std::to_string(dl.bits);
    }
    std::string device_name() const {
        if (dl.device_type == kDlpackCpu) return "cpu";
        const std::string kind = dl.device_type == kDlpackCuda ? "cuda" : "device" + std::to_string(dl.device_type);
        return kind + ":" + std::to_string(dl.device_index);
    }

    Dtype dtype() const {
        if (dl.lanes == 1) {
            if (dl.type_code == 2 && dl.bits == 32) return kFloat32;
            if (dl.type_code == 2 && dl.bits == 16) return kFloat16;
            if (dl.type_code == 4 && dl.bits == 16) return kBFloat16;
        }
        throw py::type_error(std::string(name) + " is " + dtype_name() + ", must be float16, bfloat16 or float32");
    }

    void require(bool fine, const char* need) const {
        if (!fine) refuse(need);
    }
    void require(bool fine, const std::string& need) const {
        if (!fine) refuse(need);
    }
    [[noreturn]] void refuse(const std::string& need) const {
        std::string shape, strides;
        for (int i = 0; i < dl.ndim; i++) {
            shape += (i ? ", " : "") + std::to_string(dl.shape[i]);
            strides += (i ? ", " : "") + std::to_string(dl.strides[i]);
        }
        throw py::value_error(std::string(name) + " is " + dtype_name() + " (" + shape + ") with strides (" + strides +
                              ") on " + device_name() + ", must be " + need);
    }

    // Where the rows of this (..., N) lie; false where they are more than two strides apart.
    bool rows(Rows& at) const {
        const int last = dl.ndim - 1;
        int64_t size[2] = {1, 1}, stride[2] = {0, 0};  // innermost first
        int uneven = 0;
        for (int d = last - 1; d >= 0; d--) {
            if (dl.shape[d] == 1) continue;
            if (uneven && dl.strides[d] == size[uneven - 1] * stride[uneven - 1]) {
                size[uneven - 1] *= dl.shape[d];
            } else {
                if (uneven == 2) return false;
                size[uneven] = dl.shape[d];
                stride[uneven++] = dl.strides[d];
            }
        }
        const int64_t stride_n = dl.shape[last] > 1 ? dl.strides[last] : 1;
        at = uneven == 2 ? Rows{size[0], stride[1], stride[0], stride_n} : Rows{1, stride[0], 0, stride_n};
        return true;
    }
};
