#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_f64() {
  static const LossKernels kernels = general_kernels<Dense<double>>();
  return kernels;
}

}  // namespace fdistill::gpu
