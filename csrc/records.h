// Python's tuples to the records of a call: tensors come as (address, dtype code, strides). Arguments were checked in
// Python; what would be read or written out of bounds here is refused here too.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "fdistill/calls.h"

namespace fdistill {

namespace py = pybind11;

inline PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }
inline void* address(PyObject* value) { return PyLong_AsVoidPtr(value); }
inline double real(PyObject* value) { return PyFloat_AsDouble(value); }
inline int integer(PyObject* value) { return static_cast<int>(PyLong_AsLong(value)); }
inline bool flag(PyObject* value) { return PyObject_IsTrue(value) == 1; }

// The number of dimensions of a tuple of sizes or strides, if they have room.
inline int dimensions(PyObject* tuple, const char* name) {
  const Py_ssize_t n = PyTuple_GET_SIZE(tuple);
  if (n > kMaxDims)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(n) + " dimensions; the kernels take " +
                                std::to_string(kMaxDims));
  return static_cast<int>(n);
}

// (address, dtype, strides), or None where the tensor is absent or has no elements
inline void read_tensor(PyObject* value, const char* name, Tensor& tensor) {
  if (value == Py_None) return;
  tensor.data = address(item(value, 0));
  if (tensor.data == nullptr)  // would pass for absent
    throw std::invalid_argument(std::string(name) + " has no memory of its own");
  tensor.dtype = static_cast<DType>(integer(item(value, 1)));
  PyObject* strides = item(value, 2);
  tensor.dims = dimensions(strides, name);
  for (int d = 0; d < tensor.dims; ++d) tensor.strides[d] = PyLong_AsLongLong(item(strides, d));
}

inline WeightParams read_weight_params(PyObject* p) {
  return {integer(item(p, 0)), real(item(p, 1)), real(item(p, 2)), real(item(p, 3)), real(item(p, 4)),
          real(item(p, 5)),    real(item(p, 6)), flag(item(p, 7)), real(item(p, 8)), flag(item(p, 9))};
}

inline LossParams read_loss_params(PyObject* p) {
  return {real(item(p, 0)),
          static_cast<Prediction>(integer(item(p, 1))),
          static_cast<Normalizer>(integer(item(p, 2))),
          real(item(p, 3)),
          flag(item(p, 4)),
          static_cast<Reduction>(integer(item(p, 5))),
          real(item(p, 6)),
          flag(item(p, 7))};
}

// The names of the operands of a loss in the order that they come in; the gradients follow.
inline py::tuple operand_names() {
  py::tuple names(static_cast<size_t>(kDx));
  for (int o = 0; o < kDx; ++o) names[o] = kOperandNames[o];
  return names;
}

// A call of f_weights: (batch, heads, logits, t, address of bins, number of bins, address of the new bins, params)
struct ParsedWeights {
  WeightCall call{};
  float* new_bins;

  explicit ParsedWeights(PyObject* value) {
    call.batch = PyLong_AsLongLong(item(value, 0));
    call.heads = PyLong_AsLongLong(item(value, 1));
    Tensor logits, t;
    read_tensor(item(value, 2), "logits", logits);
    read_tensor(item(value, 3), "t", t);
    call.logits = logits.data, call.logits_dtype = logits.dtype;
    call.logits_stride = logits.stride(0), call.heads_stride = logits.stride(1);
    call.t = t.data, call.t_dtype = t.dtype, call.t_stride = t.stride(0);
    call.bins = static_cast<const float*>(address(item(value, 4)));
    call.n_bins = integer(item(value, 5));
    new_bins = static_cast<float*>(address(item(value, 6)));
    call.params = read_weight_params(item(value, 7));
    if (PyErr_Occurred()) throw py::error_already_set();
  }
};

// A call of a loss, with the sizes that it points to. weights: the arguments of f_weights, or None where operands has a
// weight or there is none.
struct ParsedLoss {
  LossCall call{};
  std::unique_ptr<ParsedWeights> logits;

  ParsedLoss(const py::tuple& shape, const py::tuple& operands, const py::object& guidance,
             const py::object& normalizer, const py::tuple& params, const py::object& weights, bool score_identity,
             bool wide, size_t loss, size_t gradient_scale, size_t stats) {
    call.dims = dimensions(shape.ptr(), "x");
    for (int d = 0; d < call.dims; ++d) sizes_[d] = PyLong_AsLongLong(item(shape.ptr(), d));
    call.shape = sizes_;
    for (int o = 0; o < kOperands; ++o) read_tensor(item(operands.ptr(), o), kOperandNames[o], call.operands[o]);
    read_tensor(guidance.ptr(), "guidance_scale", call.guidance);
    read_tensor(normalizer.ptr(), "normalizer", call.normalizer);
    call.params = read_loss_params(params.ptr());
    call.score_identity = score_identity;
    call.wide = wide;
    call.loss = reinterpret_cast<void*>(loss);
    call.gradient_scale = reinterpret_cast<void*>(gradient_scale);
    call.stats = reinterpret_cast<void*>(stats);
    if (!weights.is_none()) logits = std::make_unique<ParsedWeights>(weights.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  ParsedLoss(const ParsedLoss&) = delete;
  ParsedLoss& operator=(const ParsedLoss&) = delete;

 private:
  int64_t sizes_[kMaxDims];
};

}  // namespace fdistill
