// Element types, and float16/bfloat16 as bit patterns with conversions that round to nearest even.
// Internal linkage: these are compiled for several instruction sets, and the linker must not merge the copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fdistill {

enum class DType : int { f32, f64, bf16, f16, boolean, u8, i8, i16, i32, i64 };

static FD_HOST_DEVICE int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16: return 2;
    default: return 1;
  }
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
static FD_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

static FD_HOST_DEVICE float to_float(bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

static FD_HOST_DEVICE bfloat16 to_bfloat16(float v) {
#if defined(__CUDA_ARCH__)
  bfloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(v));
  return rounded;
#else
  const uint32_t u = bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // keep NaN a NaN
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

static FD_HOST_DEVICE float to_float(float16 v) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  // Shifted to float32's fields the exponent is 112 too small; one multiplication mends it, subnormals included.
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
#endif
}

static FD_HOST_DEVICE float16 to_float16(float v) {
#if defined(__CUDA_ARCH__)
  float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
#else
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

static FD_HOST_DEVICE float to_float(float v) { return v; }
static FD_HOST_DEVICE double to_float(double v) { return v; }

template <class T>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
// float32 inside for float32, bfloat16 and float16; float64 for float64.
template <class T>
using compute_t = typename compute_type<T>::type;

static FD_HOST_DEVICE void store(float v, float& to) { to = v; }
static FD_HOST_DEVICE void store(double v, double& to) { to = v; }
static FD_HOST_DEVICE void store(float v, bfloat16& to) { to = to_bfloat16(v); }
static FD_HOST_DEVICE void store(float v, float16& to) { to = to_float16(v); }
// A float64 computation with a narrower gradient: rounded once, by way of a float32 rounded to odd.
static FD_HOST_DEVICE float round_to_odd(double v) {
  const float nearest = static_cast<float>(v);
  const double back = nearest;
  if (back == v || !(back - back == 0)) return nearest;
  uint32_t u = bit_cast<uint32_t>(nearest);
  const bool away = (back > v) == (v > 0);
  if (away) --u;  // truncate toward zero, then set the sticky bit
  return bit_cast<float>(u | 1u);
}
static FD_HOST_DEVICE void store(double v, float& to) { to = static_cast<float>(v); }
static FD_HOST_DEVICE void store(double v, bfloat16& to) { to = to_bfloat16(round_to_odd(v)); }
static FD_HOST_DEVICE void store(double v, float16& to) { to = to_float16(round_to_odd(v)); }

// Element i of a strided array of any dtype, as float64. load: how a `const T*` is read.
FD_NO_EXEC_CHECK
template <class Load>
static FD_HOST_DEVICE double element(const void* data, DType dtype, int64_t i, Load load) {
  switch (dtype) {
    case DType::f32: return load(static_cast<const float*>(data) + i);
    case DType::f64: return load(static_cast<const double*>(data) + i);
    case DType::bf16: return to_float(load(static_cast<const bfloat16*>(data) + i));
    case DType::f16: return to_float(load(static_cast<const float16*>(data) + i));
    case DType::boolean:
    case DType::u8: return load(static_cast<const uint8_t*>(data) + i);
    case DType::i8: return load(static_cast<const int8_t*>(data) + i);
    case DType::i16: return load(static_cast<const int16_t*>(data) + i);
    case DType::i32: return load(static_cast<const int32_t*>(data) + i);
    case DType::i64: return static_cast<double>(load(static_cast<const int64_t*>(data) + i));
  }
  return 0;
}

static inline double element(const void* data, DType dtype, int64_t i) {
  return element(data, dtype, i, [](const auto* p) { return *p; });
}

}  // namespace fdistill
