// Drives the vector kernels over a batch: the order of the work, the threads, the reductions.
//
// Per sample two passes: n_b = mean |x - T| reads x and T; then g = w / (n_b + eps) (fake - T) reads T and fake again, from
// the caches wherever a sample fits there, and writes the gradient past them. Sums are kept per chunk of kChunk elements
// and added in the order of the chunks, so that every number of threads gives the same bits.
//
// float16 gradients: g / count underflows where count is large or the weight small, and a loss scale that comes with the incoming
// gradient would come too late. Sample b is stored times 2^k, with k such that its largest element nears float16's largest, and
// gradient_scale[b] = 2^-k is what backward multiplies by. Only for them a pass over the sample finds that element first.
#include "loss.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "fdistill/prediction.h"
#include "parallel.h"

namespace fdistill {
namespace {

constexpr int64_t kChunk = 16384;         // elements per partial sum: fixes the order of summation
constexpr int64_t kStage = 512;           // elements gathered at a time where an operand is not dense
constexpr int64_t kPerThread = 16384;     // elements below which another thread does not pay
constexpr int64_t kShareBytes = 6 << 20;  // samples above this are worked on by all threads at once
// Gradients from these sizes on, in all or of each thread, have left the caches before they are read: they are written past
// them, where that many bytes follow each other. (Other stores wait for those past the caches, some 50 ns at each change.)
constexpr int64_t kStreamBytes = 8 << 20, kStreamShare = 7 << 18, kStreamRun = 4096;

const uint8_t kAllOff[kChunk] = {};

// T: what the kernels read. The operands' own type where all are dense and of one type (direct), otherwise the type computed
// in, with every operand that is not dense or of another type gathered into a small buffer first.
template <class T, bool direct>
class Loss {
  using C = compute_t<T>;
  using LossLayout = Layout<kOperands>;

  // Small buffers of one thread, for what is not dense (only the mask can be so where the rest is).
  struct Staging {
    static constexpr int64_t size = direct ? 1 : kStage;
    alignas(64) T values[kOperands][size];
    alignas(64) C k[size], a[size], c[size];
    alignas(64) double weight[size], alpha[size], sigma[size];
    alignas(64) uint8_t mask[kStage];
  };

 public:
  Loss(const LossCall& call, const RatioStats* ratio, int threads, const Kernels& kernels, const LossLayout& layout)
      : call_(call),
        ratio_(ratio),
        threads_(threads),
        layout_(layout),
        kernels_(kernels),
        chunks_((layout.elements + kChunk - 1) / kChunk),
        sums_(layout.batch * chunks_),
        normalizers_(layout.batch, 1.0) {
    if (measures()) distances_.resize(sums_.size());
    if (scales()) largest_.resize(sums_.size()), exponents_.resize(layout.batch);
    if (mask()) counts_.resize(sums_.size());
    int64_t bytes = 0;
    for (const int o : {kDx, kDTeacher, kDFake})
      if (call.operands[o]) bytes += layout.batch * layout.elements * static_cast<int64_t>(sizeof(T));
    stream_ = bytes >= std::min(kStreamBytes, threads * kStreamShare);
  }

  void run() {
    const int64_t total = layout_.batch * layout_.elements;
    const int threads = static_cast<int>(std::min<int64_t>(threads_, std::max<int64_t>(1, total / kPerThread)));
    const int64_t sample_bytes = layout_.elements * static_cast<int64_t>(sizeof(T)) * 3;
    const bool share = threads > 1 && chunks_ > 1 && (layout_.batch < 4 * threads || sample_bytes > kShareBytes);
    std::atomic<int64_t> next_count{0}, next_sample{0};
    parallel(threads, [&](Team& team) {
      Staging staging;
      if (mask()) {
        take_turns(next_count, layout_.batch * chunks_, 1, [&](int64_t i) { count(i, staging); });
        team.barrier();
      }
      if (share) {
        share_samples(team, staging);
      } else {
        const int64_t grain = std::max<int64_t>(1, layout_.batch / (8 * team.size));
        take_turns(next_sample, layout_.batch, grain, [&](int64_t b) { sample(b, staging); });
      }
    });
    finish();
  }

