// What the bindings call. Every function launches on a stream of the current device and returns at once.
#pragma once

#include "arguments.h"

namespace fdistill::gpu {

// Memory of one stream, kept from call to call. counters: zero when allocated, and left at zero.
struct Memory {
  unsigned* counters;
  int64_t counter_count;
  unsigned char* scratch;
  int64_t scratch_bytes;
};

// How much of it a call needs.
struct Needs {
  int64_t counters, bytes;
  bool met_by(const Memory& memory) const { return counters <= memory.counter_count && bytes <= memory.scratch_bytes; }
};

// These do nothing where the memory does not do: launch again with what they need.
// logits: the arguments of f_weights, or null where call has a weight or there is none.
Needs loss(const LossCall& call, const WeightArguments* logits, const Memory& memory, void* stream);
// arguments.weights [batch] and arguments.ratio are written; log_ratio is ignored.
Needs f_weights(const WeightArguments& arguments, const Memory& memory, void* stream);

void scale_gradient(const ScaleArguments& arguments, void* stream);

}  // namespace fdistill::gpu
