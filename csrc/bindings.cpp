// pybind11 bindings: tensors come as (address, dtype code, strides), results go to addresses the caller owns. No PyTorch here, and no
// arithmetic.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/loss.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/scale.h"
#include "cpu/weights.h"
#include "records.h"
#if defined(FDISTILL_CUDA)
#include "cuda/bindings.h"
#endif

namespace fdistill {
namespace {

// ------------------------------------------------------------------------------------------------------ instruction sets

#if defined(__x86_64__)
bool has_f16c() {  // which __builtin_cpu_supports of older Clang does not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Kernels*> supported_kernels() {  // the best one first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
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

// -------------------------------------------------------------------------------------------------------------- functions

void py_f_weights(const py::tuple& arguments, size_t weights, size_t ratio_stats) {
  const ParsedWeights parsed(arguments.ptr());
  const py::gil_scoped_release release;
  const WeightCall& call = parsed.call;
  auto* stats = reinterpret_cast<RatioStats*>(ratio_stats);
  if (!call.narrow()) {
    *stats = f_weights(call, reinterpret_cast<double*>(weights), parsed.new_bins);
    return;
  }
  std::vector<double> wide(call.batch);
  *stats = f_weights(call, wide.data(), parsed.new_bins);
  for (int64_t b = 0; b < call.batch; ++b) reinterpret_cast<float*>(weights)[b] = static_cast<float>(wide[b]);
}

void py_loss(const py::tuple& shape, const py::tuple& operands, const py::object& guidance,
             const py::object& normalizer, const py::tuple& params, const py::object& weights, bool score_identity,
             bool wide, size_t loss_address, size_t gradient_scale, size_t stats, int threads) {
  ParsedLoss arguments(shape, operands, guidance, normalizer, params, weights, score_identity, wide, loss_address,
                       gradient_scale, stats);
  const py::gil_scoped_release release;
  const ParsedWeights* const logits = arguments.logits.get();
  std::vector<double> computed;
  RatioStats ratio;
  if (logits) {
    computed.resize(logits->call.batch);
    ratio = f_weights(logits->call, computed.data(), logits->new_bins);
    if (logits->call.narrow())  // as f_weights returns them
      for (double& w : computed) w = static_cast<float>(w);
    Tensor& weight = arguments.call.operands[kWeight];
    weight.data = computed.data(), weight.dtype = DType::f64, weight.dims = 1, weight.strides[0] = 1;
  }
  loss(arguments.call, logits ? &ratio : nullptr, threads, *current_kernels());
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
  const int dims = dimensions(shape.ptr(), "the gradient");
  auto* const pooled = new PooledTensor{};
  DLTensor& tensor = pooled->managed.tensor;
  tensor.device_type = 1;  // kDLCPU
  tensor.ndim = dims;
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
  m.attr("operands") = operand_names();
  m.def("f_weights", &py_f_weights);
  m.def("loss", &py_loss);
  m.def("scale_rows",
        [](size_t from, size_t to, int dtype, int64_t batch, int64_t elements, size_t factor, int threads) {
          const py::gil_scoped_release release;
          scale_rows(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), static_cast<DType>(dtype), batch,
                     elements, reinterpret_cast<const float*>(factor), threads, *current_kernels());
        });
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
#if defined(FDISTILL_CUDA)
  bind_cuda(m.def_submodule("cuda"));
#endif
}
