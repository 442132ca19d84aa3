// The losses on the CPU.
#pragma once

#include "fdistill/calls.h"
#include "kernels.h"

namespace fdistill {

// ratio: of the logits that the weights come from, or null.
void loss(const LossCall& call, const RatioStats* ratio, int threads, const Kernels& kernels);

}  // namespace fdistill
