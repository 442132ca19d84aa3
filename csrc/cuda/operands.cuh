// How the kernels reach the operands of a sample: elements in groups, rows of coefficients, the mask.
#pragma once

#include "elements.h"
#include "fdistill/prediction.h"

namespace fdistill::gpu {

// Offset of element `at` of sample b, in the order of the leading operand.
__device__ __forceinline__ int64_t offset_of(const LossArguments& args, int o, int64_t b, int64_t at) {
  int64_t offset = b * args.batch_stride[o];
  auto rest = static_cast<uint64_t>(at);  // unsigned numbers divide faster
#pragma unroll 1
  for (int d = args.dims - 1; d > 0; --d) {
    const auto size = static_cast<uint64_t>(args.size[d]);
    const uint64_t next = rest / size;
    offset += static_cast<int64_t>(rest - next * size) * args.stride[o][d];
    rest = next;
  }
  return offset + static_cast<int64_t>(rest) * args.stride[o][0];
}

// ----------------------------------------------------------------------------------------------------------- elements

// Operands of one dtype whose samples are dense, in one order. Groups that are not complete or not aligned go element
// by element.
template <class T>
struct Dense {
  using C = compute_t<T>;
  using Values = Elements<T>;
  using Raw = Vec16;
  using Unit = Vec16;  // what is kept in shared memory at a time
  static constexpr int n = Values::n;
  const LossArguments& args;
  int64_t b;

  __device__ __forceinline__ T* pointer(int o, int64_t at) const {
    return static_cast<T*>(args.data[o]) + b * args.batch_stride[o] + at;
  }

  // `valid` elements from `at` on, zeros after them. once: nobody reads them again.
  __device__ __forceinline__ Raw fetch(int o, int64_t at, int valid, bool once) const {
    if (args.aligned && valid == n) {
      const auto* p = reinterpret_cast<const Vec16*>(pointer(o, at));
      return once ? load_once(p) : load(p);
    }
    Values values{};
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < valid) values.v[i] = load_element(pointer(o, at) + i);
    return pack<T>(values);
  }
  __device__ __forceinline__ Values values(const Raw& raw) const { return unpack<T>(raw); }

  // What the block is going to read first, while it does something else: of x, teacher and fake in turn, as it reads
  // them.
  __device__ __forceinline__ void announce(int64_t begin, int64_t end) const {
    constexpr int64_t line = 128 / sizeof(T);
#pragma unroll 1
    for (int64_t at = begin + thread() * line; at < end; at += threads() * line)
#pragma unroll
      for (int o = kX; o <= kFake; ++o) prefetch(pointer(o, at));
  }

  __device__ __forceinline__ void put(int o, int64_t at, int valid, const Values& values, C) const {
    if (args.aligned && valid == n) return store_once(reinterpret_cast<Vec16*>(pointer(o, at)), pack<T>(values));
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < valid) store_element(pointer(o, at) + i, values.v[i]);
  }
  // Coefficients are the same for a whole group; the factor of float16 gradients is part of 1 / count.
  static constexpr bool whole_rows = true, scales_late = false;
};

// Operands of different dtypes of at most 32 bits whose samples are dense, in one order: four elements at a time.
struct Mixed {
  using C = float;
  using Values = Elements<float>;
  struct Raw {
    Vec16 bits;  // as they were loaded: two words of 16-bit elements
    DType dtype;
  };
  using Unit = Vec16;
  static constexpr int n = Values::n;
  const LossArguments& args;
  int64_t b;

  template <class T>
  __device__ __forceinline__ T* pointer(int o, int64_t at) const {
    return static_cast<T*>(args.data[o]) + b * args.batch_stride[o] + at;
  }

