// The kernels of the losses; each takes a sample through two steps.
//
//   measure:        n_b = mean |x - T|                        reads x, teacher (uncond, x_t)
//   differentiate:  g = w c / (n_b + eps) (fake - T)          writes the gradient, sums the loss
//
// on_chip: a block, or a cluster of blocks, to a sample. measure reads fake as well and keeps fake - T in shared
// memory, so that every operand is read once. The blocks of a cluster read each other's sums.
//
// split: samples that are too large for that, in chunks. Blocks draw tickets; a ticket is a chunk to measure or one to
// differentiate, which waits until its sample has been measured. It waits for lower tickets alone, whose blocks run, so
// there is always one that goes on. Where nothing has to be measured there are gradients only, and nobody waits.
//
// Sums are taken in an order that depends on the sample's size and its operands alone: partial sums of a chunk are put
// together by whichever block comes last, in the order of the chunks. float16 gradients are stored times a power of
// two: see csrc/cpu/loss.cpp.
#pragma once

#include "results.cuh"
#include "weights.cuh"

namespace fdistill::gpu {

// The weights of the batch, where they come from logits. Of a few samples every block computes them for itself. Of more
// the first block to start does, for all of them: the others wait for a block that runs, and does not wait itself.
struct Prologue {
  Shared<double> weights;
  uint32_t kept;  // byte offset of the memory behind them

  __device__ __forceinline__ explicit Prologue(const LossArguments& args) {
    const WeightCall& call = args.weights.call;
    const bool here = call.logits != nullptr, for_all = args.weighed != nullptr;
    const SharedLayout memory(call, here);
    const int64_t binned = call.n_bins > 0 ? call.batch : 0;
    kept = memory.kept;
    weights = shared_memory<double>(SharedLayout::weights, here ? call.batch : 0);
    bool first = block() == 0;
    if (for_all) first = broadcast(thread() == 0 ? add_atomically(args.counters + kWeigher, 1u) == 0 : 0);
    if (!here || (for_all && !first)) return;
    const RatioStats ratio = f_weights(call, weights, shared_memory<double>(memory.log_bins, call.n_bins),
                                       shared_memory<double>(kept, binned), shared_memory<int>(memory.bin_of, binned),
                                       first ? args.weights.new_bins : nullptr);
    if (first && thread() == 0) store_record(args.ratio, ratio);
    if (!for_all) return;
#pragma unroll 1
    for (int64_t b = thread(); b < call.batch; b += threads()) store(args.weighed + b, weights.get(b));
    sync_block();
    if (thread() == 0) {
      fence();
      add_atomically(args.counters + kWeighed, 1u);
    }
  }

  __device__ __forceinline__ double weight(const LossArguments& args, int64_t b) const {
    if (args.weighed == nullptr) return args.weights.call.logits != nullptr ? weights.get(b) : 1;
    return load_fresh(args.weighed + b);
  }
  // Until there are weights.
  __device__ __forceinline__ void wait(const LossArguments& args) const {
    if (args.weighed == nullptr) return;
    if (thread() == 0) wait_until_set(args.counters + kWeighed);
    sync_block();
  }
};

// Blocks of kMaxThreads that a multiprocessor shall run at once; more would not have the registers.
template <class A, bool plain>
constexpr int kResident = plain           ? 3
                          : A::whole_rows ? 2
                                          : 1;

template <class A, bool plain>
__global__ void __launch_bounds__(kMaxThreads, kResident<A, plain>) on_chip_kernel(FD_ARGUMENTS(LossArguments) args) {
  const int64_t b = block() / cluster_size(), begin = cluster_rank() * args.chunk;
  const int64_t end = begin + args.chunk < args.elements ? begin + args.chunk : args.elements;
  const A access{args, b};
  if (args.announced > 0) access.announce(begin, begin + args.announced < end ? begin + args.announced : end);
  const Prologue prologue(args);
  const bool measures_first = args.weighed != nullptr && args.gradient_scale == nullptr;  // which needs no weight
  if (!measures_first) prologue.wait(args);
  double weight = measures_first ? 1 : prologue.weight(args, b);
  const int64_t groups = (args.chunk + A::n - 1) / A::n;
  const int64_t units = groups * Kept<A>::units * (args.score_identity ? 2 : 1);
  const Kept<A> kept{shared_memory<typename A::Unit>(prologue.kept, units), groups};

  Measures measured = reduce<plain>(measure<A, plain, true>(args, access, kept, begin, end, weight));
  measured = reduce_cluster(measured, 0);
  if (measures_first) {
    prologue.wait(args);
    weight = prologue.weight(args, b);
  }
  if (args.early) wait_for_previous_kernel();
  const Scalars scalars = scalars_of(args, b, measured);
  SampleSums sums = reduce<plain>(differentiate<A, plain, true>(args, access, kept, begin, end, weight, scalars));
  sums = reduce_cluster(sums, sizeof(Measures) / sizeof(double));
  if (cluster_size() > 1) sync_cluster();  // nobody reads this block's memory any more
  if (cluster_rank() != 0) return;

  bool last = false;
  if (thread() == 0) {
    finish_sample(args, b, sums, scalars);
    fence();
    last = add_atomically(args.counters + kFinished, 1u) + 1 == args.batch;
    fence();
  }
  if (broadcast(last)) finish(args, prologue.weights);
}

// The work behind a ticket.
struct Work {
  bool measure;
  int64_t b, chunk;