 private:
  const TypedKernels<T>& kernels() const { return kernels_.of<T>(); }
  bool mask() const { return static_cast<bool>(call_.operands[kMask]); }
  bool measures() const { return call_.params.normalizer == Normalizer::mean_abs; }
  bool scales() const { return call_.gradient_scale != nullptr; }
  bool is_half(int o) const { return call_.operands[o] && call_.operands[o].dtype == DType::f16; }
  int64_t chunk_end(int64_t chunk) const { return std::min(layout_.elements, (chunk + 1) * kChunk); }

  template <class Task>
  static void take_turns(std::atomic<int64_t>& next, int64_t n, int64_t grain, Task&& task) {
    for (int64_t from; (from = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      for (int64_t i = from; i < std::min(n, from + grain); ++i) task(i);
  }

  // One thread, one sample.
  void sample(int64_t b, Staging& staging) {
    if (measures() || scales())
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) measure(b, chunk, staging);
    const Scalars scalars = scalars_of(b);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) gradient(b, chunk, scalars, staging);
    keep(b, scalars);
  }

  // All threads, one sample after the other, each thread on its part of the chunks.
  void share_samples(Team& team, Staging& staging) {
    const int64_t first = chunks_ * team.rank / team.size, last = chunks_ * (team.rank + 1) / team.size;
    for (int64_t b = 0; b < layout_.batch; ++b) {
      if (measures() || scales()) {
        for (int64_t chunk = first; chunk < last; ++chunk) measure(b, chunk, staging);
        team.barrier();
      }
      const Scalars scalars = scalars_of(b);
      for (int64_t chunk = first; chunk < last; ++chunk) gradient(b, chunk, scalars, staging);
      if (team.rank == 0) keep(b, scalars);
    }
  }

  // ------------------------------------------------------------------------------------------------ scalars of a sample

  struct Scalars {
    double n;        // n_b
    double inverse;  // 1 / number of masked elements that the mean is over
    int exponent;    // k of a float16 gradient
  };

  Scalars scalars_of(int64_t b) const {
    Scalars s{1.0, 1.0, 0};
    if (measures()) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += distances_[b * chunks_ + chunk];
      s.n = sum / static_cast<double>(layout_.elements);
    } else if (call_.params.normalizer == Normalizer::given) {
      s.n = element(call_.normalizer.data, call_.normalizer.dtype, b * call_.normalizer.stride(0));
    }
    s.inverse = 1.0 / static_cast<double>(divisor(b));
    if (scales()) {
      double most = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) most = std::max(most, largest_[b * chunks_ + chunk]);
      most *= s.inverse / (s.n + call_.params.eps);
      if (std::isfinite(most) && most > 0) s.exponent = std::clamp(14 - std::ilogb(most), -120, 120);
    }
    return s;
  }

  void keep(int64_t b, const Scalars& scalars) {
    normalizers_[b] = scalars.n;
    if (scales()) exponents_[b] = scalars.exponent;
  }

  // The number of elements a loss is the mean over; at least 1.
  int64_t divisor(int64_t b) const {
    if (call_.params.reduction == Reduction::sum) return 1;
    int64_t count = 0;
    if (!mask())
      count = layout_.elements * (call_.params.reduction == Reduction::sample ? 1 : layout_.batch);
    else if (call_.params.reduction == Reduction::sample)
      count = masked_in(b, b + 1);
    else
      count = masked_;
    return std::max<int64_t>(count, 1);
  }

  int64_t masked_in(int64_t from, int64_t to) const {
    int64_t n = 0;
    for (int64_t i = from * chunks_; i < to * chunks_; ++i) n += counts_[i];
    return n;
  }

  double guidance(int64_t b) const {
    if (!call_.guidance) return call_.params.guidance_scale;
    return element(call_.guidance.data, call_.guidance.dtype, b * call_.guidance.stride(0));
  }

  // ------------------------------------------------------------------------------------------------------------- passes

  void count(int64_t index, Staging& staging) {
    const int64_t b = index / chunks_, chunk = index % chunks_;
    int64_t n = 0;
    for (int64_t at = chunk * kChunk; at < chunk_end(chunk);) {
      const int64_t length =
          std::min(chunk_end(chunk) - at, layout_.inner_stride(kMask) == 1 ? layout_.run(at) : kStage);
      const uint8_t* on = mask_bytes(b, at, length, staging);
      for (int64_t i = 0; i < length; ++i) n += on[i] != 0;
      at += length;
    }
    counts_[index] = n;
    masked_ += n;
  }

