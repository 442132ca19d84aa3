// What backward has left to do where the incoming gradients differ from sample to sample.
#pragma once

#include <cstdint>

#include "fdistill/dtype.h"
#include "kernels.h"

namespace fdistill {

// to[b, i] = from[b, i] factor[b], a float32 product rounded once. [batch, elements], dense, bfloat16 or float16; `to` may be
// `from`.
void scale_rows(const void* from, void* to, DType dtype, int64_t batch, int64_t elements, const float* factor,
                int threads, const Kernels& kernels);

}  // namespace fdistill
