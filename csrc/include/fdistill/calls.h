// What a back end is asked for: plain records, as the bindings read them from Python.
#pragma once

#include <cstdint>

#include "layout.h"
#include "params.h"

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

  // Whether weights are rounded to float32.
  FD_HOST_DEVICE bool narrow() const { return logits_dtype != DType::f64; }
};

struct RatioStats {
  double ratio_mean, clipped_low, clipped_high;
};

// Operands of a loss whose elements are visited together, in the order of Layout's columns.
enum Operand : int {
  kX,
  kTeacher,
  kFake,
  kUncond,
  kXt,
  kMask,
  kWeight,
  kAlpha,
  kSigma,
  kDx,        // gradients: dense, in their tensor's dtype; absent where not needed
  kDTeacher,  // (score identity)
  kDFake,     // (score identity)
  kOperands
};
constexpr const char* kOperandNames[kOperands] = {  // of the arguments they come from
    "x",
    "teacher",
    "fake",
    "teacher_uncond",
    "x_t",
    "mask",
    "weight",
    "alpha",
    "sigma",
    "the gradient of x",
    "the gradient of teacher",
    "the gradient of fake"};
constexpr Operand kElementwise[] = {kX, kTeacher, kFake, kUncond, kXt, kDx, kDTeacher, kDFake};
constexpr Operand kRows[] = {kWeight, kAlpha, kSigma};

struct LossCall {
  int dims;              // of x, at least 1
  const int64_t* shape;  // [dims]
  Tensor operands[kOperands];
  Tensor guidance, normalizer;  // [B], or absent
  LossParams params;
  bool score_identity;
  bool wide;             // float64 inside and in the results; float32 otherwise
  void* loss;            // [] or [B] (Reduction::sample)
  void* gradient_scale;  // [B] where float16 gradients are to be stored scaled, else null; see cpu/loss.cpp
  void* stats;           // [kStats], or null

  Layout<kOperands> layout() const {
    constexpr int leaders[] = {kDx, kX, kTeacher, kFake};
    return {dims, shape, operands, leaders, 4};
  }
};

}  // namespace fdistill
