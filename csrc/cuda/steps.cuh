// The two steps of a sample (see loss.cuh), for the elements that one block has, and the scalars between them.
#pragma once

#include <cmath>
#include <cstring>

#include "operands.cuh"
#include "shared_layout.h"

namespace fdistill::gpu {

// ------------------------------------------------------------------------------------------------------ shared memory

// Differences that stay on the chip: planes of `groups` units.
template <class A>
struct Kept {
  using C = typename A::C;
  using Unit = typename A::Unit;
  static constexpr int units = A::n * sizeof(C) / sizeof(Unit);
  Shared<Unit> memory;
  int64_t groups;

  __device__ __forceinline__ void set(int plane, int64_t group, const typename A::Values& values) const {
#pragma unroll
    for (int u = 0; u < units; ++u) {
      Unit unit;
      memcpy(&unit, values.v + u * (sizeof(Unit) / sizeof(C)), sizeof(unit));
      memory.set((plane * units + u) * groups + group, unit);
    }
  }
  __device__ __forceinline__ typename A::Values get(int plane, int64_t group) const {
    typename A::Values values;
#pragma unroll
    for (int u = 0; u < units; ++u) {
      const Unit unit = memory.get((plane * units + u) * groups + group);
      memcpy(values.v + u * (sizeof(Unit) / sizeof(C)), &unit, sizeof(unit));
    }
    return values;
  }
};

// True in all threads of the block where it is in thread 0.
__device__ __forceinline__ unsigned broadcast(unsigned value) {
  const auto word = shared_memory<unsigned>(SharedLayout::word, 1);
  sync_block();  // the last one has been read
  if (thread() == 0) word.set(0, value);
  sync_block();
  return word.get(0);
}

// ----------------------------------------------------------------------------------------------------- sums of a group

// The sum of n numbers as a tree. error: what rounding took from it, where that is wanted.
template <bool exact, class C, int n>
__device__ __forceinline__ C tree_sum(const C (&values)[n], C& error) {
  C sum[n];
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] = values[i];
#pragma unroll
  for (int step = n / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const C a = sum[i], b = sum[i + step], s = a + b;
      if constexpr (exact) {  // Knuth: a + b = s + error without one more rounding
        const C part = s - a;
        error += (a - (s - part)) + (b - part);
      }
      sum[i] = s;
    }
  }
  return sum[0];
}

// In float32 for float32, one by one in float64 where that overflows. rest: what its roundings took, so that sums of
// n_b are as good as in float64 and hardly depend on the layout.
template <class C, int n>
__device__ __forceinline__ double sum_of(const C (&values)[n], C& rest) {
  C error = 0;
  const C sum = tree_sum<(sizeof(C) == 4)>(values, error);
  if (sum - sum == 0) {
    rest += error;
    return static_cast<double>(sum);
  }
  double wide = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) wide += static_cast<double>(values[i]);
  return wide;
}

// The same for squares, which also underflow.
template <class C, int n>
__device__ __forceinline__ double sum_of_squares(const C (&values)[n]) {
  C squares[n];
#pragma unroll
  for (int i = 0; i < n; ++i) squares[i] = values[i] * values[i];
  C unused = 0;
  const C sum = tree_sum<false>(squares, unused);
  if (sizeof(C) == 8 || (sum > C(1e-24f) && sum < C(1e36f))) return static_cast<double>(sum);
  double wide = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) wide += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return wide;
}

// ------------------------------------------------------------------------------------------------------------- measure

template <class A, bool plain>
__device__ __forceinline__ typename A::Values guided_teacher(const LossArguments& args, const A& access,
                                                             typename A::C guidance, const typename A::Raw& teacher,
                                                             const typename A::Raw& uncond) {
  typename A::Values t = access.values(teacher);
  if (plain || args.data[kUncond] == nullptr) return t;
  const typename A::Values u = access.values(uncond);
#pragma unroll
  for (int i = 0; i < A::n; ++i) t.v[i] = u.v[i] + guidance * (t.v[i] - u.v[i]);
  return t;
}

