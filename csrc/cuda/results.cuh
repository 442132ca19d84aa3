// What becomes of the sums of threads: sums of blocks, clusters, chunks and samples, the loss and the statistics.
#pragma once

#include "steps.cuh"

namespace fdistill::gpu {

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
  for (unsigned i = 0; i < sizeof(Record) / sizeof(double); ++i)
    values[i] = load_fresh(reinterpret_cast<const double*>(p) + i);
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
#pragma unroll 1
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
#pragma unroll 1
  for (int64_t i = thread(); i < n; i += threads()) add(own, load_record(chunks + i));
  return reduce<plain>(own);
}

// ------------------------------------------------------------------------------------------------------------- results

// Thread 0 of the block that has a sample's sums.
__device__ __forceinline__ void finish_sample(const LossArguments& args, int64_t b, SampleSums sums,
                                              const Scalars& scalars) {
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

// Every row of the weight as it was given, [B], [B, F], ..., or as it was computed.
__device__ __forceinline__ void add_weights(const LossArguments& args, const Shared<double>& computed, Range& range) {
  const bool prologue = args.weights.call.logits != nullptr, given = args.data[kWeight] != nullptr;
  int64_t rows = given ? 1 : args.batch;
  for (int d = 0; d < args.weight_dims; ++d) rows *= args.weight_size[d];
#pragma unroll 1
  for (int64_t row = thread(); row < rows; row += threads()) {
    if (prologue || !given) {
      range.add(!prologue ? 1 : args.weighed != nullptr ? load_fresh(args.weighed + row) : computed.get(row));
      continue;
    }
    int64_t offset = 0, rest = row;
#pragma unroll 1
    for (int d = args.weight_dims - 1; d >= 0; --d) {
      offset += rest % args.weight_size[d] * args.weight_stride[d];
      rest /= args.weight_size[d];
    }
    range.add(number(args.data[kWeight], args.dtype[kWeight], offset));
  }
}

// The block that comes last: the loss, the statistics, and counters back to zero.
__device__ inline void finish(const LossArguments& args, const Shared<double>& weights) {
  SampleSums own{};
  double loss_sum[1] = {0};  // of the samples' own losses
#pragma unroll 1
  for (int64_t b = thread(); b < args.batch; b += threads()) {
    const SampleRecord record = load_record(args.records + b);
    add(own, record.sums);
    if (args.params.reduction == Reduction::sample)
      loss_sum[0] += record.sums.terms / divisor_of(args, record.sums.count);
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
#pragma unroll 1
    for (int64_t b = thread(); b < args.batch; b += threads()) normalizer.add(load_fresh(&args.records[b].n));
    add_weights(args, weights, weight);
    normalizer.reduce(), weight.reduce();
    if (thread() == 0) {
      RatioStats ratio{not_a_number(), not_a_number(), not_a_number()};
      if (args.ratio != nullptr) ratio = load_record(args.ratio);
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
#pragma unroll 1
  for (int64_t i = thread(); i < counters; i += threads())
    if (i < kMaskedLow || i > kMaskedHigh) store(args.counters + i, 0u);
}

}  // namespace fdistill::gpu
