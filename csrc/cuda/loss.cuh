// The kernels of the losses; each takes a sample through two steps.
//
//   measure:        n_b = mean |x - T|                        reads x, teacher (uncond, x_t)
//   differentiate:  g = w c / (n_b + eps) (fake - T)          writes the gradient, sums the loss
//
// on_chip: a block, or a cluster of blocks, to a sample. measure reads fake as well and keeps fake - T in shared memory, so that every
// operand is read once. The blocks of a cluster read each other's sums.
//
// split: samples that are too large for that, in chunks. Blocks draw tickets; a ticket is a chunk to measure or one to differentiate, which
// waits until its sample has been measured. It waits for lower tickets alone, whose blocks run, so there is always one that
// goes on. Where nothing has to be measured there are gradients only, and nobody waits.
//
// Sums are taken in an order that depends on the sample's size and its operands alone: partial sums of a chunk are put together by
// whichever block comes last, in the order of the chunks. float16 gradients are stored times a power of two: see csrc/cpu/loss.cpp.
#pragma once

#include "operands.cuh"
#include "shared_layout.h"
#include "weights.cuh"

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

// In float32 for float32, one by one in float64 where that overflows. rest: what its roundings took, so that sums of n_b are as good as
// in float64 and hardly depend on the layout.
template <class C, int n>
__device__ __forceinline__ double sum_of(const C (&values)[n], C& rest) {
  C error = 0;
  const C sum = tree_sum<sizeof(C) == 4>(values, error);
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
__device__ __forceinline__ typename A::Values guided_teacher(const LossArguments& args, const A& access, typename A::C guidance,
                                                             const typename A::Raw& teacher, const typename A::Raw& uncond) {
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
      if (scales) {  // bounds on every derivative, as csrc/cpu/kernels.cpp
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (j == 0 || !A::whole_rows) rows.at(j < valid ? at + j : at);
          C bound = magnitude(rows.k * difference.v[j]);
          if (identity) bound = bound * identity_factor + magnitude(rows.k * (X.v[j] - teacher.v[j]));
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
    n = args.data[kMask] == nullptr ? n * static_cast<double>(args.batch) : static_cast<double>(load_fresh(args.masked));
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
__device__ SampleSums differentiate(const LossArguments& args, const A& access, const Kept<A>& kept, int64_t begin, int64_t end,
                                    double weight, const Scalars& scalars) {
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
          g.v[j] = -kd;                                     // d term / dx = -k D
          d_fake.v[j] = -(k * (e.v[j] - two_alpha * d));    // d term / dF = -k (E - 2 alpha D)
          d_teacher.v[j] = kd - d_fake.v[j];                // d term / dT = k (D + E - 2 alpha D)
          const bool good = term - term == 0 && g.v[j] - g.v[j] == 0 && d_fake.v[j] - d_fake.v[j] == 0 &&
                            d_teacher.v[j] - d_teacher.v[j] == 0, used = on >> j & 1;
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

// --------------------------------------------------------------------------------------------------------- reductions

template <bool plain>
__device__ __forceinline__ Measures reduce(const Measures& own) {
  if constexpr (plain) {
    double values[] = {own.distance};
    reduce_block(values);
    return {values[0], 0, 0};
  } else {
    double values[] = {own.largest, own.distance, own.count};
    reduce_block<3, 1>(values);
    return {values[1], values[0], values[2]};
  }
}

template <bool plain>
__device__ __forceinline__ SampleSums reduce(const SampleSums& own) {
  if constexpr (plain) {
    double values[] = {own.squares};
    reduce_block(values);
    return {0, values[0], 0, 0, 0};
  } else {
    double values[] = {own.terms, own.squares, own.absolute, own.bad, own.count};
    reduce_block(values);
    return {values[0], values[1], values[2], values[3], values[4]};
  }
}

__device__ __forceinline__ void add(Measures& total, const Measures& part) {
  total.distance += part.distance;
  total.largest = Max()(total.largest, part.largest);
  total.count += part.count;
}
__device__ __forceinline__ void add(SampleSums& total, const SampleSums& part) {
  total.terms += part.terms, total.squares += part.squares, total.absolute += part.absolute;
  total.bad += part.bad, total.count += part.count;
}

// Records are arrays of doubles in memory that other blocks read.
template <class Record>
__device__ __forceinline__ Record load_record(const Record* p) {
  Record record;
  double values[sizeof(Record) / sizeof(double)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(Record) / sizeof(double); ++i) values[i] = load_fresh(reinterpret_cast<const double*>(p) + i);
  memcpy(&record, values, sizeof(record));
  return record;
}
template <class Record>
__device__ __forceinline__ void store_record(Record* p, const Record& record) {
  double values[sizeof(Record) / sizeof(double)];
  memcpy(values, &record, sizeof(record));
#pragma unroll
  for (unsigned i = 0; i < sizeof(Record) / sizeof(double); ++i) store(reinterpret_cast<double*>(p) + i, values[i]);
}

// The total over the blocks of a cluster, or over the chunks of a sample, in their order.
template <class Record>
__device__ __forceinline__ Record reduce_cluster(const Record& own, int slot) {
  constexpr int n = sizeof(Record) / sizeof(double);
  if (cluster_size() == 1) return own;
  const auto exchange = shared_memory<double>(SharedLayout::exchange, kExchanged);
  if (thread() == 0) {
    double values[n];
    memcpy(values, &own, sizeof(own));
#pragma unroll
    for (int i = 0; i < n; ++i) exchange.set(slot + i, values[i]);
  }
  sync_cluster();
  Record total{};
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    double values[n];
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = exchange.get_from(rank, slot + i);
    Record part;
    memcpy(&part, values, sizeof(part));
    add(total, part);
  }
  return total;
}

template <bool plain, class Record>
__device__ __forceinline__ Record reduce_chunks(const Record* chunks, int64_t n) {
  Record own{};
  for (int64_t i = thread(); i < n; i += threads()) add(own, load_record(chunks + i));
  return reduce<plain>(own);
}

// ------------------------------------------------------------------------------------------------------------- results

// Thread 0 of the block that has a sample's sums.
__device__ __forceinline__ void finish_sample(const LossArguments& args, int64_t b, SampleSums sums, const Scalars& scalars) {
  if (!args.score_identity) sums.terms = 0.5 * sums.squares;
  store_record(args.records + b, {sums, scalars.n});
  if (args.params.reduction == Reduction::sample) put(args.loss, b, sums.terms / scalars.count, args.wide);
  if (args.gradient_scale != nullptr) put(args.gradient_scale, b, std::ldexp(1.0, -scalars.exponent), args.wide);
}

// Least, largest, sum, number and squares of the finite ones of some numbers.
struct Range {
  double values[5] = {-infinity(), -infinity(), 0, 0, 0};  // the least one negated

  static __device__ __forceinline__ double infinity() { return bit_cast<double>(uint64_t{0x7ff0000000000000u}); }
  __device__ __forceinline__ void add(double v) {
    if (!finite(v)) return;
    values[0] = Max()(values[0], -v), values[1] = Max()(values[1], v);
    values[2] += v, values[3] += 1, values[4] += v * v;
  }
  __device__ __forceinline__ void reduce() { reduce_block<5, 2>(values); }
  __device__ __forceinline__ double or_nan(double v) const { return values[3] > 0 ? v : not_a_number(); }
  __device__ __forceinline__ double low() const { return or_nan(-values[0]); }
  __device__ __forceinline__ double high() const { return or_nan(values[1]); }
  __device__ __forceinline__ double mean() const { return values[2] / values[3]; }
};

// Every row of the weight as it was given, [B], [B, F], ...
__device__ __forceinline__ void add_weights(const LossArguments& args, const Shared<double>& computed, Range& range) {
  const bool prologue = args.weights.call.logits != nullptr, given = args.data[kWeight] != nullptr;
  int64_t rows = given ? 1 : args.batch;
  for (int d = 0; d < args.weight_dims; ++d) rows *= args.weight_size[d];
  for (int64_t row = thread(); row < rows; row += threads()) {
    if (prologue || !given) {
      range.add(prologue ? computed.get(row) : 1);
      continue;
    }
    int64_t offset = 0, rest = row;
    for (int d = args.weight_dims - 1; d >= 0; --d) {
      offset += rest % args.weight_size[d] * args.weight_stride[d];
      rest /= args.weight_size[d];
    }
    range.add(number(args.data[kWeight], args.dtype[kWeight], offset));
  }
}

// The block that comes last: the loss, the statistics, and counters back to zero.
__device__ inline void finish(const LossArguments& args, const Shared<double>& weights, const RatioStats& ratio) {
  SampleSums own{};
  double loss_sum[1] = {0};  // of the samples' own losses
  for (int64_t b = thread(); b < args.batch; b += threads()) {
    const SampleRecord record = load_record(args.records + b);
    add(own, record.sums);
    if (args.params.reduction == Reduction::sample) loss_sum[0] += record.sums.terms / divisor_of(args, record.sums.count);
  }
  const SampleSums total = reduce<false>(own);
  const bool per_sample = args.params.reduction == Reduction::sample;
  double loss = 0;
  if (!per_sample) {
    loss = total.terms / divisor_of(args, 0);
    if (thread() == 0) put(args.loss, 0, loss, args.wide);
  }
  if (args.stats != nullptr) {
    if (per_sample) {
      reduce_block(loss_sum);
      loss = args.batch > 0 ? loss_sum[0] / static_cast<double>(args.batch) : 0;
    }
    Range normalizer, weight;
    for (int64_t b = thread(); b < args.batch && args.elements > 0; b += threads()) normalizer.add(load_fresh(&args.records[b].n));
    add_weights(args, weights, weight);
    normalizer.reduce(), weight.reduce();
    if (thread() == 0) {
      const auto write = [&](Stat field, double value) { put(args.stats, field, value, args.wide); };
      write(kLoss, loss);
      write(kGradNorm, std::sqrt(total.squares));
      write(kGradMeanAbs, total.absolute / (total.count > 1 ? total.count : 1));
      write(kNormalizerMin, normalizer.low());
      write(kNormalizerMean, normalizer.mean());
      write(kNormalizerMax, normalizer.high());
      write(kWeightMin, weight.low());
      write(kWeightMean, weight.mean());
      write(kWeightMax, weight.high());
      write(kRatioMean, ratio.ratio_mean);
      write(kClippedLow, ratio.clipped_low);
      write(kClippedHigh, ratio.clipped_high);
      write(kEffectiveSampleSize, weight.values[2] * weight.values[2] / weight.values[4]);
      write(kNonfinite, total.bad);
    }
  }
  sync_block();  // the counters have been read
  if (thread() == 0) store(args.masked, 0ull);
  const int64_t counters = kCounters + (args.chunk_sums == nullptr ? 0 : args.batch * kSampleCounters);
  for (int64_t i = thread(); i < counters; i += threads())
    if (i < kMaskedLow || i > kMaskedHigh) store(args.counters + i, 0u);
}

// ------------------------------------------------------------------------------------------------------------- kernels

// What every block finds out first: the weights of the batch, where they come from logits.
struct Prologue {
  Shared<double> weights;
  RatioStats ratio;
  uint32_t kept;  // byte offset of the memory behind it

  __device__ __forceinline__ explicit Prologue(const LossArguments& args) {
    const WeightCall& call = args.weights.call;
    const bool here = call.logits != nullptr;
    const SharedLayout memory(call, here);
    kept = memory.kept;
    weights = shared_memory<double>(SharedLayout::weights, here ? call.batch : 0);
    ratio = {not_a_number(), not_a_number(), not_a_number()};
    if (here) {
      ratio = f_weights(call, weights, shared_memory<double>(memory.log_bins, call.n_bins),
                        shared_memory<int>(memory.bin_of, call.n_bins > 0 ? call.batch : 0),
                        block() == 0 ? args.weights.new_bins : nullptr);
    } else if (args.ratio != nullptr) {
      ratio = {load(&args.ratio->ratio_mean), load(&args.ratio->clipped_low), load(&args.ratio->clipped_high)};
    }
  }
  __device__ __forceinline__ double weight(const LossArguments& args, int64_t b) const {
    return args.weights.call.logits != nullptr ? weights.get(b) : 1;
  }
};

// Blocks of kMaxThreads that a multiprocessor shall run at once; more would not have the registers.
template <class A, bool plain>
constexpr int kResident = plain ? 3 : A::whole_rows ? 2 : 1;

template <class A, bool plain>
__global__ void __launch_bounds__(kMaxThreads, kResident<A, plain>) on_chip_kernel(FD_ARGUMENTS(LossArguments) args) {
  const Prologue prologue(args);
  const int64_t b = block() / cluster_size(), begin = cluster_rank() * args.chunk;
  const int64_t end = begin + args.chunk < args.elements ? begin + args.chunk : args.elements;
  const double weight = prologue.weight(args, b);
  const A access{args, b};
  const int64_t groups = (args.chunk + A::n - 1) / A::n;
  const int64_t units = groups * Kept<A>::units * (args.score_identity ? 2 : 1);
  const Kept<A> kept{shared_memory<typename A::Unit>(prologue.kept, units), groups};

  Measures measured = reduce<plain>(measure<A, plain, true>(args, access, kept, begin, end, weight));
  measured = reduce_cluster(measured, 0);
  if (args.early) wait_for_previous_kernel();
  const Scalars scalars = scalars_of(args, b, measured);
  SampleSums sums = reduce<plain>(differentiate<A, plain, true>(args, access, kept, begin, end, weight, scalars));
  sums = reduce_cluster(sums, sizeof(Measures) / sizeof(double));
  if (cluster_size() > 1) sync_cluster();  // nobody reads this block's memory any more
  if (cluster_rank() != 0) return;

  bool last = false;
  if (thread() == 0) {
    finish_sample(args, b, sums, scalars);
    fence();
    last = add_atomically(args.counters + kFinished, 1u) + 1 == args.batch;
    fence();
  }
  if (broadcast(last)) finish(args, prologue.weights, prologue.ratio);
}

// The work behind a ticket.
struct Work {
  bool measure;
  int64_t b, chunk;

  __device__ __forceinline__ Work(const LossArguments& args, unsigned ticket) {
    const auto n = static_cast<unsigned>(args.chunks), ahead = static_cast<unsigned>(args.lookahead);
    unsigned sample = ticket / n;
    chunk = ticket - sample * n;
    measure = args.measures && sample < ahead;
    b = sample;
    if (args.measures && !measure) {  // then in turn a sample to measure and one to differentiate
      sample -= ahead;
      const unsigned pairs = static_cast<unsigned>(args.batch) - ahead;
      measure = sample < 2 * pairs && sample % 2 == 0;
      b = sample >= 2 * pairs ? sample - pairs : measure ? sample / 2 + ahead : sample / 2;
    }
    if (!measure && args.backwards) chunk = n - 1 - chunk;
  }
};

template <class A, bool plain>
__global__ void __launch_bounds__(kMaxThreads, plain ? 2 : kResident<A, plain>) split_kernel(FD_ARGUMENTS(LossArguments) args) {
  const Prologue prologue(args);
  if (args.early) wait_for_previous_kernel();
  const int64_t tickets = args.batch * args.chunks * (args.measures ? 2 : 1);
  while (true) {
    const unsigned ticket = broadcast(thread() == 0 ? add_atomically(args.counters + kTicket, 1u) : 0);
    if (ticket >= tickets) break;
    const Work work(args, ticket);
    const int64_t begin = work.chunk * args.chunk;
    const int64_t end = begin + args.chunk < args.elements ? begin + args.chunk : args.elements;
    const A access{args, work.b};
    const double weight = prologue.weight(args, work.b);
    unsigned* const counters = args.counters + kCounters + work.b * kSampleCounters;
    bool last = false;
    if (work.measure) {
      const Measures measured = reduce<plain>(measure<A, plain, false>(args, access, Kept<A>{}, begin, end, weight));
      if (thread() == 0) {
        store_record(args.chunk_measures + work.b * args.chunks + work.chunk, measured);
        fence();
        last = add_atomically(counters + kMeasured, 1u) + 1 == args.chunks;
        fence();
      }
      if (!broadcast(last)) continue;
      const Measures total = reduce_chunks<plain>(args.chunk_measures + work.b * args.chunks, args.chunks);
      if (thread() == 0) {
        store_record(args.sample_measures + work.b, total);
        fence();
        add_atomically(counters + kReady, 1u);
      }
      continue;
    }
    Measures measured{};
    if (args.measures) {
      if (thread() == 0) wait_until_set(counters + kReady);
      sync_block();
      measured = load_record(args.sample_measures + work.b);
    }
    const Scalars scalars = scalars_of(args, work.b, measured);
    const SampleSums sums =
        reduce<plain>(differentiate<A, plain, false>(args, access, Kept<A>{}, begin, end, weight, scalars));
    if (thread() == 0) {
      store_record(args.chunk_sums + work.b * args.chunks + work.chunk, sums);
      fence();
      last = add_atomically(counters + kWritten, 1u) + 1 == args.chunks;
      fence();
    }
    if (!broadcast(last)) continue;
    const SampleSums total = reduce_chunks<plain>(args.chunk_sums + work.b * args.chunks, args.chunks);
    if (thread() == 0) finish_sample(args, work.b, total, scalars);
  }
  bool last = false;
  if (thread() == 0) {
    fence();
    last = add_atomically(args.counters + kFinished, 1u) + 1 == blocks();
    fence();
  }
  if (broadcast(last)) finish(args, prologue.weights, prologue.ratio);
}

template <class A>
constexpr LossKernels general_kernels() {
  return {on_chip_kernel<A, false>, split_kernel<A, false>, nullptr, nullptr};
}
template <class A>
constexpr LossKernels all_kernels() {
  return {on_chip_kernel<A, false>, split_kernel<A, false>, on_chip_kernel<A, true>, split_kernel<A, true>};
}

}  // namespace fdistill::gpu
