// The losses on the CPU.
#pragma once

#include "fdistill/params.h"
#include "kernels.h"
#include "layout.h"
#include "weights.h"

namespace fdistill {

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

struct LossCall {
  int dims;              // of x, at least 1
  const int64_t* shape;  // [dims]
  Tensor operands[kOperands];
  Tensor guidance, normalizer;  // [B], or absent
  LossParams params;
  bool score_identity;
  bool wide;             // float64 inside and in the results; float32 otherwise
  void* loss;            // [] or [B] (Reduction::sample)
  void* gradient_scale;  // [B] where float16 gradients are to be stored scaled, else null; see loss.cpp
  void* stats;           // [kStats], or null
  const RatioStats* ratio;  // where the weights come from logits
  int threads;
  const Kernels* kernels;
};

void loss(const LossCall& call);

}  // namespace fdistill
