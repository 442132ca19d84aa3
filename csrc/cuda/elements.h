// Elements of a tensor in registers: sixteen bytes of them at a time, or one by one.
#pragma once

#include "block.h"

namespace fdistill::gpu {

// As many elements as sixteen bytes hold, in the type computed in.
template <class T>
struct Elements {
  static constexpr int n = 16 / sizeof(T);
  compute_t<T> v[n];
};

template <class T>
__device__ __forceinline__ Elements<T> unpack(const Vec16& raw) {
  Elements<T> values;
#pragma unroll
  for (int i = 0; i < Elements<T>::n; ++i) {
    if constexpr (sizeof(T) == 8)
      values.v[i] = bit_cast<double>(static_cast<uint64_t>(raw.word[2 * i + 1]) << 32 | raw.word[2 * i]);
    else if constexpr (sizeof(T) == 4)
      values.v[i] = bit_cast<float>(raw.word[i]);
    else
      values.v[i] = to_float(T{static_cast<uint16_t>(raw.word[i / 2] >> (i % 2 * 16))});
  }
  return values;
}

template <class T>
__device__ __forceinline__ Vec16 pack(const Elements<T>& values) {
  Vec16 raw{};
#pragma unroll
  for (int i = 0; i < Elements<T>::n; ++i) {
    T narrow;
    fdistill::store(values.v[i], narrow);
    if constexpr (sizeof(T) == 8) {
      raw.word[2 * i] = static_cast<uint32_t>(bit_cast<uint64_t>(narrow));
      raw.word[2 * i + 1] = static_cast<uint32_t>(bit_cast<uint64_t>(narrow) >> 32);
    } else if constexpr (sizeof(T) == 4) {
      raw.word[i] = bit_cast<uint32_t>(narrow);
    } else {
      raw.word[i / 2] |= static_cast<uint32_t>(narrow.bits) << (i % 2 * 16);
    }
  }
  return raw;
}

template <class T>
__device__ __forceinline__ compute_t<T> load_element(const T* p) {
  return static_cast<compute_t<T>>(to_float(Load()(p)));
}

template <class T, class C>
__device__ __forceinline__ void store_element(T* p, C value) {
  T narrow;
  fdistill::store(value, narrow);
  if constexpr (sizeof(T) == 2)
    store(&p->bits, narrow.bits);
  else
    store(p, narrow);
}

}  // namespace fdistill::gpu