template <class C>
__device__ __forceinline__ C guidance_of(const LossArguments& args, int64_t b) {
  return static_cast<C>(args.guidance.data == nullptr ? args.params.guidance_scale : number(args.guidance, b));
}

template <class C>
__device__ __forceinline__ C magnitude(C v) {
  return v < 0 ? -v : v;
}

__device__ __forceinline__ int valid_from(int64_t at, int64_t end, int n) {
  const int64_t left = end - at;
  return left <= 0 ? 0 : left < n ? static_cast<int>(left) : n;
}

// Elements [begin, end) of a sample. Sums of this thread alone.
template <class A, bool plain, bool on_chip>
__device__ Measures measure(const LossArguments& args, const A& access, const Kept<A>& kept, int64_t begin, int64_t end,
                            double weight) {
  using C = typename A::C;
  using Values = typename A::Values;
  constexpr int n = A::n, batch = plain ? 2 : 1;  // groups whose loads are under way together
  const bool distances = plain || args.params.normalizer == Normalizer::mean_abs;
  const bool scales = !plain && args.gradient_scale != nullptr;
  const bool guided = !plain && args.data[kUncond] != nullptr;
  const bool converted = !plain && distances && args.data[kXt] != nullptr;
  const bool identity = !plain && args.score_identity;
  const auto is_half = [&](int o) { return args.data[o] != nullptr && args.dtype[o] == DType::f16; };
  const bool bounds_all = identity && scales && (is_half(kDTeacher) || is_half(kDFake));
  const bool reads_x = distances || identity, reads_fake = on_chip || scales;
  const bool counts = !plain && args.data[kMask] != nullptr && args.params.reduction == Reduction::sample;
  const C guidance = guided ? guidance_of<C>(args, access.b) : C(1);
  const C alpha = static_cast<C>(args.params.identity_alpha), identity_factor = C(1) + magnitude(C(2) * alpha);
  Rows<C> rows{args, access.b, weight, 1.0};
  Measures sums{};
  C rest = 0;

  const int64_t groups = (end - begin + n - 1) / n;
  for (int64_t first = thread(); first < groups; first += static_cast<int64_t>(batch) * threads()) {
    typename A::Raw x[batch]{}, t[batch]{}, f[batch]{}, u[batch]{}, q[batch]{};
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t at = begin + (first + static_cast<int64_t>(i) * threads()) * n;
      const int valid = valid_from(at, end, n);
      if (valid == 0) continue;
      if (reads_x) x[i] = access.fetch(kX, at, valid, true);
      t[i] = access.fetch(kTeacher, at, valid, on_chip);
      if (reads_fake) f[i] = access.fetch(kFake, at, valid, on_chip);
      if (guided) u[i] = access.fetch(kUncond, at, valid, on_chip);
      if (converted) q[i] = access.fetch(kXt, at, valid, true);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t group = first + static_cast<int64_t>(i) * threads(), at = begin + group * n;
      const int valid = valid_from(at, end, n);
      if (valid == 0) continue;
      const unsigned on = scales || counts ? mask_bits<n>(args, access.b, at, valid) : 0;
      const Values teacher = guided_teacher<A, plain>(args, access, guidance, t[i], u[i]), X = access.values(x[i]);
      Values difference{};  // fake - T; for the score identity T - fake
      if (reads_fake) {
        const Values fake = access.values(f[i]);
#pragma unroll
        for (int j = 0; j < n; ++j) difference.v[j] = identity ? teacher.v[j] - fake.v[j] : fake.v[j] - teacher.v[j];
      }
      if constexpr (on_chip) kept.set(0, group, difference);
      if (identity && on_chip) {
        Values e;  // T - x
#pragma unroll
        for (int j = 0; j < n; ++j) e.v[j] = teacher.v[j] - X.v[j];
        kept.set(1, group, e);
      }
      if (scales) {  // as csrc/cpu/kernels.cpp
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (j == 0 || !A::whole_rows) rows.at(j < valid ? at + j : at);
          C bound = magnitude(rows.k * difference.v[j]);
          if (bounds_all) bound = bound * identity_factor + magnitude(rows.k * (X.v[j] - teacher.v[j]));
          if ((on >> j & 1) && bound - bound == 0 && bound > sums.largest) sums.largest = bound;
        }
      }
      if (counts) sums.count += bits_set(on);
      if (!distances) continue;
      C distance[n];
      const Values noisy = access.values(q[i]);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        C target = teacher.v[j];
        if (converted && j < valid) {
          if (j == 0 || !A::whole_rows) rows.at(j < valid ? at + j : at);
          target = rows.a * noisy.v[j] + rows.c * target;
        }
        distance[j] = j < valid ? magnitude(X.v[j] - target) : C(0);
      }
      sums.distance += sum_of(distance, rest);
    }
  }
  sums.distance += static_cast<double>(rest);
  return sums;
}

