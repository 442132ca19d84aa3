// Network predictions as x0 = a x_t + c prediction, for x_t = alpha x0 + sigma eps. As fdistill_ops/predictions.py.
#pragma once

#include "params.h"
#include "platform.h"

namespace fdistill {

struct X0Coefficients {
  double a, c;
};

FD_HOST_DEVICE X0Coefficients x0_coefficients(Prediction prediction, double alpha, double sigma) {
  switch (prediction) {
    case Prediction::x0: return {0, 1};
    case Prediction::eps: return {1 / alpha, -sigma / alpha};  // (x_t - sigma eps) / alpha
    case Prediction::v: {                                      // (alpha x_t - sigma v) / (alpha^2 + sigma^2)
      const double power = alpha * alpha + sigma * sigma;
      return {alpha / power, -sigma / power};
    }
    case Prediction::flow: return {1 / (alpha + sigma), -sigma / (alpha + sigma)};  // (x_t - sigma u) / (alpha + sigma)
    case Prediction::score: return {1 / alpha, sigma * sigma / alpha};              // (x_t + sigma^2 score) / alpha
  }
  return {0, 0};
}

}  // namespace fdistill
