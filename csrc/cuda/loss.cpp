// Chooses the kernels of a call and launches them. What is chosen depends on the size of a sample, its operands and the
// device, not on the batch: a sample gives the same bits in every batch.
#include "loss.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "shared_layout.h"

namespace fdistill::gpu {
namespace {

constexpr int64_t kSplitChunk = 8192;       // elements of a piece of a split sample
constexpr int64_t kComfortable = 64 << 10;  // bytes kept by a block, so that a multiprocessor runs several
constexpr int64_t kReserved = 16 << 10;     // bytes of shared memory for everything that is not kept
static_assert(SharedLayout::weights + kPrologueSamples * 12 + kPrologueBins * 8 + 16 <= kReserved);

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
int64_t divide_up(int64_t v, int64_t by) { return (v + by - 1) / by; }

// Hands out pieces of a stream's memory; without memory it only counts.
class Pieces {
 public:
  explicit Pieces(unsigned char* begin) : begin_(begin) {}
  template <class T>
  T* take(int64_t count) {
    auto* piece = reinterpret_cast<T*>(begin_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* begin_;
  int64_t used_ = 0;
};

// Bytes from the first element of a tensor to behind its last.
int64_t span(const Tensor& tensor, int dims, const int64_t* shape) {
  int64_t last = 0;
  for (int d = 0; d < dims; ++d) {
    if (shape[d] == 0) return 0;
    last += (shape[d] - 1) * tensor.stride(d);
  }
  return (last + 1) * item_size(tensor.dtype);
}

void add_weight_ranges(Ranges& ranges, const WeightArguments& arguments) {
  const WeightCall& call = arguments.call;
  if (call.batch > 0) {
    const int64_t last = (call.batch - 1) * call.logits_stride + (call.heads - 1) * call.heads_stride;
    ranges.read(call.logits, (last + 1) * item_size(call.logits_dtype));
    ranges.read(call.t, ((call.batch - 1) * call.t_stride + 1) * item_size(call.t_dtype));
  }
  ranges.read(call.bins, call.n_bins * 4);
  ranges.write(arguments.new_bins, call.n_bins * 4);
}

// An empty batch has no logits, by whose address a loss would know that it is to compute weights.
bool fits_prologue(const WeightCall& call) {
  return call.batch > 0 && call.batch <= kPrologueSamples && call.batch * call.heads <= kPrologueLogits &&
         call.n_bins <= kPrologueBins;
}

int64_t log_ratio_count(const WeightCall& call) { return 2 * call.batch + call.n_bins + call.batch / 2 + 1; }

void launch_weights(const WeightArguments& arguments, void* stream) {
  Ranges ranges;
  const WeightCall& call = arguments.call;
  add_weight_ranges(ranges, arguments);
  ranges.write(arguments.log_ratio, log_ratio_count(call) * 8);
  ranges.write(arguments.weights, call.batch * (call.narrow() ? 4 : 8));
  ranges.write(arguments.ratio, sizeof(RatioStats));
  launch({"f_weights", 1, kMaxThreads, 1, kReductionBytes, false, stream}, weights_kernel(), arguments, ranges);
}

// Elements on a mask, added to *total.
void launch_count(const LossCall& call, unsigned long long* total, void* stream) {
  const Tensor& mask = call.operands[kMask];
  CountArguments count{};
  count.mask = static_cast<const uint8_t*>(mask.data), count.elements = 1, count.times = 1, count.total = total;
  int order[kMaxDims], n = 0;
  for (int d = 0; d < call.dims; ++d) {
    if (mask.stride(d) == 0)
      count.times *= call.shape[d];  // repeated, not read again
    else if (call.shape[d] != 1)
      order[n++] = d;
  }
  std::sort(order, order + n, [&](int a, int b) { return mask.stride(a) > mask.stride(b); });
  for (int i = 0; i < n; ++i) {
    const int64_t size = call.shape[order[i]], stride = mask.stride(order[i]);
    count.elements *= size;
    const int last = count.dims - 1;
    if (last >= 0 && count.stride[last] == stride * size) {
      count.size[last] *= size, count.stride[last] = stride;
    } else {
      if (count.dims > kDims) throw std::length_error("mask: too many dimensions");
      count.size[count.dims] = size, count.stride[count.dims++] = stride;
    }
  }
  if (count.dims == 0) count.dims = 1, count.size[0] = 1, count.stride[0] = 1;
  Ranges ranges;
  ranges.read(count.mask, span(mask, call.dims, call.shape));
  ranges.write(total, sizeof(*total));
  const auto kernel = mask_kernel();
  const int64_t useful = divide_up(count.elements, 64 * kMaxThreads);
  const unsigned resident =
      resident_blocks("count", reinterpret_cast<const void*>(kernel), kMaxThreads, kReductionBytes);
  launch({"count", static_cast<unsigned>(std::clamp<int64_t>(useful, 1, resident)), kMaxThreads, 1, kReductionBytes,
          false, stream},
         kernel, count, ranges);
}

// ---------------------------------------------------------------------------------------------------------------- plan

class Plan {
 public:
  Plan(const LossCall& call, const WeightArguments* logits, const Memory& memory, const Device& device)
      : call_(call), logits_(logits), device_(device), pieces_(memory.scratch) {
    args_.counters = memory.counters;
    args_.masked = reinterpret_cast<unsigned long long*>(memory.counters + kMaskedLow);
    if (logits_ != nullptr && !fits_prologue(logits_->call)) weigh_first();
    const Layout<kOperands> layout = call_.layout();
    operands(layout);
    choose_kernel(layout);
    choose_order();
    scratch();
  }

  Needs needs() const { return {kCounters + (on_chip_ ? 0 : args_.batch * kSampleCounters), pieces_.used()}; }

  void run(void* stream) {
    if (weighs_first_) launch_weights(separate_, stream);
    if (args_.early) launch_count(call_, args_.masked, stream);
    const bool early = args_.early && code_.early;
    Launch config{name_, 0, threads_, static_cast<unsigned>(on_chip_ ? args_.chunks : 1), shared_, early, stream};
    if (on_chip_) {
      config.blocks = static_cast<unsigned>(args_.batch * args_.chunks);
    } else {
      const int64_t tickets = args_.batch * args_.chunks;
      config.blocks = static_cast<unsigned>(std::clamp<int64_t>(tickets, 1, resident()));
    }
    launch(config, kernel_, args_, ranges());
  }

 private:
  bool mask() const { return static_cast<bool>(call_.operands[kMask]); }
  unsigned resident() const {
    return resident_blocks(name_, reinterpret_cast<const void*>(kernel_), threads_, shared_);
  }

  // Weights of a batch that is too large for every block to compute them by itself.
  void weigh_first() {
    weighs_first_ = true;
    separate_ = *logits_;
    separate_.log_ratio = pieces_.take<double>(log_ratio_count(logits_->call));
    separate_.weights = nullptr;
    separate_.ratio = pieces_.take<RatioStats>(1);
    args_.ratio = separate_.ratio;
    Tensor& weight = call_.operands[kWeight];
    weight.data = separate_.log_ratio, weight.dtype = DType::f64, weight.dims = 1, weight.strides[0] = 1;
    logits_ = nullptr;
  }

  void operands(const Layout<kOperands>& layout) {
    if (layout.dims > kDims) throw std::length_error("x: too many dimensions that do not merge");
    args_.batch = layout.batch, args_.elements = layout.elements, args_.dims = layout.dims;
    std::copy(layout.size, layout.size + layout.dims, args_.size);
    for (int o = 0; o < kOperands; ++o) {
      args_.data[o] = call_.operands[o].data, args_.dtype[o] = call_.operands[o].dtype;
      args_.batch_stride[o] = layout.batch_stride[o];
      std::copy(layout.stride[o], layout.stride[o] + layout.dims, args_.stride[o]);
    }
    const auto vector = [](const Tensor& tensor) { return Vector{tensor.data, tensor.dtype, tensor.stride(0)}; };
    args_.guidance = vector(call_.guidance), args_.normalizer = vector(call_.normalizer);
    args_.params = call_.params;
    args_.score_identity = call_.score_identity, args_.wide = call_.wide;
    args_.loss = call_.loss, args_.gradient_scale = call_.gradient_scale, args_.stats = call_.stats;
    if (logits_ != nullptr) args_.weights = *logits_;
    const Tensor& weight = call_.operands[kWeight];
    int order[kMaxDims], used = 0;  // by stride, as those of the layout: statistics do not ask for an order
    for (int d = 0; weight && d < weight.dims; ++d)
      if (call_.shape[d] != 1) order[used++] = d;
    std::stable_sort(order, order + used, [&](int a, int b) { return weight.stride(a) > weight.stride(b); });
    int& n = args_.weight_dims;
    for (int i = 0; i < used; ++i) {
      const int64_t size = call_.shape[order[i]], stride = weight.stride(order[i]);
      if (n > 0 && args_.weight_stride[n - 1] == stride * size) {
        args_.weight_size[n - 1] *= size, args_.weight_stride[n - 1] = stride;
      } else {
        if (n > kDims) throw std::length_error("weight: too many dimensions that do not merge");
        args_.weight_size[n] = size, args_.weight_stride[n++] = stride;
      }
    }
  }

  // The elements of a sample lie densely in the order of the layout.
  bool dense(const Layout<kOperands>& layout, int o) const {
    int64_t expected = 1;
    for (int d = layout.dims - 1; d >= 0; --d) {
      if (layout.stride[o][d] != expected) return false;
      expected *= layout.size[d];
    }
    return true;
  }

  void choose_kernel(const Layout<kOperands>& layout) {
    args_.row_run = layout.elements;
    int64_t run = 1;
    for (int d = layout.dims - 1; d >= 0 && !args_.rows; --d) {
      for (const int o : kRows) args_.rows |= layout.stride[o][d] != 0;
      if (args_.rows) args_.row_run = run;
      run *= layout.size[d];
    }
    args_.dense_mask = mask() && dense(layout, kMask);

    const DType dtype = call_.operands[kX].dtype;
    bool same = true, vectors = true;
    for (const int o : kElementwise) {
      if (!call_.operands[o]) continue;
      same &= call_.operands[o].dtype == dtype;
      vectors &= dense(layout, o);
    }
    const int64_t width = same ? 16 / item_size(dtype) : 4;
    vectors &= (same || !call_.wide) && (!args_.rows || args_.row_run % width == 0);
    args_.aligned = true;
    for (const int o : kElementwise) {
      const Tensor& operand = call_.operands[o];
      if (!operand) continue;
      const int64_t item = item_size(operand.dtype), access = width * item;
      args_.aligned &= reinterpret_cast<uintptr_t>(operand.data) % access == 0;
      args_.aligned &= layout.batch == 1 || layout.batch_stride[o] * item % access == 0;
    }
    const LossParams& p = call_.params;
    measures_ = p.normalizer == Normalizer::mean_abs || call_.gradient_scale != nullptr ||
                (mask() && p.reduction == Reduction::sample);
    const bool plain = !call_.operands[kUncond] && !call_.operands[kXt] && !mask() && !args_.rows &&
                       !p.zero_nonfinite && call_.stats == nullptr && !call_.score_identity &&
                       call_.gradient_scale == nullptr;
    const LossKernels& kernels = !vectors ? call_.wide ? loss_kernels_strided_f64() : loss_kernels_strided_f32()
                                 : !same ? loss_kernels_mixed()
                                 : dtype == DType::f32  ? loss_kernels_f32()
                                 : dtype == DType::f64  ? loss_kernels_f64()
                                 : dtype == DType::bf16 ? loss_kernels_bf16()
                                                        : loss_kernels_f16();
    code_ = code_of("loss", reinterpret_cast<const void*>(kernels.on_chip), kMaxThreads, device_.shared_bytes);
    on_chip_ = measures_ && layout.batch > 0 && layout.elements > 0 && fits_on_chip();
    const auto special = on_chip_ ? kernels.plain_on_chip : kernels.plain_split;
    kernel_ = plain && special != nullptr ? special : on_chip_ ? kernels.on_chip : kernels.split;
    name_ = on_chip_ ? "loss (on chip)" : "loss (split)";
    if (!on_chip_)
      args_.chunk = kSplitChunk, args_.chunks = std::max<int64_t>(1, divide_up(layout.elements, kSplitChunk));
    const int64_t groups = divide_up(std::min(args_.chunk, layout.elements), vectors ? width : call_.wide ? 2 : 1);
    threads_ = static_cast<unsigned>(std::clamp<int64_t>(round_up(divide_up(groups, 2), 32), 32, kMaxThreads));
  }

  // The smallest cluster whose blocks keep little enough, or the largest one if they can keep their parts at all.
  bool fits_on_chip() {
    const int64_t limit = static_cast<int64_t>(device_.shared_bytes) - kReserved;
    const int64_t each = (call_.wide ? 8 : 4) * (call_.score_identity ? 2 : 1);
    for (int64_t cluster = 1; cluster <= code_.max_cluster; cluster *= 2) {
      const int64_t part = round_up(divide_up(args_.elements, cluster), 16);
      const bool most = 2 * cluster > code_.max_cluster;
      if (part * each > (most ? limit : std::min(limit, kComfortable))) continue;
      args_.chunk = part, args_.chunks = cluster;
      kept_ = part * each;
      return true;
    }
    return false;
  }

  void choose_order() {
    static const WeightCall none{};
    const SharedLayout layout(logits_ != nullptr ? logits_->call : none, logits_ != nullptr);
    shared_ = layout.kept + std::max<int64_t>(on_chip_ ? kept_ : 0, layout.ratio_bytes);
    args_.early = mask() && call_.params.reduction == Reduction::mean && args_.batch * args_.elements > 0;
    args_.measures = measures_;
    if (on_chip_) args_.announced = announced();
    if (on_chip_ || !measures_) return;
    // As far ahead as it takes to keep every block busy, as long as the teacher is still in the level 2 cache when it
    // is read again.
    const int64_t bytes = 2 * args_.elements * item_size(call_.operands[kX].dtype);
    const int64_t cached = static_cast<int64_t>(device_.level2_bytes) / 2 / std::max<int64_t>(1, bytes);
    const int64_t busy = divide_up(resident(), args_.chunks);
    args_.lookahead = std::clamp<int64_t>(std::min(busy, cached - 1), 0, args_.batch);
    args_.backwards = args_.lookahead == 0;
  }

  // All blocks that run at once together bring an eighth of the level 2 cache: what the memory delivers in the time, and
  // little enough to be there still when it is read.
  int64_t announced() const {
    if (logits_ == nullptr || args_.params.normalizer != Normalizer::mean_abs) return 0;
    int64_t bytes = 0;
    for (int o = kX; o <= kFake; ++o) bytes += item_size(args_.dtype[o]);
    return static_cast<int64_t>(device_.level2_bytes) / 8 / resident() / bytes / 64 * 64;
  }

  void scratch() {
    args_.records = pieces_.take<SampleRecord>(args_.batch);
    if (logits_ != nullptr) {
      const WeightCall& call = logits_->call;
      args_.ratio = pieces_.take<RatioStats>(1);
      if (call.batch > kAloneSamples || call.batch * call.heads > kAloneLogits)
        args_.weighed = pieces_.take<double>(call.batch);
    }
    if (on_chip_) return;
    args_.chunk_sums = pieces_.take<SampleSums>(args_.batch * args_.chunks);
    if (!measures_) return;
    args_.chunk_measures = pieces_.take<Measures>(args_.batch * args_.chunks);
    args_.sample_measures = pieces_.take<Measures>(args_.batch);
  }

  Ranges ranges() const {
    Ranges ranges;
    for (int o = 0; o < kOperands; ++o) {
      const Tensor& operand = call_.operands[o];
      const int dims = o >= kWeight && o <= kSigma ? operand.dims : call_.dims;
      if (!operand) continue;
      const int64_t bytes = span(operand, dims, call_.shape);
      o >= kDx ? ranges.write(operand.data, bytes) : ranges.read(operand.data, bytes);
    }
    ranges.read(call_.guidance.data, span(call_.guidance, 1, call_.shape));
    ranges.read(call_.normalizer.data, span(call_.normalizer, 1, call_.shape));
    const int64_t item = call_.wide ? 8 : 4;
    ranges.write(call_.loss, item * (call_.params.reduction == Reduction::sample ? args_.batch : 1));
    ranges.write(call_.gradient_scale, item * args_.batch);
    ranges.write(call_.stats, item * kStats);
    if (logits_ != nullptr) add_weight_ranges(ranges, *logits_);
    ranges.write(args_.ratio, sizeof(RatioStats));
    ranges.write(args_.weighed, args_.batch * static_cast<int64_t>(sizeof(double)));
    ranges.write(args_.counters, needs().counters * static_cast<int64_t>(sizeof(unsigned)));
    ranges.write(args_.records, args_.batch * static_cast<int64_t>(sizeof(SampleRecord)));
    const int64_t all = on_chip_ ? 0 : args_.batch * args_.chunks;
    ranges.write(args_.chunk_sums, all * static_cast<int64_t>(sizeof(SampleSums)));
    ranges.write(args_.chunk_measures, all * static_cast<int64_t>(sizeof(Measures)));
    ranges.write(args_.sample_measures, args_.batch * static_cast<int64_t>(sizeof(Measures)));
    return ranges;
  }

  LossCall call_;
  const WeightArguments* logits_;
  const Device& device_;
  Code code_{};
  Pieces pieces_;
  LossArguments args_{};
  WeightArguments separate_{};
  bool weighs_first_ = false, on_chip_ = false, measures_ = false;
  Kernel<LossArguments> kernel_ = nullptr;
  const char* name_ = nullptr;
  unsigned threads_ = 0;
  int64_t kept_ = 0;
  size_t shared_ = 0;
};

// The launches of one call follow each other on their stream: another thread of the host must not come between them, as
// they share the stream's memory.
std::mutex one_call;

}  // namespace

Needs loss(const LossCall& call, const WeightArguments* logits, const Memory& memory, void* stream) {
  Plan plan(call, logits, memory, current_device());
  const Needs needs = plan.needs();
  if (!needs.met_by(memory)) return needs;
  const std::lock_guard lock(one_call);
  plan.run(stream);
  return needs;
}

Needs f_weights(const WeightArguments& arguments, const Memory& memory, void* stream) {
  Pieces pieces(memory.scratch);
  WeightArguments complete = arguments;
  complete.log_ratio = pieces.take<double>(log_ratio_count(arguments.call));
  const Needs needs{0, pieces.used()};
  if (!needs.met_by(memory)) return needs;
  const std::lock_guard lock(one_call);
  launch_weights(complete, stream);
  return needs;
}

void scale_gradient(const ScaleArguments& arguments, void* stream) {
  if (arguments.batch * arguments.elements == 0) return;
  const int64_t bytes = arguments.batch * arguments.elements * item_size(arguments.dtype);
  Ranges ranges;
  ranges.read(arguments.in, bytes);
  ranges.write(arguments.out, bytes);
  for (const Vector& vector : {arguments.upstream, arguments.scale})
    ranges.read(vector.data, ((arguments.batch - 1) * vector.stride + 1) * item_size(vector.dtype));
  const auto kernel = gradient_kernel();
  const unsigned resident = resident_blocks("scale_gradient", reinterpret_cast<const void*>(kernel), kMaxThreads, 0);
  const int64_t work = arguments.batch * divide_up(arguments.elements, kScaleChunk);
  launch({"scale_gradient", static_cast<unsigned>(std::min<int64_t>(work, resident)), kMaxThreads, 1, 0, false, stream},
         kernel, arguments, ranges);
}

}  // namespace fdistill::gpu
