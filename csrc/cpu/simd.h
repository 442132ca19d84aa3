// Sixteen lanes of float32 or float64 on whatever registers the translation unit is compiled for. The lane count, and with
// it every order of summation, is the same for all instruction sets; so are the bits of the results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fdistill/dtype.h"

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

namespace fdistill::FD_ISA {

constexpr int kLanes = 16;

template <class T, int bytes>
struct Register {
  typedef T type __attribute__((vector_size(bytes)));
};

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

// 16 lanes of 0 or all ones, as wide as the lanes of T.
template <class T>
struct Mask {
  using U = typename Bits<T>::type;
  static constexpr int per = FD_REGISTER_BYTES / sizeof(U), count = kLanes / per;
  using R = typename Register<U, FD_REGISTER_BYTES>::type;
  R r[count];

  static Mask of(const uint8_t* bytes) {  // [16], 0 or not
    Mask m;
    for (int i = 0; i < count; ++i) {
      typedef uint8_t Bytes __attribute__((vector_size(per)));
      Bytes b;
      __builtin_memcpy(&b, bytes + i * per, sizeof(b));
      m.r[i] = (R)(__builtin_convertvector(b, R) != 0);
    }
    return m;
  }
  static Mask all() {
    Mask m;
    for (int i = 0; i < count; ++i) m.r[i] = ~R{};
    return m;
  }
  friend Mask operator&(Mask a, Mask b) {
    for (int i = 0; i < count; ++i) a.r[i] &= b.r[i];
    return a;
  }
  friend Mask operator~(Mask a) {
    for (int i = 0; i < count; ++i) a.r[i] = ~a.r[i];
    return a;
  }
};

template <class T>
struct Lanes {
  using U = typename Bits<T>::type;
  static constexpr int per = FD_REGISTER_BYTES / sizeof(T), count = kLanes / per;
  using R = typename Register<T, FD_REGISTER_BYTES>::type;
  using RU = typename Register<U, FD_REGISTER_BYTES>::type;
  R r[count];

  static Lanes all(T v) {
    Lanes l;
    for (int i = 0; i < count; ++i) l.r[i] = v - R{};
    return l;
  }
  friend Lanes operator+(Lanes a, Lanes b) {
    for (int i = 0; i < count; ++i) a.r[i] += b.r[i];
    return a;
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    for (int i = 0; i < count; ++i) a.r[i] -= b.r[i];
    return a;
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    for (int i = 0; i < count; ++i) a.r[i] *= b.r[i];
    return a;
  }
  Lanes abs() const {
    Lanes l;
    for (int i = 0; i < count; ++i) l.r[i] = (R)((RU)r[i] & Bits<T>::magnitude);
    return l;
  }
  Mask<T> finite() const {
    Mask<T> m;
    for (int i = 0; i < count; ++i) m.r[i] = (RU)(((RU)r[i] & Bits<T>::magnitude) < Bits<T>::infinity);
    return m;
  }
  Lanes where(Mask<T> m) const {  // 0 off the mask
    Lanes l;
    for (int i = 0; i < count; ++i) l.r[i] = (R)((RU)r[i] & m.r[i]);
    return l;
  }
};

// How often each lane was on a mask.
template <class T>
struct Count {
  Mask<T> lanes{};

  void add(const Mask<T>& m) {
    for (int i = 0; i < m.count; ++i) lanes.r[i] -= m.r[i];  // all ones is -1
  }
  int64_t total() const {
    typename Bits<T>::type v[kLanes];
    __builtin_memcpy(v, lanes.r, sizeof(v));
    int64_t n = 0;
    for (int i = 0; i < kLanes; ++i) n += static_cast<int64_t>(v[i]);
    return n;
  }
};

// Sums in float64, lane by lane; total() adds the lanes in a fixed order.
struct Sum {
  Lanes<double> lanes = Lanes<double>::all(0.0);

  void add(const Lanes<double>& v) { lanes = lanes + v; }
  void add(const Lanes<float>& v) { add(widen(v)); }

