// pybind11 bindings: tensors come as (address, dtype code, strides), results go to addresses the caller owns. No PyTorch here, and no
// arithmetic. Arguments were checked in Python.
#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/loss.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/weights.h"

namespace py = pybind11;

namespace fdistill {
namespace {

// ------------------------------------------------------------------------------------------------------ instruction sets

std::vector<const Kernels*> supported_kernels() {  // the best one first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels());
  if (avx2) found.push_back(&avx2::kernels());
#endif
  found.push_back(&plain::kernels());
  return found;
}

std::atomic<const Kernels*>& current_kernels() {
  static std::atomic<const Kernels*> current{supported_kernels().front()};
  return current;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : supported_kernels()) {
    if (name == kernels->name) {
      current_kernels() = kernels;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("isa: " + name + " does not run here; these do: " + known);
}

// ------------------------------------------------------------------------------------------------------ Python to records

PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }
void* address(PyObject* value) { return PyLong_AsVoidPtr(value); }
double real(PyObject* value) { return PyFloat_AsDouble(value); }
int integer(PyObject* value) { return static_cast<int>(PyLong_AsLong(value)); }
bool flag(PyObject* value) { return PyObject_IsTrue(value) == 1; }

// (address, dtype, strides), or None
void read_tensor(PyObject* value, Tensor& tensor) {
  if (value == Py_None) return;
  tensor.data = address(item(value, 0));
  tensor.dtype = static_cast<DType>(integer(item(value, 1)));
  PyObject* strides = item(value, 2);
  tensor.dims = static_cast<int>(PyTuple_GET_SIZE(strides));
  for (int d = 0; d < tensor.dims; ++d) tensor.strides[d] = PyLong_AsLongLong(item(strides, d));
}

WeightParams read_weight_params(PyObject* p) {
  return {integer(item(p, 0)), real(item(p, 1)), real(item(p, 2)), real(item(p, 3)), real(item(p, 4)),
          real(item(p, 5)),    real(item(p, 6)), flag(item(p, 7)), real(item(p, 8)), flag(item(p, 9))};
}

LossParams read_loss_params(PyObject* p) {
  return {real(item(p, 0)),
          static_cast<Prediction>(integer(item(p, 1))),
          static_cast<Normalizer>(integer(item(p, 2))),
          real(item(p, 3)),
          flag(item(p, 4)),
          static_cast<Reduction>(integer(item(p, 5))),
          real(item(p, 6)),
          flag(item(p, 7))};
}

// A call of f_weights: (batch, heads, logits, t, address of bins, number of bins, address of the new bins, params)
struct WeightArguments {
  WeightCall call{};
  float* new_bins;

