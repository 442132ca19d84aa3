// Sixteen lanes of float32 or float64 on whatever registers the translation unit is compiled for. The lane count, and with
// it every order of summation, is the same for all instruction sets; so are the bits of the results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "fdistill/dtype.h"
#include "sanitizers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FD_REGISTER_BYTES 64
#elif defined(__AVX2__)
#define FD_REGISTER_BYTES 32
#else
#define FD_REGISTER_BYTES 16
#endif

#define FD_INLINE inline FD_ALWAYS_INLINE

namespace fdistill::FD_ISA {

constexpr int kLanes = 16;

// n registers of E. A tree of pairs, not an array: compilers keep its leaves in registers.
template <class E, int n>
struct Pack {
  Pack<E, n / 2> lo, hi;
};
template <class E>
struct Pack<E, 1> {
  typedef E type __attribute__((vector_size(FD_REGISTER_BYTES)));
  type r;
};
template <class E>
constexpr int kPer = FD_REGISTER_BYTES / sizeof(E);  // lanes of a register

template <class Result, class F, class P, class... Rest>
FD_INLINE Result map(F f, const P& first, const Rest&... rest) {
  if constexpr (requires { first.r; }) {
    return Result{f(first.r, rest.r...)};
  } else {
    using Half = decltype(Result::lo);
    return Result{map<Half>(f, first.lo, rest.lo...), map<Half>(f, first.hi, rest.hi...)};
  }
}

template <class E, int n>
FD_INLINE Pack<E, n> load_pack(const E* p) {
  if constexpr (n == 1) {
    Pack<E, 1> pack;
    __builtin_memcpy(&pack.r, p, sizeof(pack.r));
    return pack;
  } else {
    return {load_pack<E, n / 2>(p), load_pack<E, n / 2>(p + n / 2 * kPer<E>)};
  }
}

template <class E, int n>
FD_INLINE Pack<E, n> broadcast(E value) {
  if constexpr (n == 1) {
    return {value - typename Pack<E, 1>::type{}};
  } else {
    const auto half = broadcast<E, n / 2>(value);
    return {half, half};
  }
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type magnitude = 0x7fffffffu, infinity = 0x7f800000u;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type magnitude = 0x7fffffffffffffffull, infinity = 0x7ff0000000000000ull;
};

// ---------------------------------------------------------------------------------------------------------------- masks

// 16 m lanes of 0 or all ones, as wide as the lanes of T.
template <class T, int m = 1>
struct Mask {
  using U = typename Bits<T>::type;
  static constexpr int n = m * kLanes / kPer<U>;
  using R = typename Pack<U, 1>::type;
  Pack<U, n> bits;

  static FD_INLINE Mask all() { return {broadcast<U, n>(~U{0})}; }
  static FD_INLINE Mask of(const uint8_t* bytes) { return {of_bytes<n>(bytes)}; }  // [16 m], 0 or not
  friend FD_INLINE Mask operator&(const Mask& a, const Mask& b) {
    return {map<Pack<U, n>>([](R x, R y) { return x & y; }, a.bits, b.bits)};
  }
  friend FD_INLINE Mask operator~(const Mask& a) {
    return {map<Pack<U, n>>([](R x) { return ~x; }, a.bits)};
  }

 private:
  template <int count>
  static FD_INLINE Pack<U, count> of_bytes(const uint8_t* bytes) {
    if constexpr (count > 1) {
      return {of_bytes<count / 2>(bytes), of_bytes<count / 2>(bytes + count / 2 * kPer<U>)};
    } else {
      return {(R)(widened(bytes) != 0)};
    }
  }
  static FD_INLINE R widened(const uint8_t* bytes) {
#if defined(__AVX512F__)
    if constexpr (sizeof(U) == 4)
      return (R)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    else
      return (R)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
    if constexpr (sizeof(U) == 4)
      return (R)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    int four;
    __builtin_memcpy(&four, bytes, sizeof(four));
    return (R)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
#else
    R r;
    for (int i = 0; i < kPer<U>; ++i) r[i] = bytes[i];
    return r;
#endif
  }
};

// How often each lane was on a mask.
template <class T, int m>
struct Count {
  using M = Mask<T, m>;
  Pack<typename M::U, M::n> lanes = broadcast<typename M::U, M::n>(0);

  FD_INLINE void add(const M& mask) {  // all ones is -1
    lanes = map<decltype(lanes)>([](typename M::R x, typename M::R y) { return x - y; }, lanes, mask.bits);
  }
  int64_t total() const {
    typename M::U v[m * kLanes];
    __builtin_memcpy(v, &lanes, sizeof(v));
    int64_t sum = 0;
    for (int i = 0; i < m * kLanes; ++i) sum += static_cast<int64_t>(v[i]);
    return sum;
  }
};

// --------------------------------------------------------------------------------------------------------------- numbers

// 16 m lanes.
template <class T, int m = 1>
struct Lanes {
  using U = typename Bits<T>::type;
  static constexpr int n = m * kLanes / kPer<T>;
  using P = Pack<T, n>;
  using R = typename Pack<T, 1>::type;
  using RU = typename Pack<U, 1>::type;
  P v;

