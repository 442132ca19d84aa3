// The scalars of a batch: B log-ratios, a histogram of a few bins. Float64 throughout, one thread: none of it is large.
#include "weights.h"

#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "fdistill/divergence.h"

namespace fdistill {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The mean over the heads, rounded to float32 unless the logits are float64.
double mean_logit(const WeightCall& call, int64_t b) {
  double sum = 0;
  for (int64_t k = 0; k < call.heads; ++k)
    sum += element(call.logits, call.logits_dtype, b * call.logits_stride + k * call.heads_stride);
  const double mean = sum / static_cast<double>(call.heads);
  return call.logits_dtype == DType::f64 ? mean : static_cast<double>(static_cast<float>(mean));
}

}  // namespace

RatioStats f_weights(const WeightCall& call, double* weights, float* new_bins) {
  const WeightParams& p = call.params;
  const auto kind = static_cast<Divergence>(p.kind);

  // l = clamp(mean logit, low, high); a sample without a finite l stays NaN and out of every sum
  std::vector<double> ratio(call.batch);
  double ratio_sum = 0, below = 0, above = 0, finite = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    double l = mean_logit(call, b);
    if (!std::isfinite(l) || (call.t != nullptr && std::isnan(element(call.t, call.t_dtype, b * call.t_stride)))) {
      weights[b] = kNaN;
      continue;
    }
    below += l < p.low;
    above += l > p.high;
    l = l < p.low ? p.low : l > p.high ? p.high : l;
    weights[b] = l;
    ratio[b] = bounded_ratio(l);
    ratio_sum += ratio[b];
    finite += 1;
  }
  const RatioStats stats{ratio_sum / finite, below / finite, above / finite};

  // bins[i] <- ema bins[i] + (1 - ema) mean_i where count_i > 0;  r <- r / (bins[i_b] + eps)
  if (call.bins != nullptr) {
    std::vector<double> count(call.n_bins), sum(call.n_bins), log_bin(call.n_bins);
    std::vector<int> bin_of(call.batch);
    for (int64_t b = 0; b < call.batch; ++b) {
      if (std::isnan(weights[b])) continue;
      const int i = time_bin(element(call.t, call.t_dtype, b * call.t_stride), p.min_t, p.max_t, call.n_bins);
      bin_of[b] = i;
      count[i] += 1;
      sum[i] += ratio[b];
    }
    for (int i = 0; i < call.n_bins; ++i) {
      double bin = std::isfinite(call.bins[i]) && call.bins[i] >= 0 ? call.bins[i] : 1.0;  // never filled
      if (count[i] > 0) bin = p.ema_rate * bin + (1 - p.ema_rate) * (sum[i] / count[i]);
      new_bins[i] = static_cast<float>(bin);
      log_bin[i] = std::log(bin + p.eps);
    }
    for (int64_t b = 0; b < call.batch; ++b)
      if (!std::isnan(weights[b])) weights[b] -= log_bin[bin_of[b]];
  }

  // w = h(r);  w <- w / (mean w + eps)
  double total = 0, counted = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    if (std::isnan(weights[b])) continue;
    weights[b] = h_from_log_ratio(kind, weights[b], p.a);
    if (!std::isfinite(weights[b])) continue;
    total += weights[b];
    counted += 1;
  }
  const double divisor = p.normalize ? (counted > 0 ? total / counted : 0) + p.eps : 1;
  for (int64_t b = 0; b < call.batch; ++b) {
    if (p.normalize) weights[b] /= divisor;
    if (p.zero_nonfinite && !std::isfinite(weights[b])) weights[b] = 0;
  }
  return stats;
}

}  // namespace fdistill
