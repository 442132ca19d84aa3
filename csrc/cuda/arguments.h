// What the kernels are given, by value.
#pragma once

#include "fdistill/calls.h"
#include "launch.h"

namespace fdistill::gpu {

constexpr int kDims = 8;  // dimensions of a sample that do not merge

// [batch] numbers of a floating dtype, or absent.
struct Vector {
  const void* data;
  DType dtype;
  int64_t stride;
};

struct WeightArguments {
  WeightCall call;    // call.logits: null where the weights do not come from logits
  float* new_bins;    // [n_bins], or null
  double* log_ratio;  // [2 batch + n_bins + batch / 2], of a launch of its own; a loss keeps them in shared memory
  void* weights;      // [batch] as the caller wants them, or null
  RatioStats* ratio;
};

// The sums over a sample that the loss and the statistics are made of.
struct SampleSums {
  double terms;     // of the loss: g^2 / 2, or the score-identity terms
  double squares;   // of g
  double absolute;  // of g
  double bad;       // elements of g on the mask that are not finite
  double count;     // elements on the mask
};

// What a sample's scalars depend on.
struct Measures {
  double distance;  // sum |x - T|
  double largest;   // max |k g| with n_b + eps = 1, where float16 gradients are scaled by it
  double count;     // elements on the mask
};

struct SampleRecord {
  SampleSums sums;
  double n;
};

struct LossArguments {
  int64_t batch, elements;
  int dims;
  int64_t size[kDims], stride[kOperands][kDims], batch_stride[kOperands];
  void* data[kOperands];
  DType dtype[kOperands];
  bool aligned;     // the elementwise operands can be read 16 bytes at a time
  bool rows;        // weight, alpha or sigma vary within a sample
  int64_t row_run;  // elements in a row for which they do not; whole groups of the dense kernels
  bool dense_mask;  // the mask lies as the elementwise operands do
  Vector guidance, normalizer;
  LossParams params;
  bool score_identity, wide;
  void *loss, *gradient_scale, *stats;
  WeightArguments weights;
  RatioStats* ratio;  // of the logits, in memory of the stream; null without logits
  double* weighed;    // [batch] weights, which the first block computes for all; null where each does for itself
  // The weight as it was given, for the statistics over its rows.
  int weight_dims;
  int64_t weight_size[kDims + 1], weight_stride[kDims + 1];
  // The order of the work: a sample is cut in chunks, one for each block of a cluster, or for each piece of a split.
  int64_t chunk, chunks;
  int64_t announced;  // on chip: elements of a chunk that are on their way while the weights are computed
  bool measures;      // split: whether there is anything to measure
  int64_t lookahead;  // samples measured before the first one's gradient is written
  bool backwards;     // gradients from the last chunk to the first: what was read last is still in the caches
  bool early;         // started before an earlier launch has ended
  // Memory of the stream. Counters are zero before and after a launch.
  unsigned* counters;          // [kCounters], then for each sample [kSampleCounters]
  unsigned long long* masked;  // elements on the mask of the whole batch, counted by an earlier launch
  Measures *chunk_measures, *sample_measures;
  SampleSums* chunk_sums;
  SampleRecord* records;
};
enum Counter : int { kTicket, kFinished, kMaskedLow, kMaskedHigh, kWeigher, kWeighed, kCounters };
enum SampleCounter : int { kMeasured, kReady, kWritten, kSampleCounters };

struct CountArguments {  // elements of a mask, each counted `times`
  const uint8_t* mask;
  int64_t elements, times;
  int dims;
  int64_t size[kDims + 1], stride[kDims + 1];
  unsigned long long* total;
};

struct ScaleArguments {  // out = in * upstream[b] * scale[b]
  const void* in;
  void* out;
  DType dtype;
  int64_t batch, elements;  // of a sample
  Vector upstream, scale;   // scale may be absent
};

Kernel<WeightArguments> weights_kernel();
Kernel<CountArguments> mask_kernel();
Kernel<ScaleArguments> gradient_kernel();

constexpr unsigned kMaxThreads = 256;
constexpr int64_t kScaleChunk = 16384;  // elements of a gradient that a block scales at a time
// Weights that a block of a loss computes: up to here each for itself, from there on the first one for all; beyond, a
// launch of its own.
constexpr int kAloneSamples = 64;
constexpr int64_t kAloneLogits = 512;
constexpr int kPrologueSamples = 1024;
constexpr int64_t kPrologueLogits = 8192;
constexpr int kPrologueBins = 256;

// The kernels, one table for each dtype of the elements, one for mixtures of 32 and 16 bits. f32 and f64 of `strided`: the
// type computed in.
struct LossKernels {
  Kernel<LossArguments> on_chip, split;  // any call
  Kernel<LossArguments> plain_on_chip,
      plain_split;  // x0-predictions, a weight for each sample, nothing else; may be null
};
const LossKernels& loss_kernels_f32();
const LossKernels& loss_kernels_f64();
const LossKernels& loss_kernels_bf16();
const LossKernels& loss_kernels_f16();
const LossKernels& loss_kernels_mixed();
const LossKernels& loss_kernels_strided_f32();
const LossKernels& loss_kernels_strided_f64();

}  // namespace fdistill::gpu
