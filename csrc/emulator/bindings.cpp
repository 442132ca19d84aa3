// fdistill_ops._C_emulated: the CUDA kernels on CPU tensors. Tests only.
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "emulator/emulator.h"
#include "emulator/faults.h"

PYBIND11_MODULE(_C_emulated, m) {
  using namespace fdistill;
  m.doc() = "The CUDA kernels in the emulator of csrc/emulator. Called by tests alone.";
  bind_cuda(m);
  m.def("configure", [](int processors, int blocks_per_processor, int max_cluster, size_t shared_bytes,
                        size_t level2_bytes, unsigned order, int fitting_cluster, int code) {
    emulator::settings() = {processors, blocks_per_processor, max_cluster, shared_bytes, level2_bytes,
                            order,      fitting_cluster,      code};
  });
  m.def("settings", [] {
    const emulator::Settings& s = emulator::settings();
    return py::make_tuple(s.processors, s.blocks_per_processor, s.max_cluster, s.shared_bytes, s.level2_bytes, s.order,
                          s.fitting_cluster, s.code);
  });
  m.def("run_fault", &emulator::run_fault);
  m.def("take_traffic", [] {
    const emulator::Traffic t = emulator::traffic();
    emulator::traffic() = {};
    return py::make_tuple(t.launches, t.loaded, t.stored, t.vectors, t.prefetched);
  });
}