  // What a sample's scalars depend on: the distance of x from T, and the largest element of a float16 gradient.
  void measure(int64_t b, int64_t chunk, Staging& staging) {
    double sum = 0, most = 0;
    for_each_block(chunk, [&](int64_t at, int64_t n) {
      Block<T> block = block_of(b, at, n, staging);
      coefficients(b, at, block, 1.0, staging);
      if (scales()) {
        block.fake = values(kFake, b, at, n, staging);
        block.mask = mask_of(b, at, n, staging);
        block.identity_alpha = static_cast<C>(call_.params.identity_alpha);
        if (is_half(kDTeacher) || is_half(kDFake)) block.x = values(kX, b, at, n, staging);
        most = std::max(most, kernels().largest(block));
      }
      if (!measures()) return;
      block.x = values(kX, b, at, n, staging);
      if (call_.operands[kXt]) block.x_t = values(kXt, b, at, n, staging);
      sum += (call_.score_identity ? kernels().first_distance : kernels().distance)(block);
    });
    if (measures()) distances_[b * chunks_ + chunk] = sum;
    if (scales()) largest_[b * chunks_ + chunk] = most;
  }

  void gradient(int64_t b, int64_t chunk, const Scalars& scalars, Staging& staging) {
    BlockSums& sums = sums_[b * chunks_ + chunk];
    for_each_block(chunk, [&](int64_t at, int64_t n) {
      Block<T> block = block_of(b, at, n, staging);
      block.fake = values(kFake, b, at, n, staging);
      block.mask = mask_of(b, at, n, staging);
      block.inverse = static_cast<C>(direct ? std::ldexp(scalars.inverse, scalars.exponent) : scalars.inverse);
      coefficients(b, at, block, scalars.n + call_.params.eps, staging);
      block.d_x = target(kDx, b, at, n, staging);
      if (call_.score_identity) {
        block.x = values(kX, b, at, n, staging);
        block.identity_alpha = static_cast<C>(call_.params.identity_alpha);
        block.d_teacher = target(kDTeacher, b, at, n, staging);
        block.d_fake = target(kDFake, b, at, n, staging);
      }
      const auto streams = [&](int o, const T* p) { return p == nullptr || (p != staging.values[o] && can_stream(p)); };
      block.stream = stream_ && n * static_cast<int64_t>(sizeof(T)) >= kStreamRun && streams(kDx, block.d_x) &&
                     streams(kDTeacher, block.d_teacher) && streams(kDFake, block.d_fake);
      (call_.score_identity ? kernels().score_identity : kernels().score_difference)(block, sums);
      if constexpr (!direct) {
        deliver(kDx, b, at, n, block.d_x, staging, scalars.exponent);
        deliver(kDTeacher, b, at, n, block.d_teacher, staging, scalars.exponent);
        deliver(kDFake, b, at, n, block.d_fake, staging, scalars.exponent);
      }
    });
  }

  template <class Task>
  void for_each_block(int64_t chunk, Task&& task) {
    const int64_t end = chunk_end(chunk);
    for (int64_t at = chunk * kChunk; at < end;) {
      const int64_t n = std::min(end - at, direct ? layout_.run(at) : kStage);
      task(at, n);
      at += n;
    }
  }

  static bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

  // What every kernel reads: the teacher's prediction, guidance and flags.
  Block<T> block_of(int64_t b, int64_t at, int64_t n, Staging& staging) {
    Block<T> block{};
    block.n = n;
    block.teacher = values(kTeacher, b, at, n, staging);
    if (call_.operands[kUncond]) {
      block.uncond = values(kUncond, b, at, n, staging);
      block.guidance = static_cast<C>(guidance(b));
    }
    block.zero_nonfinite = call_.params.zero_nonfinite;
    block.stats = call_.stats != nullptr;
    return block;
  }