  static FD_INLINE Lanes all(T value) { return {broadcast<T, n>(value)}; }
  friend FD_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    return {map<P>([](R x, R y) { return x + y; }, a.v, b.v)};
  }
  friend FD_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    return {map<P>([](R x, R y) { return x - y; }, a.v, b.v)};
  }
  friend FD_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
    return {map<P>([](R x, R y) { return x * y; }, a.v, b.v)};
  }
  FD_INLINE Lanes abs() const {
    return {map<P>([](R x) { return (R)((RU)x & Bits<T>::magnitude); }, v)};
  }
  friend FD_INLINE Lanes larger(const Lanes& a, const Lanes& b) {  // b where it is NaN
    return {map<P>([](R x, R y) { return x > y ? x : y; }, a.v, b.v)};
  }
  T largest() const {
    T values[m * kLanes], result = 0;
    __builtin_memcpy(values, &v, sizeof(values));
    for (const T value : values) result = value > result ? value : result;
    return result;
  }
  FD_INLINE Mask<T, m> finite() const {
    return {map<Pack<U, n>>([](R x) { return (RU)(((RU)x & Bits<T>::magnitude) < Bits<T>::infinity); }, v)};
  }
  FD_INLINE Lanes where(const Mask<T, m>& mask) const {  // 0 off the mask
    return {map<P>([](R x, RU bits) { return (R)((RU)x & bits); }, v, mask.bits)};
  }
};

// The sum of the halves of 32 lanes; 16 lanes as they are.
template <class T>
FD_INLINE Lanes<T> fold(const Lanes<T>& v) {
  return v;
}
template <class T>
FD_INLINE Lanes<T> fold(const Lanes<T, 2>& v) {
  return Lanes<T>{v.v.lo} + Lanes<T>{v.v.hi};
}

FD_INLINE Lanes<double> widen(const Lanes<double>& v) { return v; }

template <int n>
FD_INLINE Pack<double, 2 * n> widen(const Pack<float, n>& v) {
  if constexpr (n > 1) {
    return {widen(v.lo), widen(v.hi)};
  } else {
    using R = typename Pack<double, 1>::type;
#if defined(__AVX512F__)
    const __m512 r = (__m512)v.r;
    return {{(R)_mm512_cvtps_pd(_mm512_castps512_ps256(r))}, {(R)_mm512_cvtps_pd(_mm512_extractf32x8_ps(r, 1))}};
#elif defined(__AVX2__)
    const __m256 r = (__m256)v.r;
    return {{(R)_mm256_cvtps_pd(_mm256_castps256_ps128(r))}, {(R)_mm256_cvtps_pd(_mm256_extractf128_ps(r, 1))}};
#elif defined(__x86_64__)
    const __m128 r = (__m128)v.r;
    return {{(R)_mm_cvtps_pd(r)}, {(R)_mm_cvtps_pd(_mm_movehl_ps(r, r))}};
#else
    return {{R{v.r[0], v.r[1]}}, {R{v.r[2], v.r[3]}}};
#endif
  }
}
FD_INLINE Lanes<double> widen(const Lanes<float>& v) { return {widen(v.v)}; }

// Sums in float64, lane by lane; total() adds the lanes in a fixed order.
struct Sum {
  Lanes<double> lanes = Lanes<double>::all(0.0);

  template <class T>
  FD_INLINE void add(const Lanes<T>& v) {
    lanes = lanes + widen(v);
  }
  template <class T>
  FD_INLINE void add(const Lanes<T, 2>& v) {
    add(Lanes<T>{v.v.lo});
    add(Lanes<T>{v.v.hi});
  }
  template <class T>
  FD_INLINE void add_square(const Lanes<T>& v) {
    const Lanes<double> wide = widen(v);
    lanes = lanes + wide * wide;
  }
  template <class T>
  FD_INLINE void add_square(const Lanes<T, 2>& v) {
    add_square(Lanes<T>{v.v.lo});
    add_square(Lanes<T>{v.v.hi});
  }
  double total() const { return total_of(lanes.v); }

 private:
  template <int n>
  static FD_INLINE double total_of(const Pack<double, n>& v) {
    if constexpr (n > 1) {
      using R = typename Pack<double, 1>::type;
      return total_of(map<Pack<double, n / 2>>([](R x, R y) { return x + y; }, v.lo, v.hi));
    } else {
      double values[kPer<double>];
      __builtin_memcpy(values, &v.r, sizeof(values));
      return total_of<kPer<double>>(values);
    }
  }
  template <int n>
  static FD_INLINE double total_of(const double* v) {
    if constexpr (n == 1) {
      return v[0];
    } else {
      double halves[n / 2];
      for (int i = 0; i < n / 2; ++i) halves[i] = v[i] + v[i + n / 2];
      return total_of<n / 2>(halves);
    }
  }
};

// ------------------------------------------------------------------------------------------------------ loads and stores

