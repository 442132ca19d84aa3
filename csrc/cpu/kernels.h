// The vector kernels: n consecutive elements of one sample, all operands dense. One table of them per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fdistill/dtype.h"

namespace fdistill {

template <class T>
struct Block {
  using C = compute_t<T>;
  int64_t n;
  const T* x;           // [n], or null
  const T* teacher;     // [n]
  const T* fake;        // [n]
  const T* uncond;      // [n], or null
  const T* x_t;         // [n], or null
  const uint8_t* mask;  // [n] bool, or null
  C guidance;           // T = uncond + guidance (teacher - uncond)
  C a, c;               // x0 = a x_t + c prediction
  C k;                  // w c / (n_b + eps)
  C inverse;            // of the number of masked elements
  C identity_alpha;     // score identity only
  const C* a_rows;      // [n] instead of a, or null
  const C* c_rows;      // [n] instead of c, or null
  const C* k_rows;      // [n] instead of k, or null
  T* d_x;               // [n], or null
  T* d_teacher;         // [n], or null (score identity)
  T* d_fake;            // [n], or null (score identity)
  bool zero_nonfinite, stats, stream;
};

struct BlockSums {
  double terms = 0;     // of the loss: g^2, or the score-identity terms
  double squares = 0;   // of g
  double absolute = 0;  // of g, where statistics are wanted
  int64_t bad = 0;      // elements of g that are not finite
};

template <class T>
struct TypedKernels {
  double (*distance)(const Block<T>&);                    // sum |x - T|
  double (*first_distance)(const Block<T>&);              // the same, of an x that is read again
  double (*largest)(const Block<T>&);                     // max |g|; with x: a bound on all derivatives
  void (*score_difference)(const Block<T>&, BlockSums&);  // g, its sums, and d_x = g * inverse
  void (*score_identity)(const Block<T>&, BlockSums&);    // terms, and the three derivatives * inverse
};

// Rows of n elements between a 16-bit type and the one computed in, rounded to nearest even.
template <class T>
struct Conversion {
  void (*widen)(const T* from, float* to, int64_t n);
  void (*narrow)(const float* from, T* to, int64_t n);
  void (*scale)(const T* from, T* to, float factor, int64_t n);
};

struct Kernels {
  const char* name;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  TypedKernels<bfloat16> bf16;
  TypedKernels<float16> f16;
  Conversion<bfloat16> convert_bf16;
  Conversion<float16> convert_f16;

  template <class T>
  const TypedKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>) return f32;
    if constexpr (std::is_same_v<T, double>) return f64;
    if constexpr (std::is_same_v<T, bfloat16>) return bf16;
    if constexpr (std::is_same_v<T, float16>) return f16;
  }
  template <class T>
  const Conversion<T>& conversion() const {
    if constexpr (std::is_same_v<T, bfloat16>) return convert_bf16;
    if constexpr (std::is_same_v<T, float16>) return convert_f16;
  }
};

namespace plain {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace fdistill