  static Lanes<double> widen(const Lanes<float>& v) {
    Lanes<double> wide;
    constexpr int half = Lanes<double>::per;
    typedef float Half __attribute__((vector_size(half * sizeof(float))));
    for (int i = 0; i < Lanes<double>::count; ++i) {
      Half h;
      __builtin_memcpy(&h, reinterpret_cast<const char*>(v.r) + i * sizeof(h), sizeof(h));
      wide.r[i] = __builtin_convertvector(h, typename Lanes<double>::R);
    }
    return wide;
  }
  double total() const {
    double v[kLanes];
    __builtin_memcpy(v, lanes.r, sizeof(v));
    for (int step = kLanes / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) v[i] += v[i + step];
    return v[0];
  }
};

inline Lanes<double> widen(const Lanes<double>& v) { return v; }
inline Lanes<double> widen(const Lanes<float>& v) { return Sum::widen(v); }

// ---------------------------------------------------------------------------------------------------- loads and stores

template <class T>
inline Lanes<T> load(const T* p) {
  Lanes<T> l;
  __builtin_memcpy(l.r, p, sizeof(l.r));
  return l;
}

inline Lanes<float> load(const bfloat16* p) {
  Lanes<float> l;
  typedef uint16_t Narrow __attribute__((vector_size(FD_REGISTER_BYTES / 2)));
  for (int i = 0; i < l.count; ++i) {
    Narrow n;
    __builtin_memcpy(&n, p + i * l.per, sizeof(n));
    l.r[i] = (Lanes<float>::R)(__builtin_convertvector(n, Lanes<float>::RU) << 16);
  }
  return l;
}

inline Lanes<float> load(const float16* p) {
  Lanes<float> l;
#if defined(__AVX512F__)
  l.r[0] = (Lanes<float>::R)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i)
    l.r[i] = (Lanes<float>::R)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
#else
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  __builtin_memcpy(l.r, v, sizeof(v));
#endif
  return l;
}

// Whether a streaming store can go to p: past the caches, so that the line is not read first.
inline bool can_stream(const void* p) {
#if defined(__x86_64__)
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
#else
  (void)p;
  return false;
#endif
}

template <class R>
inline void write(void* p, const R& value, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    if constexpr (sizeof(R) == 16) {
      _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)value);
    }
#if defined(__AVX2__)
    if constexpr (sizeof(R) == 32) _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)value);
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(R) == 64) _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)value);
#endif
    if constexpr (sizeof(R) >= 16) return;
  }
#endif
  __builtin_memcpy(p, &value, sizeof(value));
}

template <class T>
inline void store(T* p, const Lanes<T>& l, bool stream) {
  for (int i = 0; i < l.count; ++i) write(p + i * l.per, l.r[i], stream);
}

inline void store(bfloat16* p, const Lanes<float>& l, bool stream) {
  typedef uint16_t Narrow __attribute__((vector_size(FD_REGISTER_BYTES / 2)));
  for (int i = 0; i < l.count; ++i) {
    using RU = Lanes<float>::RU;
    const RU u = (RU)l.r[i];
    const RU nan = (RU)((u & 0x7fffffffu) > 0x7f800000u);
    const RU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const RU kept = (u >> 16) | 0x40u;  // a NaN must not round to infinity
    write(p + i * l.per, __builtin_convertvector((rounded & ~nan) | (kept & nan), Narrow), stream);
  }
}

inline void store(float16* p, const Lanes<float>& l, bool stream) {
#if defined(__AVX512F__)
  write(p, _mm512_cvtps_ph((__m512)l.r[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i)
    write(p + 8 * i, _mm256_cvtps_ph((__m256)l.r[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#else
  (void)stream;
  float v[kLanes];
  __builtin_memcpy(v, l.r, sizeof(v));
  for (int i = 0; i < kLanes; ++i) p[i] = to_float16(v[i]);
#endif
}

inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fdistill::FD_ISA