// A register to memory; past the caches (so that the line is not read first) where `stream` and the address allow it.
template <class R>
FD_INLINE void write(void* p, const R& value, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    if constexpr (sizeof(R) == 16) _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)value);
#if defined(__AVX2__)
    if constexpr (sizeof(R) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)value);
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(R) == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)value);
#endif
    return;
  }
#endif
  (void)stream;
  __builtin_memcpy(p, &value, sizeof(value));
}

FD_INLINE void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
FD_INLINE Lanes<T> load(const T* p) {
  return {load_pack<T, Lanes<T>::n>(p)};
}

template <class T, int n>
FD_INLINE void store_pack(T* p, const Pack<T, n>& v, bool stream) {
  if constexpr (n == 1) {
    write(p, v.r, stream);
  } else {
    store_pack(p, v.lo, stream);
    store_pack(p + n / 2 * kPer<T>, v.hi, stream);
  }
}

template <bool any, class T>
FD_INLINE void store(T* p, const Lanes<T>& l, bool stream) {
  store_pack(p, l.v, stream);
}

// Where no instruction converts a whole register of 16-bit floats.
template <class Half>
FD_INLINE Lanes<float> load_one_by_one(const Half* p) {
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return load(v);
}

// 32 bfloat16 are the upper halves of 32 float32: lanes 0 to 15 are those at even positions, the others those at odd ones,
// so that a shift and a mask take the place of conversions.
FD_INLINE Lanes<float, 2> load(const bfloat16* p) {
  using L = Lanes<float, 2>;
  const auto pairs = load_pack<uint32_t, L::n / 2>(reinterpret_cast<const uint32_t*>(p));
  using P = decltype(L::P::lo);
  return {{map<P>([](L::RU u) { return (L::R)(u << 16); }, pairs),
           map<P>([](L::RU u) { return (L::R)(u & 0xffff0000u); }, pairs)}};
}

FD_INLINE Lanes<float> load(const float16* p) {
#if defined(__AVX512F__)
  return {{(Lanes<float>::R)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}};
#elif defined(__F16C__)
  const auto part = [](const float16* from) FD_ALWAYS_INLINE {
    return (Lanes<float>::R)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  };
  return {{{part(p)}, {part(p + 8)}}};
#else
  return load_one_by_one(p);
#endif
}

// Bits of float32 whose upper half is the bfloat16, rounded to nearest even; with `any` a NaN stays one.
template <bool any, class RU>
FD_INLINE RU round_to_bfloat16(RU u) {
  const RU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  if constexpr (!any) return rounded;
  const RU nan = (RU)((u & 0x7fffffffu) > 0x7f800000u);
  return (rounded & ~nan) | ((u | 0x400000u) & nan);
}

// any: whether there may be a NaN, which the plain rounding would turn into an infinity.
template <bool any>
FD_INLINE void store(bfloat16* p, const Lanes<float, 2>& l, bool stream) {
#if defined(__AVX512BW__)
  // Without NaN the same in 32 lanes at once: up where the lower half is at least 0x8001, or 0x8000 of an odd one.
  if constexpr (!any) {
    constexpr __mmask32 odd_lanes = 0xaaaaaaaa;
    const __m512i even = (__m512i)l.v.lo.r, odd = (__m512i)l.v.hi.r, one = _mm512_set1_epi16(1);
    const __m512i upper = _mm512_mask_blend_epi16(odd_lanes, _mm512_srli_epi32(even, 16), odd);
    const __m512i lower = _mm512_mask_blend_epi16(odd_lanes, even, _mm512_slli_epi32(odd, 16));
    const __m512i half = _mm512_set1_epi16(static_cast<short>(0x8000));
    constexpr int even_or = 0xae;  // (~upper & 1) | 0x8000
    const __mmask32 up = _mm512_cmpge_epu16_mask(lower, _mm512_ternarylogic_epi32(upper, one, half, even_or));
    return write(p, _mm512_mask_add_epi16(upper, up, upper, one), stream);
  }
#endif
  using RU = Lanes<float>::RU;
  const auto pairs = map<Pack<uint32_t, Lanes<float, 2>::n / 2>>(
      [](auto even, auto odd) {
        return (round_to_bfloat16<any>((RU)even) >> 16) | (round_to_bfloat16<any>((RU)odd) & 0xffff0000u);
      },
      l.v.lo, l.v.hi);
  store_pack(reinterpret_cast<uint32_t*>(p), pairs, stream);
}

template <bool any>
FD_INLINE void store(float16* p, const Lanes<float>& l, bool stream) {
#if defined(__AVX512F__)
  write(p, _mm512_cvtps_ph((__m512)l.v.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#elif defined(__F16C__)
  write(p, _mm256_cvtps_ph((__m256)l.v.lo.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
  write(p + 8, _mm256_cvtps_ph((__m256)l.v.hi.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#else
  (void)stream;
  float v[kLanes];
  __builtin_memcpy(v, &l, sizeof(v));
  for (int i = 0; i < kLanes; ++i) p[i] = to_float16(v[i]);
#endif
}

}  // namespace fdistill::FD_ISA