  const uint8_t* mask_of(int64_t b, int64_t at, int64_t n, Staging& staging) {
    if (!mask()) return nullptr;
    if constexpr (direct) {
      if (layout_.inner_stride(kMask) == 0)  // constant in the run
        return *pointer<uint8_t>(kMask, b, at) ? nullptr : kAllOff;
    }
    return mask_bytes(b, at, n, staging);
  }

  // a, c and k = w c / divisor, as numbers where they are constant in the block, as rows otherwise.
  void coefficients(int64_t b, int64_t at, Block<T>& block, double divisor, Staging& staging) {
    bool rows = false;
    double w = 1, alpha = 1, sigma = 0;
    for (const auto& [o, value] : {std::pair{kWeight, &w}, {kAlpha, &alpha}, {kSigma, &sigma}}) {
      if (!call_.operands[o]) continue;
      *value = element(call_.operands[o].data, call_.operands[o].dtype, layout_.offset(o, b, at));
      rows |= !direct && !constant_in_block(o, at, block.n);
    }
    const X0Coefficients x0 = x0_coefficients(call_.params.prediction, alpha, sigma);
    block.a = static_cast<C>(x0.a), block.c = static_cast<C>(x0.c), block.k = static_cast<C>(w * x0.c / divisor);
    if (!rows) return;
    if constexpr (!direct) coefficient_rows(b, at, block, w, alpha, sigma, divisor, staging);
  }

  void coefficient_rows(int64_t b, int64_t at, Block<T>& block, double w, double alpha, double sigma, double divisor,
                        Staging& staging) {
    gather_scalars(kWeight, b, at, block.n, w, staging.weight);
    gather_scalars(kAlpha, b, at, block.n, alpha, staging.alpha);
    gather_scalars(kSigma, b, at, block.n, sigma, staging.sigma);
    for (int64_t i = 0; i < block.n; ++i) {
      const X0Coefficients row = x0_coefficients(call_.params.prediction, staging.alpha[i], staging.sigma[i]);
      staging.a[i] = static_cast<C>(row.a), staging.c[i] = static_cast<C>(row.c);
      staging.k[i] = static_cast<C>(staging.weight[i] * row.c / divisor);
    }
    block.a_rows = staging.a, block.c_rows = staging.c, block.k_rows = staging.k;
  }

  bool constant_in_block(int o, int64_t at, int64_t n) const {
    return layout_.inner_stride(o) == 0 && (n <= layout_.run(at) || layout_.constant_in_sample(o));
  }

  // ------------------------------------------------------------------------------------------------------------- memory

  template <class E>
  E* pointer(int o, int64_t b, int64_t at) const {
    return static_cast<E*>(call_.operands[o].data) + layout_.offset(o, b, at);
  }

  // Whether n elements from `at` on lie densely, in the type the kernels read.
  bool is_dense(int o, int64_t at, int64_t n) const {
    return direct || (layout_.inner_stride(o) == 1 && n <= layout_.run(at) && call_.operands[o].dtype == kDType);
  }
  static constexpr DType kDType = std::is_same_v<T, float>      ? DType::f32
                                  : std::is_same_v<T, double>   ? DType::f64
                                  : std::is_same_v<T, bfloat16> ? DType::bf16
                                                                : DType::f16;

  // The elements of an operand where they are dense, otherwise a copy of them in its buffer.
  const T* values(int o, int64_t b, int64_t at, int64_t n, Staging& staging) const {
    if (is_dense(o, at, n)) return pointer<T>(o, b, at);
    T* buffer = staging.values[o];
    if constexpr (!direct) {
      switch (call_.operands[o].dtype) {
        case DType::f32: gather<float>(o, b, at, n, buffer); break;
        case DType::f64: gather<double>(o, b, at, n, buffer); break;
        case DType::bf16: gather<bfloat16>(o, b, at, n, buffer); break;
        default: gather<float16>(o, b, at, n, buffer);
      }
    }
    return buffer;
  }

  const uint8_t* mask_bytes(int64_t b, int64_t at, int64_t n, Staging& staging) const {
    if (layout_.inner_stride(kMask) == 1 && n <= layout_.run(at)) return pointer<uint8_t>(kMask, b, at);
    gather<uint8_t>(kMask, b, at, n, staging.mask);
    return staging.mask;
  }