  __device__ __forceinline__ Raw fetch(int o, int64_t at, int valid, bool once) const {
    const DType dtype = args.dtype[o];
    if (!args.aligned || valid < n) {
      Values values{};
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (i < valid)
          values.v[i] = static_cast<float>(floating(args.data[o], dtype, b * args.batch_stride[o] + at + i));
      return {pack<float>(values), DType::f32};
    }
    if (dtype == DType::f32) {
      const auto* p = reinterpret_cast<const Vec16*>(pointer<float>(o, at));
      return {once ? load_once(p) : load(p), dtype};
    }
    const auto* p = reinterpret_cast<const Vec8*>(pointer<uint16_t>(o, at));
    const Vec8 half = once ? load_once(p) : load(p);
    return {{{half.word[0], half.word[1], 0, 0}}, dtype};
  }
  __device__ __forceinline__ Values values(const Raw& raw) const {
    switch (raw.dtype) {
      case DType::f32: return unpack<float>(raw.bits);
      case DType::bf16: return first_of(unpack<bfloat16>(raw.bits));
      default: return first_of(unpack<float16>(raw.bits));
    }
  }

  __device__ __forceinline__ void announce(int64_t begin, int64_t end) const {
#pragma unroll 1
    for (int64_t at = begin + thread() * 64; at < end; at += threads() * 64)
#pragma unroll 1
      for (int o = kX; o <= kFake; ++o) {
        if (args.dtype[o] != DType::f32) {
          prefetch(pointer<uint16_t>(o, at));
          continue;
        }
        prefetch(pointer<float>(o, at));
        if (at + 32 < end) prefetch(pointer<float>(o, at + 32));
      }
  }

  __device__ __forceinline__ void put(int o, int64_t at, int valid, const Values& values, C float16_scale) const {
    switch (args.dtype[o]) {
      case DType::f32: return put_as<float>(o, at, valid, values, 1);
      case DType::bf16: return put_as<bfloat16>(o, at, valid, values, 1);
      default: return put_as<float16>(o, at, valid, values, float16_scale);
    }
  }
  static constexpr bool whole_rows = true, scales_late = true;

 private:
  template <class T>
  __device__ __forceinline__ static Values first_of(const Elements<T>& more) {
    Values values;
#pragma unroll
    for (int i = 0; i < n; ++i) values.v[i] = more.v[i];
    return values;
  }
  template <class T>
  __device__ __forceinline__ void put_as(int o, int64_t at, int valid, const Values& values, C scale) const {
    T* const p = pointer<T>(o, at);
    Elements<T> scaled{};
#pragma unroll
    for (int i = 0; i < n; ++i) scaled.v[i] = values.v[i] * scale;
    if (args.aligned && valid == n) {
      const Vec16 bits = pack<T>(scaled);
      if constexpr (sizeof(T) == 4) return store_once(reinterpret_cast<Vec16*>(p), bits);
      return store_once(reinterpret_cast<Vec8*>(p), Vec8{{bits.word[0], bits.word[1]}});
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < valid) store_element(p + i, scaled.v[i]);
  }
};

// Any strides, any mixture of dtypes: element by element. In float64 with the elements of a group together, so that
// sums have the order, and the bits, of dense operands.
template <class Computed>
struct Strided {
  using C = Computed;
  static constexpr int n = sizeof(C) / 4;
  struct Values {
    C v[n];
  };
  using Raw = Values;
  using Unit = Values;
  const LossArguments& args;
  int64_t b;

  __device__ __forceinline__ Raw fetch(int o, int64_t at, int valid, bool) const {
    Values values{};
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < valid) values.v[i] = static_cast<C>(floating(args.data[o], args.dtype[o], offset_of(args, o, b, at + i)));
    return values;
  }
  __device__ __forceinline__ Values values(const Raw& raw) const { return raw; }
  __device__ __forceinline__ void announce(int64_t, int64_t) const {}

  __device__ __forceinline__ void put(int o, int64_t at, int valid, const Values& values, C float16_scale) const {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < valid) put_one(o, at + i, values.v[i], float16_scale);
  }
  // Rows end anywhere, and the factor of float16 gradients comes last, where the gradient's dtype is known.
  static constexpr bool whole_rows = false, scales_late = true;

 private:
  __device__ __forceinline__ void put_one(int o, int64_t at, C value, C float16_scale) const {
    const int64_t offset = offset_of(args, o, b, at);
    switch (args.dtype[o]) {
      case DType::f32: return store_element(static_cast<float*>(args.data[o]) + offset, value);
      case DType::f64: return store(static_cast<double*>(args.data[o]) + offset, static_cast<double>(value));
      case DType::bf16: return store_element(static_cast<bfloat16*>(args.data[o]) + offset, value);
      default:
        return store_element(static_cast<float16*>(args.data[o]) + offset, static_cast<C>(value * float16_scale));
    }
  }
};

