#pragma once

#include "fdistill/calls.h"

namespace fdistill {

// weights: [batch] float64, before the rounding to the result's dtype; new_bins: [n_bins].
RatioStats f_weights(const WeightCall& call, double* weights, float* new_bins);

}  // namespace fdistill
