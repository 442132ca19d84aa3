#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_f16() {
  static const LossKernels kernels = general_kernels<Dense<float16>>();
  return kernels;
}

}  // namespace fdistill::gpu
