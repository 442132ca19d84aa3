// Bindings of the CUDA kernels, for the compiled module and for the emulator's.
#pragma once

#include "loss.h"
#include "records.h"

namespace fdistill {

// (counters, count, scratch, bytes), as addresses
inline gpu::Memory read_memory(PyObject* p) {
  return {static_cast<unsigned*>(address(item(p, 0))), PyLong_AsLongLong(item(p, 1)),
          static_cast<unsigned char*>(address(item(p, 2))), PyLong_AsLongLong(item(p, 3))};
}

inline gpu::Vector read_vector(PyObject* value, const char* name) {
  Tensor tensor;
  read_tensor(value, name, tensor);
  return {tensor.data, tensor.dtype, tensor.stride(0)};
}

// None, or (counters, bytes) where the memory was too small and nothing has run.
inline py::object lacking(const gpu::Needs& needs, const gpu::Memory& memory) {
  if (needs.met_by(memory)) return py::none();
  return py::make_tuple(needs.counters, needs.bytes);
}

inline void bind_cuda(py::module_ m) {
  m.attr("operands") = operand_names();
  m.def("loss", [](const py::tuple& shape, const py::tuple& operands, const py::object& guidance,
                   const py::object& normalizer, const py::tuple& params, const py::object& weights,
                   bool score_identity, bool wide, size_t loss, size_t gradient_scale, size_t stats,
                   const py::tuple& memory_tuple, size_t stream) {
    const ParsedLoss arguments(shape, operands, guidance, normalizer, params, weights, score_identity, wide, loss,
                               gradient_scale, stats);
    const gpu::Memory memory = read_memory(memory_tuple.ptr());
    gpu::WeightArguments logits{};
    if (arguments.logits) logits.call = arguments.logits->call, logits.new_bins = arguments.logits->new_bins;
    gpu::Needs needs;
    {
      const py::gil_scoped_release release;
      needs = gpu::loss(arguments.call, arguments.logits ? &logits : nullptr, memory, reinterpret_cast<void*>(stream));
    }
    return lacking(needs, memory);
  });
  m.def("f_weights",
        [](const py::tuple& tuple, size_t weights, size_t ratio, const py::tuple& memory_tuple, size_t stream) {
          const ParsedWeights parsed(tuple.ptr());
          const gpu::Memory memory = read_memory(memory_tuple.ptr());
          gpu::WeightArguments arguments{};
          arguments.call = parsed.call, arguments.new_bins = parsed.new_bins;
          arguments.weights = reinterpret_cast<void*>(weights), arguments.ratio = reinterpret_cast<RatioStats*>(ratio);
          gpu::Needs needs;
          {
            const py::gil_scoped_release release;
            needs = gpu::f_weights(arguments, memory, reinterpret_cast<void*>(stream));
          }
          return lacking(needs, memory);
        });
  m.def("scale_gradient", [](size_t in, size_t out, int dtype, int64_t batch, int64_t elements,
                             const py::object& upstream, const py::object& scale, size_t stream) {
    const gpu::ScaleArguments arguments{reinterpret_cast<void*>(in),
                                        reinterpret_cast<void*>(out),
                                        static_cast<DType>(dtype),
                                        batch,
                                        elements,
                                        read_vector(upstream.ptr(), "the incoming gradient"),
                                        read_vector(scale.ptr(), "scale")};
    const py::gil_scoped_release release;
    gpu::scale_gradient(arguments, reinterpret_cast<void*>(stream));
  });
}

}  // namespace fdistill
