// f-weights of a batch by one block (arXiv 2502.15681, section 3), as csrc/cpu/weights.cpp: float64 throughout.
#pragma once

#include "block.h"
#include "fdistill/divergence.h"

namespace fdistill::gpu {

// Numbers of a batch where every thread of the block sees them: in shared memory, or in global memory of this block
// alone.
template <class T>
struct BlockArray {
  T* data;
  __device__ __forceinline__ T get(int64_t i) const { return load(data + i); }
  __device__ __forceinline__ void set(int64_t i, T value) const { store(data + i, value); }
};

// The mean over the heads, rounded to float32 unless the logits are float64.
__device__ __forceinline__ double mean_logit(const WeightCall& call, int64_t b) {
  double sum = 0;
#pragma unroll 1
  for (int64_t k = 0; k < call.heads; ++k)
    sum += number(call.logits, call.logits_dtype, b * call.logits_stride + k * call.heads_stride);
  const double mean = sum / static_cast<double>(call.heads);
  return call.narrow() ? static_cast<double>(static_cast<float>(mean)) : mean;
}

// weights: [batch], in the end w as f_weights returns it, in float64. log_bins: [n_bins], ratios: [batch], bin_of:
// [batch], all three with a histogram alone. The new histogram is written where new_bins is not null. Ends with a
// barrier.
template <class Doubles, class Indices>
__device__ RatioStats f_weights(const WeightCall& call, const Doubles& weights, const Doubles& log_bins,
                                const Doubles& ratios, const Indices& bin_of, float* new_bins) {
  const WeightParams& p = call.params;
  const auto kind = static_cast<Divergence>(p.kind);

  // l = clamp(mean logit, low, high); a sample without a finite l stays NaN and out of every sum
  double sums[4] = {};  // of the ratio, below, above, finite
#pragma unroll 1
  for (int64_t b = thread(); b < call.batch; b += threads()) {
    double l = mean_logit(call, b);
    const double t = call.t == nullptr ? 0 : number(call.t, call.t_dtype, b * call.t_stride);
    if (!finite(l) || t != t) {
      weights.set(b, not_a_number());
      if (call.bins != nullptr) bin_of.set(b, -1);
      continue;
    }
    if (call.bins != nullptr) bin_of.set(b, time_bin(t, p.min_t, p.max_t, call.n_bins));
    sums[1] += l<p.low, sums[2] += l> p.high;
    l = l < p.low ? p.low : l > p.high ? p.high : l;
    weights.set(b, l);
    const double ratio = bounded_ratio(l);
    if (call.bins != nullptr) ratios.set(b, ratio);
    sums[0] += ratio;
    sums[3] += 1;
  }
  reduce_block(sums);
  const RatioStats stats{sums[0] / sums[3], sums[1] / sums[3], sums[2] / sums[3]};

  // bins[i] <- ema bins[i] + (1 - ema) mean_i where count_i > 0;  r <- r / (bins[i_b] + eps). A warp to a bin.
  if (call.bins != nullptr) {
    sync_block();
#pragma unroll 1
    for (unsigned i = thread() / kWarp; i < static_cast<unsigned>(call.n_bins); i += threads() / kWarp) {
      double count = 0, sum = 0;
#pragma unroll 1
      for (int64_t b = thread() % kWarp; b < call.batch; b += kWarp) {
        if (bin_of.get(b) != static_cast<int>(i)) continue;
        count += 1;
        sum += ratios.get(b);
      }
      count = reduce_warp(count, Add()), sum = reduce_warp(sum, Add());
      if (thread() % kWarp != 0) continue;
      double bin = load(call.bins + i);
      if (!finite(bin) || bin < 0) bin = 1;  // never filled
      if (count > 0) bin = p.ema_rate * bin + (1 - p.ema_rate) * (sum / count);
      if (new_bins != nullptr) store(new_bins + i, static_cast<float>(bin));
      log_bins.set(i, std::log(bin + p.eps));
    }
    sync_block();
#pragma unroll 1
    for (int64_t b = thread(); b < call.batch; b += threads()) {
      const double l = weights.get(b);
      if (l == l) weights.set(b, l - log_bins.get(bin_of.get(b)));
    }
  }

  // w = h(r);  w <- w / (mean w + eps)
  double total[2] = {};  // of the finite weights, and how many
#pragma unroll 1
  for (int64_t b = thread(); b < call.batch; b += threads()) {
    const double l = weights.get(b);
    if (l != l) continue;
    const double w = h_from_log_ratio(kind, l, p.a);
    weights.set(b, w);
    if (!finite(w)) continue;
    total[0] += w;
    total[1] += 1;
  }
  reduce_block(total);
  const double divisor = (total[1] > 0 ? total[0] / total[1] : 0) + p.eps;
#pragma unroll 1
  for (int64_t b = thread(); b < call.batch; b += threads()) {
    double w = weights.get(b);
    if (p.normalize) w /= divisor;
    if (p.zero_nonfinite && !finite(w)) w = 0;
    weights.set(b, call.narrow() ? static_cast<double>(static_cast<float>(w)) : w);
  }
  sync_block();
  return stats;
}

}  // namespace fdistill::gpu