  template <class From, class To>
  void gather(int o, int64_t b, int64_t at, int64_t n, To* to) const {
    const auto* base = static_cast<const From*>(call_.operands[o].data);
    const auto value = [](From v) {
      if constexpr (std::is_same_v<From, uint8_t>)
        return v;
      else
        return static_cast<To>(to_float(v));
    };
    layout_.for_each_run(o, b, at, n, [&](int64_t offset, int64_t stride, int64_t count) {
      const From* from = base + offset;
      if (stride != 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = value(from[i * stride]);
      } else if constexpr (sizeof(From) == 2 && std::is_same_v<To, float>) {
        kernels_.conversion<From>().widen(from, to, count);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] = value(from[i]);
      }
      to += count;
    });
  }

  void gather_scalars(int o, int64_t b, int64_t at, int64_t n, double value, double* to) const {
    const Tensor& tensor = call_.operands[o];
    if (!tensor) {
      std::fill(to, to + n, value);
      return;
    }
    layout_.for_each_run(o, b, at, n, [&](int64_t offset, int64_t stride, int64_t count) {
      for (int64_t i = 0; i < count; ++i) *to++ = element(tensor.data, tensor.dtype, offset + i * stride);
    });
  }

  // Where a kernel writes a gradient: in place, or into the buffer that deliver() then empties.
  T* target(int o, int64_t b, int64_t at, int64_t n, Staging& staging) const {
    if (!call_.operands[o]) return nullptr;
    return is_dense(o, at, n) ? pointer<T>(o, b, at) : staging.values[o];
  }

  void deliver(int o, int64_t b, int64_t at, int64_t n, const T* written, Staging& staging, int exponent) const {
    T* buffer = staging.values[o];
    if (written != buffer) return;
    switch (call_.operands[o].dtype) {
      case DType::f32: return scatter<float>(o, b, at, n, buffer);
      case DType::f64: return scatter<double>(o, b, at, n, buffer);
      case DType::bf16: return scatter<bfloat16>(o, b, at, n, buffer);
      default:
        if (const C scale = static_cast<C>(std::ldexp(1.0, exponent)); scale != 1)
          for (int64_t i = 0; i < n; ++i) buffer[i] *= scale;
        return scatter<float16>(o, b, at, n, buffer);
    }
  }

  template <class To>
  void scatter(int o, int64_t b, int64_t at, int64_t n, const T* from) const {
    auto* base = static_cast<To*>(call_.operands[o].data);
    layout_.for_each_run(o, b, at, n, [&](int64_t offset, int64_t stride, int64_t count) {
      To* const to = base + offset;
      const T* const row = from;
      from += count;
      if constexpr (sizeof(To) == 2 && std::is_same_v<T, float>)
        if (stride == 1) return kernels_.conversion<To>().narrow(row, to, count);
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (std::is_same_v<To, double>)
          to[i * stride] = row[i];
        else
          store(row[i], to[i * stride]);
      }
    });
  }

  // ------------------------------------------------------------------------------------------------------------ results

  void put(void* array, int64_t i, double value) const {
    if (call_.wide)
      static_cast<double*>(array)[i] = value;
    else
      static_cast<float*>(array)[i] = static_cast<float>(value);
  }

  void finish() {
    const bool per_sample = call_.params.reduction == Reduction::sample;
    double total = 0, loss_mean = 0;
    for (int64_t b = 0; b < layout_.batch; ++b) {
      double sum = 0;
      for (int64_t i = b * chunks_; i < (b + 1) * chunks_; ++i)
        sum += call_.score_identity ? sums_[i].terms : 0.5 * sums_[i].squares;
      total += sum;
      if (!per_sample) continue;
      const int64_t count = divisor(b);
      put(call_.loss, b, sum / static_cast<double>(count));
      loss_mean += sum / static_cast<double>(count) / static_cast<double>(layout_.batch);
    }
    if (!per_sample) {
      const int64_t count = divisor(0);
      loss_mean = total / static_cast<double>(count);
      put(call_.loss, 0, loss_mean);
    }
    for (size_t b = 0; b < exponents_.size(); ++b) put(call_.gradient_scale, b, std::ldexp(1.0, -exponents_[b]));
    if (call_.stats != nullptr) statistics(loss_mean);
  }

  struct Range {
    double low = std::numeric_limits<double>::infinity(), high = -low, sum = 0, squares = 0;
    int64_t n = 0;

    void add(double v) {
      if (!std::isfinite(v)) return;
      low = std::min(low, v), high = std::max(high, v), sum += v, squares += v * v, ++n;
    }
    double or_nan(double v) const { return n > 0 ? v : std::numeric_limits<double>::quiet_NaN(); }
  };

  void statistics(double loss_mean) const {
    double values[kStats], squares = 0, absolute = 0;
    int64_t bad = 0, count = 0;
    for (const BlockSums& s : sums_) squares += s.squares, absolute += s.absolute, bad += s.bad;
    count = mask() ? masked_.load() : layout_.batch * layout_.elements;
    Range normalizer, weight;
    for (const double n : normalizers_) normalizer.add(n);
    add_weights(weight, 0, 0);
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    values[kLoss] = loss_mean;
    values[kGradNorm] = std::sqrt(squares);
    values[kGradMeanAbs] = absolute / static_cast<double>(std::max<int64_t>(count, 1));
    values[kNormalizerMin] = normalizer.or_nan(normalizer.low);
    values[kNormalizerMean] = normalizer.sum / static_cast<double>(normalizer.n);
    values[kNormalizerMax] = normalizer.or_nan(normalizer.high);
    values[kWeightMin] = weight.or_nan(weight.low);
    values[kWeightMean] = weight.sum / static_cast<double>(weight.n);
    values[kWeightMax] = weight.or_nan(weight.high);
    values[kRatioMean] = ratio_ ? ratio_->ratio_mean : kNaN;
    values[kClippedLow] = ratio_ ? ratio_->clipped_low : kNaN;
    values[kClippedHigh] = ratio_ ? ratio_->clipped_high : kNaN;
    values[kEffectiveSampleSize] = weight.sum * weight.sum / weight.squares;
    values[kNonfinite] = static_cast<double>(bad);
    for (int i = 0; i < kStats; ++i) put(call_.stats, i, values[i]);
  }

  // Every row of the weight as it was given, [B], [B, F], ...
  void add_weights(Range& range, int dim, int64_t offset) const {
    const Tensor& weight = call_.operands[kWeight];
    if (!weight) {
      for (int64_t b = 0; b < layout_.batch; ++b) range.add(1.0);
    } else if (dim == weight.dims) {
      range.add(element(weight.data, weight.dtype, offset));
    } else {
      for (int64_t i = 0; i < call_.shape[dim]; ++i) add_weights(range, dim + 1, offset + i * weight.stride(dim));
    }
  }

  const LossCall& call_;
  const RatioStats* const ratio_;
  const int threads_;
  const LossLayout& layout_;
  const Kernels& kernels_;
  const int64_t chunks_;
  std::vector<double> distances_, largest_;
  std::vector<int> exponents_;
  std::vector<int64_t> counts_;
  std::vector<BlockSums> sums_;
  std::vector<double> normalizers_;
  std::atomic<int64_t> masked_{0};
  bool stream_ = false;
};

constexpr int64_t kShortRun = 64;  // innermost rows shorter than this are gathered together

}  // namespace

void loss(const LossCall& call, const RatioStats* ratio, int threads, const Kernels& kernels) {
  const Layout<kOperands> layout = call.layout();

  bool direct = layout.dims == 1 || layout.inner() >= kShortRun;
  const DType dtype = call.operands[kX].dtype;
  for (const int o : kElementwise)
    if (call.operands[o]) direct &= call.operands[o].dtype == dtype && layout.inner_stride(o) == 1;
  for (const int o : kRows) direct &= layout.inner_stride(o) == 0;
  if (call.operands[kMask]) direct &= layout.inner_stride(kMask) <= 1 && layout.inner_stride(kMask) >= 0;

  const auto run = [&]<class T, bool dense>() { Loss<T, dense>(call, ratio, threads, kernels, layout).run(); };
  if (!direct) return call.wide ? run.operator()<double, false>() : run.operator()<float, false>();
  switch (dtype) {
    case DType::f32: return run.operator()<float, true>();
    case DType::f64: return run.operator()<double, true>();
    case DType::bf16: return run.operator()<bfloat16, true>();
    default: return run.operator()<float16, true>();
  }
}

}  // namespace fdistill