// ------------------------------------------------------------------------------------------------- scalars of a sample

struct Scalars {
  double n;        // n_b
  double count;    // masked elements that the mean is over
  double inverse;  // 1 / count
  int exponent;    // k of a float16 gradient
};

// The number of elements a loss is the mean over; at least 1. count: of the sample's elements on the mask.
__device__ __forceinline__ double divisor_of(const LossArguments& args, double count) {
  if (args.params.reduction == Reduction::sum) return 1;
  double n = static_cast<double>(args.elements);
  if (args.params.reduction == Reduction::sample)
    n = args.data[kMask] == nullptr ? n : count;
  else
    n = args.data[kMask] == nullptr ? n * static_cast<double>(args.batch)
                                    : static_cast<double>(load_fresh(args.masked));
  return n > 1 ? n : 1;
}

__device__ __forceinline__ Scalars scalars_of(const LossArguments& args, int64_t b, const Measures& measured) {
  Scalars s{1, divisor_of(args, measured.count), 1, 0};
  if (args.params.normalizer == Normalizer::mean_abs)
    s.n = measured.distance / static_cast<double>(args.elements);
  else if (args.params.normalizer == Normalizer::given)
    s.n = number(args.normalizer, b);
  s.inverse = 1 / s.count;
  if (args.gradient_scale != nullptr) {
    const double most = measured.largest * s.inverse / (s.n + args.params.eps);
    if (finite(most) && most > 0) {
      const int exponent = 14 - std::ilogb(most);
      s.exponent = exponent < -120 ? -120 : exponent > 120 ? 120 : exponent;
    }
  }
  return s;
}

// ------------------------------------------------------------------------------------------------------- differentiate

