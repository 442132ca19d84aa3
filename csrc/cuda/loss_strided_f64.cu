#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_strided_f64() {
  static const LossKernels kernels = general_kernels<Strided<double>>();
  return kernels;
}

}  // namespace fdistill::gpu
