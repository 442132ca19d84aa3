#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_bf16() {
  static const LossKernels kernels = all_kernels<Dense<bfloat16>>();
  return kernels;
}

}  // namespace fdistill::gpu