  __device__ __forceinline__ Work(const LossArguments& args, unsigned ticket) {
    const auto n = static_cast<unsigned>(args.chunks), ahead = static_cast<unsigned>(args.lookahead);
    unsigned sample = ticket / n;
    chunk = ticket - sample * n;
    measure = args.measures && sample < ahead;
    b = sample;
    if (args.measures && !measure) {  // then in turn a sample to measure and one to differentiate
      sample -= ahead;
      const unsigned pairs = static_cast<unsigned>(args.batch) - ahead;
      measure = sample < 2 * pairs && sample % 2 == 0;
      b = sample >= 2 * pairs ? sample - pairs : measure ? sample / 2 + ahead : sample / 2;
    }
    if (!measure && args.backwards) chunk = n - 1 - chunk;
  }
};

template <class A, bool plain>
__global__ void __launch_bounds__(kMaxThreads, plain ? 2 : kResident<A, plain>)
    split_kernel(FD_ARGUMENTS(LossArguments) args) {
  const Prologue prologue(args);
  prologue.wait(args);
  if (args.early) wait_for_previous_kernel();
  const int64_t tickets = args.batch * args.chunks * (args.measures ? 2 : 1);
  while (true) {
    const unsigned ticket = broadcast(thread() == 0 ? add_atomically(args.counters + kTicket, 1u) : 0);
    if (ticket >= tickets) break;
    const Work work(args, ticket);
    const int64_t begin = work.chunk * args.chunk;
    const int64_t end = begin + args.chunk < args.elements ? begin + args.chunk : args.elements;
    const A access{args, work.b};
    const double weight = prologue.weight(args, work.b);
    unsigned* const counters = args.counters + kCounters + work.b * kSampleCounters;
    bool last = false;
    if (work.measure) {
      const Measures measured = reduce<plain>(measure<A, plain, false>(args, access, Kept<A>{}, begin, end, weight));
      if (thread() == 0) {
        store_record(args.chunk_measures + work.b * args.chunks + work.chunk, measured);
        fence();
        last = add_atomically(counters + kMeasured, 1u) + 1 == args.chunks;
        fence();
      }
      if (!broadcast(last)) continue;
      const Measures total = reduce_chunks<plain>(args.chunk_measures + work.b * args.chunks, args.chunks);
      if (thread() == 0) {
        store_record(args.sample_measures + work.b, total);
        fence();
        add_atomically(counters + kReady, 1u);
      }
      continue;
    }
    Measures measured{};
    if (args.measures) {
      if (thread() == 0) wait_until_set(counters + kReady);
      sync_block();
      measured = load_record(args.sample_measures + work.b);
    }
    const Scalars scalars = scalars_of(args, work.b, measured);
    const SampleSums sums =
        reduce<plain>(differentiate<A, plain, false>(args, access, Kept<A>{}, begin, end, weight, scalars));
    if (thread() == 0) {
      store_record(args.chunk_sums + work.b * args.chunks + work.chunk, sums);
      fence();
      last = add_atomically(counters + kWritten, 1u) + 1 == args.chunks;
      fence();
    }
    if (!broadcast(last)) continue;
    const SampleSums total = reduce_chunks<plain>(args.chunk_sums + work.b * args.chunks, args.chunks);
    if (thread() == 0) finish_sample(args, work.b, total, scalars);
  }
  bool last = false;
  if (thread() == 0) {
    fence();
    last = add_atomically(args.counters + kFinished, 1u) + 1 == blocks();
    fence();
  }
  if (broadcast(last)) finish(args, prologue.weights);
}

template <class A>
constexpr LossKernels general_kernels() {
  return {on_chip_kernel<A, false>, split_kernel<A, false>, nullptr, nullptr};
}
template <class A>
constexpr LossKernels all_kernels() {
  return {on_chip_kernel<A, false>, split_kernel<A, false>, on_chip_kernel<A, true>, split_kernel<A, true>};
}

}  // namespace fdistill::gpu
