// f-distill weights h(r) = f''(r) r^2 from the log-ratio l = log r (arXiv 2502.15681, table 1), so that nothing
// overflows where h itself does not. The order is that of fdistill_ops/divergences.py.
#pragma once

#include <cmath>

#include "platform.h"

namespace fdistill {

enum class Divergence : int {
  reverse_kl = 0,
  forward_kl = 1,
  jensen_shannon = 2,
  softened_reverse_kl = 3,
  squared_hellinger = 4,
  jeffreys = 5,
  neyman_chi2 = 6,
  pearson_chi2 = 7,
  alpha = 8,
};

// What h takes the exponential of. All divergences share one, so that the kernels hold its code once.
template <class T>
FD_HOST_DEVICE T exponent_of_h(Divergence kind, T l, T a) {
  switch (kind) {
    case Divergence::jensen_shannon:
    case Divergence::softened_reverse_kl: return l < 0 ? l : -l;
    case Divergence::squared_hellinger: return l / 2;
    case Divergence::neyman_chi2: return -l;
    case Divergence::pearson_chi2: return 2 * l;
    case Divergence::alpha: return a * l;
    default: return l;
  }
}

template <class T>
FD_HOST_DEVICE T h_from_log_ratio(Divergence kind, T l, T a) {
  if (kind == Divergence::reverse_kl) return T(1);
  const T e = std::exp(exponent_of_h(kind, l, a));
  switch (kind) {
    case Divergence::jensen_shannon: return (l < 0 ? e : T(1)) / (T(1) + e);       // r / (r+1)
    case Divergence::softened_reverse_kl: return (l > 0 ? e : T(1)) / (T(1) + e);  // 1 / (r+1)
    case Divergence::squared_hellinger: return e / 4;                              // sqrt(r) / 4
    case Divergence::jeffreys: return e + 1;                                       // r + 1
    case Divergence::neyman_chi2:                                                  // 2 / r
    case Divergence::pearson_chi2: return 2 * e;                                   // 2 r^2
    default: return e;                                                             // r, r^a
  }
}

// Time bin of t among n equal bins over [min_t, max_t]; times outside count in the first or last one.
FD_HOST_DEVICE int time_bin(double t, double min_t, double max_t, int n) {
  const double position = std::floor((t - min_t) / ((max_t - min_t) / n));
  if (!(position > 0)) return 0;
  return position >= n ? n - 1 : static_cast<int>(position);
}

// exp(l), held below the largest float32 so that sums of ratios stay finite.
FD_HOST_DEVICE double bounded_ratio(double l) { return std::exp(l < 88.0 ? l : 88.0); }

}  // namespace fdistill
