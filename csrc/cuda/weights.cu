// The kernels beside the losses: f-weights by themselves, the elements of a mask, and the incoming gradient.
#include "elements.h"
#include "weights.cuh"

namespace fdistill::gpu {
namespace {

// One block, which keeps the log-ratios and, where they are many, the bins in global memory.
__global__ void __launch_bounds__(kMaxThreads, 1) f_weights_kernel(FD_ARGUMENTS(WeightArguments) arguments) {
  const WeightCall& call = arguments.call;
  const BlockArray<double> weights{arguments.log_ratio}, log_bins{arguments.log_ratio + call.batch};
  const BlockArray<double> ratios{arguments.log_ratio + call.batch + call.n_bins};
  const BlockArray<int> bins{reinterpret_cast<int*>(arguments.log_ratio + 2 * call.batch + call.n_bins)};
  const RatioStats stats = f_weights(call, weights, log_bins, ratios, bins, arguments.new_bins);
  if (arguments.weights != nullptr)
    for (int64_t b = thread(); b < call.batch; b += threads())
      put(arguments.weights, b, weights.get(b), !call.narrow());
  if (thread() == 0) {
    store(&arguments.ratio->ratio_mean, stats.ratio_mean);
    store(&arguments.ratio->clipped_low, stats.clipped_low);
    store(&arguments.ratio->clipped_high, stats.clipped_high);
  }
}

__device__ __forceinline__ int64_t mask_offset(const CountArguments& a, int64_t at) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = a.dims - 1; d >= 0; --d) {
    offset += at % a.size[d] * a.stride[d];
    at /= a.size[d];
  }
  return offset;
}

__global__ void __launch_bounds__(kMaxThreads, 1) count_kernel(FD_ARGUMENTS(CountArguments) a) {
  let_next_kernel_start();
  const int64_t first = static_cast<int64_t>(block()) * threads() + thread(),
                step = static_cast<int64_t>(blocks()) * threads();
  double count[1] = {0};
  if (a.dims == 1 && a.stride[0] == 1) {  // 16 at a time, between an unaligned beginning and end
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.mask) % 16);
    int64_t head = misaligned == 0 ? 0 : 16 - misaligned;
    head = head < a.elements ? head : a.elements;
    const int64_t vectors = (a.elements - head) / 16, tail = head + vectors * 16;
    unsigned on = 0;
    for (int64_t i = first; i < vectors; i += step) {
      const Vec16 bytes = load_once(reinterpret_cast<const Vec16*>(a.mask + head) + i);
#pragma unroll
      for (const uint32_t word : bytes.word) on += ((word & 0x01010101u) * 0x01010101u) >> 24;  // bytes are 0 or 1
    }
    for (int64_t i = first; i < head; i += step) on += load(a.mask + i);
    for (int64_t i = tail + first; i < a.elements; i += step) on += load(a.mask + i);
    count[0] = on;
  } else {
    for (int64_t i = first; i < a.elements; i += step) count[0] += load(a.mask + mask_offset(a, i));
  }
  reduce_block(count);
  if (thread() == 0 && count[0] > 0)  // integers: the order does not matter
    add_atomically(a.total, static_cast<unsigned long long>(count[0]) * static_cast<unsigned long long>(a.times));
}

template <class T>
__device__ void scale(const ScaleArguments& a, double factor, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int kWidth = 16 / sizeof(T);
  const C by = static_cast<C>(factor);
  const T* const in = static_cast<const T*>(a.in);
  T* const out = static_cast<T*>(a.out);
  const bool aligned = (reinterpret_cast<uintptr_t>(in + begin) | reinterpret_cast<uintptr_t>(out + begin)) % 16 == 0;
  for (int64_t at = begin + thread() * kWidth; at < end; at += static_cast<int64_t>(threads()) * kWidth) {
    if (aligned && at + kWidth <= end) {
      Elements<T> values = unpack<T>(load(reinterpret_cast<const Vec16*>(in + at)));
#pragma unroll
      for (C& value : values.v) value *= by;
      store(reinterpret_cast<Vec16*>(out + at), pack<T>(values));
    } else {
      for (int64_t i = at; i < end && i < at + kWidth; ++i)
        store_element(out + i, static_cast<C>(load_element(in + i) * by));
    }
  }
}

// A block to a chunk of a sample. Nothing is read where the factor is 1 and the result has its place already.
__global__ void __launch_bounds__(kMaxThreads, 1) scale_kernel(FD_ARGUMENTS(ScaleArguments) a) {
  const int64_t chunks = (a.elements + kScaleChunk - 1) / kScaleChunk;
  for (int64_t i = block(); i < a.batch * chunks; i += blocks()) {
    const int64_t b = i / chunks, first = i % chunks * kScaleChunk, last = first + kScaleChunk;
    double factor = number(a.upstream, b);
    if (a.scale.data != nullptr) factor *= number(a.scale, b);
    if (factor == 1 && a.in == a.out) continue;
    const int64_t begin = b * a.elements + first, end = b * a.elements + (last < a.elements ? last : a.elements);
    switch (a.dtype) {
      case DType::f32: scale<float>(a, factor, begin, end); break;
      case DType::f64: scale<double>(a, factor, begin, end); break;
      case DType::bf16: scale<bfloat16>(a, factor, begin, end); break;
      default: scale<float16>(a, factor, begin, end);
    }
  }
}

}  // namespace

Kernel<WeightArguments> weights_kernel() { return f_weights_kernel; }
Kernel<CountArguments> mask_kernel() { return count_kernel; }
Kernel<ScaleArguments> gradient_kernel() { return scale_kernel; }

}  // namespace fdistill::gpu
