#include "loss.cuh"

namespace fdistill::gpu {

const LossKernels& loss_kernels_strided_f32() {
  static const LossKernels kernels = general_kernels<Strided<float>>();
  return kernels;
}

}  // namespace fdistill::gpu