template <class A, bool plain, bool on_chip>
__device__ SampleSums differentiate(const LossArguments& args, const A& access, const Kept<A>& kept, int64_t begin,
                                    int64_t end, double weight, const Scalars& scalars) {
  using C = typename A::C;
  using Values = typename A::Values;
  constexpr int n = A::n, batch = plain ? 2 : 1;  // groups whose loads are under way together
  const bool guided = !plain && args.data[kUncond] != nullptr;
  const bool identity = !plain && args.score_identity;
  const bool zero = !plain && args.params.zero_nonfinite, statistics = !plain && args.stats != nullptr;
  const C guidance = guided ? guidance_of<C>(args, access.b) : C(1);
  const C alpha = static_cast<C>(args.params.identity_alpha), two_alpha = alpha + alpha;
  const C power = static_cast<C>(std::ldexp(1.0, scalars.exponent));
  const C inverse = static_cast<C>(A::scales_late ? scalars.inverse : std::ldexp(scalars.inverse, scalars.exponent));
  Rows<C> rows{args, access.b, weight, scalars.n + args.params.eps};
  if (plain) rows.at(0);
  SampleSums sums{};

  const int64_t groups = (end - begin + n - 1) / n;
  for (int64_t first = thread(); first < groups; first += static_cast<int64_t>(batch) * threads()) {
    typename A::Raw t[batch]{}, f[batch]{}, u[batch]{}, x[batch]{};
    if constexpr (!on_chip) {
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int64_t at = begin + (first + static_cast<int64_t>(i) * threads()) * n;
        const int valid = valid_from(at, end, n);
        if (valid == 0) continue;
        t[i] = access.fetch(kTeacher, at, valid, true);
        f[i] = access.fetch(kFake, at, valid, true);
        if (guided) u[i] = access.fetch(kUncond, at, valid, true);
        if (identity) x[i] = access.fetch(kX, at, valid, true);
      }
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t group = first + static_cast<int64_t>(i) * threads(), at = begin + group * n;
      const int valid = valid_from(at, end, n);
      if (valid == 0) continue;
      const unsigned on = plain ? (1u << valid) - 1 : mask_bits<n>(args, access.b, at, valid);
      Values difference, e{};
      if constexpr (on_chip) {
        difference = kept.get(0, group);
        if (identity) e = kept.get(1, group);
      } else {
        const Values teacher = guided_teacher<A, plain>(args, access, guidance, t[i], u[i]), fake = access.values(f[i]);
#pragma unroll
        for (int j = 0; j < n; ++j) difference.v[j] = identity ? teacher.v[j] - fake.v[j] : fake.v[j] - teacher.v[j];
        if (identity) {
          const Values X = access.values(x[i]);
#pragma unroll
          for (int j = 0; j < n; ++j) e.v[j] = teacher.v[j] - X.v[j];
        }
      }
      Values g;
      if (!identity) {  // g = k (fake - T)
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (!plain && (j == 0 || !A::whole_rows)) rows.at(j < valid ? at + j : at);
          g.v[j] = rows.k * difference.v[j];
          const bool good = plain || g.v[j] - g.v[j] == 0, used = on >> j & 1;
          if (statistics && used && !good) sums.bad += 1;
          if (!(used && (good || !zero))) g.v[j] = 0;
          if (statistics) sums.absolute += static_cast<double>(magnitude(g.v[j]));
        }
        sums.squares += sum_of_squares(g.v);
      } else {  // with D = T - F, E = T - x:  term = k D (E - alpha D)
        Values d_teacher, d_fake;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (j == 0 || !A::whole_rows) rows.at(j < valid ? at + j : at);
          const C k = rows.k, d = difference.v[j], kd = k * d;
          C term = kd * (e.v[j] - alpha * d);
          g.v[j] = -kd;                                   // d term / dx = -k D
          d_fake.v[j] = -(k * (e.v[j] - two_alpha * d));  // d term / dF = -k (E - 2 alpha D)
          d_teacher.v[j] = kd - d_fake.v[j];              // d term / dT = k (D + E - 2 alpha D)
          const bool good = term - term == 0 && g.v[j] - g.v[j] == 0 && d_fake.v[j] - d_fake.v[j] == 0 &&
                            d_teacher.v[j] - d_teacher.v[j] == 0,
                     used = on >> j & 1;
          if (statistics && used && !good) sums.bad += 1;
          if (!(used && (good || !zero))) term = g.v[j] = d_fake.v[j] = d_teacher.v[j] = 0;
          sums.terms += static_cast<double>(term);
          if (statistics) sums.absolute += static_cast<double>(magnitude(g.v[j]));
        }
        if (statistics) sums.squares += sum_of_squares(g.v);
#pragma unroll
        for (int j = 0; j < n; ++j) d_teacher.v[j] = d_teacher.v[j] * inverse, d_fake.v[j] = d_fake.v[j] * inverse;
        if (args.data[kDTeacher] != nullptr) access.put(kDTeacher, at, valid, d_teacher, power);
        if (args.data[kDFake] != nullptr) access.put(kDFake, at, valid, d_fake, power);
      }
      if (statistics) sums.count += bits_set(on);
      if (args.data[kDx] != nullptr) {
#pragma unroll
        for (int j = 0; j < n; ++j) g.v[j] = g.v[j] * inverse;
        access.put(kDx, at, valid, g, power);
      }
    }
  }
  return sums;
}

}  // namespace fdistill::gpu
