// Where a block of the loss kernels keeps what in its shared memory; the host sizes it, the kernels use it.
#pragma once

#include "arguments.h"

namespace fdistill::gpu {

constexpr int kWarp = 32, kMaxWarps = kMaxThreads / kWarp, kMaxReduced = 5;
constexpr uint32_t kReductionBytes = kMaxWarps * kMaxReduced * sizeof(double);
constexpr int kExchanged = 3 + 5;  // Measures and SampleSums, of which a cluster's blocks read each other's

// Byte offsets: partial sums of reduce_block, what a cluster exchanges, a broadcast word, the prologue's arrays, what
// is kept; before that the ratios of the prologue lie there.
struct SharedLayout {
  static constexpr uint32_t exchange = kReductionBytes, word = exchange + kExchanged * sizeof(double),
                            weights = word + 16;
  uint32_t log_bins, bin_of, kept, ratio_bytes;

  FD_HOST_DEVICE SharedLayout(const WeightCall& call, bool prologue) {
    const auto batch = static_cast<uint32_t>(prologue ? call.batch : 0),
               bins = static_cast<uint32_t>(prologue ? call.n_bins : 0);
    log_bins = weights + batch * static_cast<uint32_t>(sizeof(double));
    bin_of = log_bins + bins * static_cast<uint32_t>(sizeof(double));
    kept = (bin_of + (bins > 0 ? batch : 0) * static_cast<uint32_t>(sizeof(int)) + 15) / 16 * 16;
    ratio_bytes = (bins > 0 ? batch : 0) * static_cast<uint32_t>(sizeof(double));
  }
};

}  // namespace fdistill::gpu
