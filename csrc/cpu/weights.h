#pragma once

#include <cstdint>

#include "fdistill/dtype.h"
#include "fdistill/params.h"

namespace fdistill {

// f-weights of a batch and the histogram after it. Strides are in elements.
struct WeightCall {
  int64_t batch, heads;
  const void* logits;  // [batch, heads]
  DType logits_dtype;
  int64_t logits_stride, heads_stride;
  const void* t;  // [batch], or null
  DType t_dtype;
  int64_t t_stride;
  const float* bins;  // [n_bins], or null
  int n_bins;
  WeightParams params;
};

struct RatioStats {
  double ratio_mean, clipped_low, clipped_high;
};

// weights: [batch] float64, before the rounding to the result's dtype; new_bins: [n_bins].
RatioStats f_weights(const WeightCall& call, double* weights, float* new_bins);

// Element i of a strided array of any dtype, as float64.
double element(const void* data, DType dtype, int64_t index);

}  // namespace fdistill
