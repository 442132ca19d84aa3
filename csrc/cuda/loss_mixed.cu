#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_mixed() {
  static const LossKernels kernels = all_kernels<Mixed>();
  return kernels;
}

}  // namespace fdistill::gpu
