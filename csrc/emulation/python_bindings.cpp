// fastattn._C_emulated: what tests ask of the emulation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../launchers.h"
#include "engine.h"

namespace py = pybind11;

void bind_emulation(py::module_& m) {
    m.attr("orders") = py::dict(py::arg("fifo") = 0, py::arg("reverse") = 1, py::arg("random") = 2, py::arg("pct") = 3);
    m.def("schedule", [](int order, uint64_t seed) { emulation::schedule(static_cast<emulation::Order>(order), seed); },
          py::arg("order"), py::arg("seed") = 1);
    m.def("launches", &emulation::launches);
    m.def(
        "pretend",
        [](int major) {
            emulation::pretend(major);
            attention_sm90_prepare();
        },
        py::arg("major"));
    m.def("leave_out_launches", &emulation::leave_out_launches, py::arg("yes"));
#ifdef FASTATTN_RECORD
    m.def("traffic", [] {
        py::dict by_kernel;
        for (const auto& [name, t] : emulation::traffic())
            by_kernel[name.c_str()] = py::dict(
                py::arg("sectors") = t.sectors, py::arg("least_sectors") = t.least_sectors,
                py::arg("sectors_read") = t.sectors_read, py::arg("sectors_written") = t.sectors_written,
                py::arg("shared_passes") = t.shared_passes, py::arg("shared_conflicts") = t.shared_conflicts);
        return by_kernel;
    });
#endif
}