// ----------------------------------------------------------------------------------------------------- rows and mask

// The coefficients at a position of a sample: x0 = a x_t + c prediction, and k = w c / divisor.
template <class C>
struct Rows {
  const LossArguments& args;
  int64_t b;
  double weight;  // of the whole sample, where args has no weight
  double divisor;
  C a{}, c{}, k{};
  int64_t begin = 0, end = 0;  // positions for which they hold

  __device__ __forceinline__ void at(int64_t position) {
    if (position >= begin && position < end) return;
    begin = 0, end = args.elements;
    int64_t offset[3] = {b * args.batch_stride[kWeight], b * args.batch_stride[kAlpha], b * args.batch_stride[kSigma]};
    if (args.rows) {
      const int64_t run = args.row_run;
      begin = position / run * run, end = begin + run;
      auto rest = static_cast<uint64_t>(position);
#pragma unroll 1
      for (int d = args.dims - 1; d >= 0; --d) {
        const auto size = static_cast<uint64_t>(args.size[d]);
        const uint64_t next = d > 0 ? rest / size : 0;
        const auto index = static_cast<int64_t>(rest - next * size);
        offset[0] += index * args.stride[kWeight][d];
        offset[1] += index * args.stride[kAlpha][d];
        offset[2] += index * args.stride[kSigma][d];
        rest = next;
      }
    }
    double values[3] = {weight, 1, 0};
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {
      const int o = kWeight + i;
      if (args.data[o] == nullptr) continue;
      const double value = floating(args.data[o], args.dtype[o], i == 0 ? offset[0] : i == 1 ? offset[1] : offset[2]);
      if (i == 0) values[0] = value;
      if (i == 1) values[1] = value;
      if (i == 2) values[2] = value;
    }
    const X0Coefficients x0 = x0_coefficients(args.params.prediction, values[1], values[2]);
    a = static_cast<C>(x0.a), c = static_cast<C>(x0.c), k = static_cast<C>(values[0] * x0.c / divisor);
  }
};

// A bit for each of n elements from `at` on: whether it is one of the `valid` ones and on the mask.
template <int n>
__device__ __forceinline__ unsigned mask_bits(const LossArguments& args, int64_t b, int64_t at, int valid) {
  const unsigned all = (1u << valid) - 1;
  if (args.data[kMask] == nullptr || valid == 0) return all;
  const auto* mask = static_cast<const uint8_t*>(args.data[kMask]);
  unsigned bits = 0;
  if (args.dense_mask) {
    mask += b * args.batch_stride[kMask] + at;
    if constexpr (n >= 4) {
      if (valid == n && reinterpret_cast<uintptr_t>(mask) % 4 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 4) {  // bytes are 0 or 1
          const uint32_t word = load(reinterpret_cast<const uint32_t*>(mask + i));
          bits |= ((word & 0x01010101u) * 0x10204080u >> 28 & 15u) << i;
        }
        return bits;
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < valid && load(mask + i) != 0) bits |= 1u << i;
    return bits;
  }
  const int inner = args.dims - 1;
  int64_t left = args.size[inner] - at % args.size[inner], offset = offset_of(args, kMask, b, at);
  if (args.stride[kMask][inner] == 0 && valid <= left) return load(mask + offset) != 0 ? all : 0;
#pragma unroll 1
  for (int i = 0; i < valid; ++i) {
    if (left == 0) left = args.size[inner], offset = offset_of(args, kMask, b, at + i);
    if (load(mask + offset) != 0) bits |= 1u << i;
    offset += args.stride[kMask][inner], --left;
  }
  return bits;
}

}  // namespace fdistill::gpu
