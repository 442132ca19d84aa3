// The plain records of a call. Field for field those of fdistill_ops/params.py.
#pragma once

#include <cstdint>

namespace fdistill {

enum class Prediction : int { x0 = 0, eps = 1, v = 2, flow = 3, score = 4 };
enum class Normalizer : int { none = 0, mean_abs = 1, given = 2 };
enum class Reduction : int { mean = 0, sum = 1, sample = 2 };

struct WeightParams {
  int kind;             // Divergence
  double a;             // parameter of the alpha family
  double low, high;     // bounds on the log-ratio
  double min_t, max_t;  // range of the histogram
  double ema_rate;
  bool normalize;
  double eps;
  bool zero_nonfinite;
};

struct LossParams {
  double guidance_scale;  // where no per-sample scale is given
  Prediction prediction;
  Normalizer normalizer;
  double eps;
  bool zero_nonfinite;
  Reduction reduction;
  double identity_alpha;  // of the score-identity loss
  bool need_stats;
};

// The statistics vector, in the order of fdistill_ops/stats.py.
enum Stat : int {
  kLoss,
  kGradNorm,
  kGradMeanAbs,
  kNormalizerMin,
  kNormalizerMean,
  kNormalizerMax,
  kWeightMin,
  kWeightMean,
  kWeightMax,
  kRatioMean,
  kClippedLow,
  kClippedHigh,
  kEffectiveSampleSize,
  kNonfinite,
  kStats
};

}  // namespace fdistill
