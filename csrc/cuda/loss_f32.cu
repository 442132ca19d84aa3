#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_f32() {
  static const LossKernels kernels = all_kernels<Dense<float>>();
  return kernels;
}

}  // namespace fdistill::gpu