  explicit WeightArguments(PyObject* value) {
    call.batch = PyLong_AsLongLong(item(value, 0));
    call.heads = PyLong_AsLongLong(item(value, 1));
    Tensor logits, t;
    read_tensor(item(value, 2), logits);
    read_tensor(item(value, 3), t);
    call.logits = logits.data, call.logits_dtype = logits.dtype;
    call.logits_stride = logits.stride(0), call.heads_stride = logits.stride(1);
    call.t = t.data, call.t_dtype = t.dtype, call.t_stride = t.stride(0);
    call.bins = static_cast<const float*>(address(item(value, 4)));
    call.n_bins = integer(item(value, 5));
    new_bins = static_cast<float*>(address(item(value, 6)));
    call.params = read_weight_params(item(value, 7));
  }
};

bool narrow(const WeightCall& call) { return call.logits_dtype != DType::f64; }

// -------------------------------------------------------------------------------------------------------------- functions

void py_f_weights(const py::tuple& arguments, size_t weights, size_t ratio_stats) {
  const WeightArguments parsed(arguments.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  const py::gil_scoped_release release;
  const WeightCall& call = parsed.call;
  auto* stats = reinterpret_cast<RatioStats*>(ratio_stats);
  if (!narrow(call)) {
    *stats = f_weights(call, reinterpret_cast<double*>(weights), parsed.new_bins);
    return;
  }
  std::vector<double> wide(call.batch);
  *stats = f_weights(call, wide.data(), parsed.new_bins);
  for (int64_t b = 0; b < call.batch; ++b) reinterpret_cast<float*>(weights)[b] = static_cast<float>(wide[b]);
}

// weights: the arguments of f_weights, or None where operands has a weight or there is none.
void py_loss(const py::tuple& shape, const py::tuple& operands, const py::object& guidance, const py::object& normalizer,
             const py::tuple& params, const py::object& weights, bool score_identity, bool wide, size_t loss_address,
             size_t gradient_scale, size_t stats, int threads) {
  LossCall call{};
  int64_t sizes[kMaxDims];
  call.dims = static_cast<int>(shape.size());
  for (int d = 0; d < call.dims; ++d) sizes[d] = PyLong_AsLongLong(item(shape.ptr(), d));
  call.shape = sizes;
  for (int o = 0; o < kOperands; ++o) read_tensor(item(operands.ptr(), o), call.operands[o]);
  read_tensor(guidance.ptr(), call.guidance);
  read_tensor(normalizer.ptr(), call.normalizer);
  call.params = read_loss_params(params.ptr());
  call.score_identity = score_identity;
  call.wide = wide;
  call.loss = reinterpret_cast<void*>(loss_address);
  call.gradient_scale = reinterpret_cast<void*>(gradient_scale);
  call.stats = reinterpret_cast<void*>(stats);
  call.threads = threads;
  call.kernels = current_kernels();
  std::unique_ptr<WeightArguments> logits;
  if (!weights.is_none()) logits = std::make_unique<WeightArguments>(weights.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();

  const py::gil_scoped_release release;
  std::vector<double> computed;
  RatioStats ratio;
  if (logits) {
    computed.resize(logits->call.batch);
    ratio = f_weights(logits->call, computed.data(), logits->new_bins);
    if (narrow(logits->call))  // as f_weights returns them
      for (double& w : computed) w = static_cast<float>(w);
    Tensor& weight = call.operands[kWeight];
    weight.data = computed.data(), weight.dtype = DType::f64, weight.dims = 1, weight.strides[0] = 1;
    call.ratio = &ratio;
  }
  loss(call);
}

// -------------------------------------------------------------------------------------------- tensors over pooled memory

// The DLPack ABI (github.com/dmlc/dlpack, dlpack.h, version 0): the part a CPU tensor needs.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct PooledTensor {
  DLManagedTensor managed;
  int64_t sizes[2 * kMaxDims];
};

// A capsule for torch's from_dlpack; the memory goes back to the pool with the tensor.
PyObject* pooled_empty(const py::tuple& shape, const py::tuple& strides, int dtype, size_t bytes) {
  auto* const pooled = new PooledTensor{};
  DLTensor& tensor = pooled->managed.tensor;
  tensor.device_type = 1;  // kDLCPU
  tensor.ndim = static_cast<int32_t>(shape.size());
  tensor.shape = pooled->sizes, tensor.strides = pooled->sizes + kMaxDims;
  for (int d = 0; d < tensor.ndim; ++d) {
    tensor.shape[d] = PyLong_AsLongLong(item(shape.ptr(), d));
    tensor.strides[d] = PyLong_AsLongLong(item(strides.ptr(), d));
  }
  const auto type = static_cast<DType>(dtype);
  tensor.code = type == DType::bf16 ? 4 : 2;  // kDLBfloat, kDLFloat
  tensor.bits = type == DType::f64 ? 64 : type == DType::f32 ? 32 : 16;
  tensor.lanes = 1;
  pooled->managed.deleter = [](DLManagedTensor* self) {
    pool_release(self->tensor.data);
    delete reinterpret_cast<PooledTensor*>(self);
  };
  try {
    tensor.data = pool_acquire(bytes);
  } catch (...) {
    delete pooled;
    throw;
  }
  return PyCapsule_New(&pooled->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // taken over
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace
}  // namespace fdistill

PYBIND11_MODULE(_C, m) {
  using namespace fdistill;
  m.doc() = "The compiled kernels of fdistill_ops. Called by fdistill_ops.backends alone.";
  m.def("f_weights", &py_f_weights);
  m.def("loss", &py_loss);
  m.def("pooled_empty", [](const py::tuple& shape, const py::tuple& strides, int dtype, size_t bytes) {
    return py::reinterpret_steal<py::object>(pooled_empty(shape, strides, dtype, bytes));
  });
  m.def("pool_trim", &pool_trim);
  m.def("isa", [] { return current_kernels().load()->name; });
  m.def("isas", [] {
    py::list names;
    for (const Kernels* kernels : supported_kernels()) names.append(kernels->name);
    return names;
  });
  m.def("set_isa", &set_isa);
  m.def("threading", &threading);
}
