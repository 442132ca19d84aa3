// Sums over a block, in a fixed order, and numbers of any dtype.
#pragma once

#include "device.h"
#include "shared_layout.h"

namespace fdistill::gpu {

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ double operator()(double a, double b) const { return a > b ? a : b; }
};

template <class Combine>
__device__ __forceinline__ double reduce_warp(double value, Combine combine) {
#pragma unroll 1  // code that runs once stays short: instructions come from memory at first
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, shuffle_xor(value, lanes));
  return value;
}

// Every thread receives the totals. The first `maxima` values are reduced to their largest, the others to their sum.
template <int n, int maxima = 0>
__device__ __forceinline__ void reduce_block(double (&values)[n]) {
  static_assert(n <= kMaxReduced);
  const auto partial = shared_memory<double>(0, kMaxWarps * kMaxReduced);
  const unsigned warp = thread() / kWarp, warps = threads() / kWarp;
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = i < maxima ? reduce_warp(values[i], Max()) : reduce_warp(values[i], Add());
  if (warps == 1) return;
  sync_block();  // whoever read the last totals is done
  if (thread() % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) partial.set(warp * n + i, values[i]);
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    double total = partial.get(i);
#pragma unroll 1
    for (unsigned w = 1; w < warps; ++w) {
      const double next = partial.get(w * n + i);
      total = i < maxima ? Max()(total, next) : total + next;
    }
    values[i] = total;
  }
}

struct Load {
  template <class T>
  __device__ __forceinline__ T operator()(const T* p) const {
    return load(p);
  }
  __device__ __forceinline__ bfloat16 operator()(const bfloat16* p) const { return {load(&p->bits)}; }
  __device__ __forceinline__ float16 operator()(const float16* p) const { return {load(&p->bits)}; }
};

__device__ __forceinline__ double number(const void* data, DType dtype, int64_t i) {
  return element(data, dtype, i, Load());
}
// The same for floating dtypes alone.
__device__ __forceinline__ double floating(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return Load()(static_cast<const float*>(data) + i);
    case DType::f64: return Load()(static_cast<const double*>(data) + i);
    case DType::bf16: return to_float(Load()(static_cast<const bfloat16*>(data) + i));
    default: return to_float(Load()(static_cast<const float16*>(data) + i));
  }
}

__device__ __forceinline__ double number(const Vector& vector, int64_t b) {
  return floating(vector.data, vector.dtype, b * vector.stride);
}

__device__ __forceinline__ int bits_set(unsigned bits) {
  bits = bits - (bits >> 1 & 0x55u);
  bits = (bits & 0x33u) + (bits >> 2 & 0x33u);
  return static_cast<int>((bits + (bits >> 4)) & 0xfu);
}

__device__ __forceinline__ bool finite(double v) { return v - v == 0; }
__device__ __forceinline__ double not_a_number() { return bit_cast<double>(uint64_t{0x7ff8000000000000u}); }

// A result, in the type computed in.
__device__ __forceinline__ void put(void* array, int64_t i, double value, bool wide) {
  if (wide)
    store(static_cast<double*>(array) + i, value);
  else
    store(static_cast<float*>(array) + i, static_cast<float>(value));
}

}  // namespace fdistill::gpu
