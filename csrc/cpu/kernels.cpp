// The arithmetic of the losses over a block of elements. Compiled once per instruction set (FD_ISA names it), without
// contraction to fused multiply-adds, so that every set gives the same bits.
#include "kernels.h"

#include "simd.h"

namespace fdistill::FD_ISA {
namespace {

// Elements that go through the registers together: as many as lie in 64 bytes of a 2-byte type that is split into even and odd.
template <class T>
constexpr int kMultiple = std::is_same_v<T, bfloat16> ? 2 : 1;
template <class T>
constexpr int kGroup = kMultiple<T> * kLanes;

// How far ahead memory is asked for. The processor's own prefetching stops at the end of a page of 4 KiB.
template <class T>
constexpr int64_t kAhead = 3072 / sizeof(T);

// Whether a sample's elements are read again: then they are to stay in the caches. Others are to leave them to those.
enum class Reads { again, last };

// Operands of one group from a block, starting at i; a partial group at the end is padded with zeros.
template <class T>
struct Group {
  const Block<T>& b;
  int64_t i;
  int valid;
  using C = compute_t<T>;
  static constexpr int size = kGroup<T>;
  using V = Lanes<C, kMultiple<T>>;
  using M = Mask<C, kMultiple<T>>;

  template <Reads reads = Reads::again>
  FD_INLINE V at(const T* p) const {
    if (valid == size) {
      __builtin_prefetch(p + i + kAhead<T>, 0, reads == Reads::again ? 3 : 0);
      return load(p + i);
    }
    T padded[size] = {};
    for (int j = 0; j < valid; ++j) padded[j] = p[i + j];
    return load(padded);
  }
  FD_INLINE V row(const C* rows, C value) const {
    if constexpr (std::is_same_v<T, C>) {  // other types are read only where the coefficients are constant
      if (rows != nullptr) return at(rows);
    }
    return V::all(value);
  }
  FD_INLINE M on() const {
    if (valid == size && b.mask == nullptr) return M::all();
    if constexpr (kMultiple<T> == 1) {
      if (valid == size) return M::of(b.mask + i);
    }
    uint8_t bytes[size] = {};
    for (int j = 0; j < valid; ++j)
      bytes[kMultiple<T> == 1 ? j : j % 2 * kLanes + j / 2] = b.mask == nullptr || b.mask[i + j];
    return M::of(bytes);
  }
  template <bool any>  // see store
  FD_INLINE void put(T* p, const V& v) const {
    if (p == nullptr) return;
    if (valid == size) return store<any>(p + i, v, b.stream);
    T padded[size];
    store<true>(padded, v, false);
    for (int j = 0; j < valid; ++j) p[i + j] = padded[j];
  }
  template <bool guided>
  FD_INLINE V teacher() const {  // as predicted: T = uncond + s (teacher - uncond)
    if constexpr (!guided) return at(b.teacher);
    const V u = at(b.uncond);
    return u + V::all(b.guidance) * (at(b.teacher) - u);
  }
};

// Calls each(i, valid) for every group, or four(i) for four of them together where that many are left.
template <class T, class Four, class Each>
FD_INLINE void for_each_group(const Block<T>& b, Four&& four, Each&& each) {
  constexpr int size = kGroup<T>;
  int64_t i = 0;
  if constexpr (!std::is_same_v<Four, std::nullptr_t>)
    for (; i + 4 * size <= b.n; i += 4 * size) four(i);
  for (; i + size <= b.n; i += size) each(i, size);
  if (i < b.n) each(i, static_cast<int>(b.n - i));
}

// Sums are taken of four groups at a time in the type computed in and then in float64, which spares three widenings of four.
// Where such a sum has left the range that is exact enough, the block is done again, every element widened by itself.

// sum |x - T|,  T = a x_t + c (guided teacher)
template <class T, bool guided, bool converted, Reads reads>
double distance_of(const Block<T>& block) {
  const Block<T> b = block;
  constexpr int size = kGroup<T>;
  const auto distance = [&](int64_t i, int valid) FD_ALWAYS_INLINE {
    const Group<T> group{b, i, valid};
    auto t = group.template teacher<guided>();
    if constexpr (converted) t = group.row(b.a_rows, b.a) * group.at(b.x_t) + group.row(b.c_rows, b.c) * t;
    return (group.template at<reads>(b.x) - t).abs();
  };
  Sum sum, wide;
  const auto four = [&](int64_t i) FD_ALWAYS_INLINE {
    sum.add(fold((distance(i, size) + distance(i + size, size)) +
                 (distance(i + 2 * size, size) + distance(i + 3 * size, size))));
  };
  for_each_group(b, four, [&](int64_t i, int valid) FD_ALWAYS_INLINE { sum.add(distance(i, valid)); });
  const double total = sum.total();
  if (total - total == 0) return total;
  for_each_group(b, nullptr, [&](int64_t i, int valid) FD_ALWAYS_INLINE { wide.add(distance(i, valid)); });
  return wide.total();
}

template <class T, Reads reads>
double distance(const Block<T>& b) {
  const bool guided = b.uncond != nullptr, converted = b.x_t != nullptr;
  if (guided) return converted ? distance_of<T, true, true, reads>(b) : distance_of<T, true, false, reads>(b);
  return converted ? distance_of<T, false, true, reads>(b) : distance_of<T, false, false, reads>(b);
}

// max |k (fake - teacher)| over the finite ones on the mask; with x a bound on all derivatives of the score identity.
template <class T>
double largest(const Block<T>& block) {
  using V = typename Group<T>::V;
  const Block<T> b = block;
  const V factor = V::all(1) + V::all(2 * b.identity_alpha).abs();
  V most = V::all(0);
  for_each_group(b, nullptr, [&](int64_t i, int valid) FD_ALWAYS_INLINE {
    const Group<T> group{b, i, valid};
    const V t = b.uncond == nullptr ? group.template teacher<false>() : group.template teacher<true>();
    const V k = group.row(b.k_rows, b.k);
    V bound = (k * (group.at(b.fake) - t)).abs();
    if (b.x != nullptr) bound = bound * factor + (k * (group.at(b.x) - t)).abs();
    most = larger(most, bound.where(group.on() & bound.finite()));
  });
  return static_cast<double>(most.largest());
}

// g = k (fake - teacher),  k = w c / (n_b + eps); every element finite, no mask, no statistics. False where the sum of the
// squares is not to be trusted: too large or too small for float32, or a g that is not finite.
template <class T, bool guided>
bool score_difference_plain(const Block<T>& block, BlockSums& sums) {
  using V = typename Group<T>::V;
  const Block<T> b = block;  // a copy of its own, which nothing written can alias
  constexpr int size = kGroup<T>;
  const V inverse = V::all(b.inverse);
  const auto square = [&](int64_t i, int valid) FD_ALWAYS_INLINE {
    const Group<T> group{b, i, valid};
    const V g = group.row(b.k_rows, b.k) * (group.template at<Reads::last>(b.fake) - group.template teacher<guided>());
    group.template put<false>(b.d_x, g * inverse);
    return g * g;
  };
  Sum sum;
  const auto four = [&](int64_t i) FD_ALWAYS_INLINE {
    const V first = square(i, size) + square(i + size, size);
    sum.add(fold(first + (square(i + 2 * size, size) + square(i + 3 * size, size))));
  };
  for_each_group(b, four, [&](int64_t i, int valid) FD_ALWAYS_INLINE { sum.add(square(i, valid)); });
  const double total = sum.total();
  sums.squares += total;
  return total > 1e-24 && total < 1e36;
}

// The same in every case.
template <class T, bool guided>
void score_difference_careful(const Block<T>& block, BlockSums& sums) {
  using V = typename Group<T>::V;
  using M = typename Group<T>::M;
  const Block<T> b = block;
  Sum squares, absolute;
  Count<compute_t<T>, kMultiple<T>> bad;
  const V inverse = V::all(b.inverse);
  for_each_group(b, nullptr, [&](int64_t i, int valid) FD_ALWAYS_INLINE {
    const Group<T> group{b, i, valid};
    V g = group.row(b.k_rows, b.k) * (group.template at<Reads::last>(b.fake) - group.template teacher<guided>());
    const M on = group.on(), finite = g.finite();
    bad.add(on & ~finite);
    g = g.where(b.zero_nonfinite ? on & finite : on);
    absolute.add(g.abs());
    squares.add_square(g);
    group.template put<true>(b.d_x, g * inverse);
  });
  sums.squares += squares.total(), sums.absolute += absolute.total(), sums.bad += bad.total();
}

template <class T, bool guided>
void score_difference_of(const Block<T>& b, BlockSums& sums) {
  const bool in_place = b.d_x != nullptr && (b.d_x == b.fake || b.d_x == b.teacher || b.d_x == b.uncond);
  if (b.mask == nullptr && !b.zero_nonfinite && !b.stats && !in_place) {
    BlockSums tried = sums;
    if (score_difference_plain<T, guided>(b, tried)) {
      sums = tried;
      return;
    }
  }
  score_difference_careful<T, guided>(b, sums);
}

template <class T>
void score_difference(const Block<T>& b, BlockSums& sums) {
  b.uncond == nullptr ? score_difference_of<T, false>(b, sums) : score_difference_of<T, true>(b, sums);
  if (b.stream) fence_streams();
}

// With D = T - F, E = T - x:  term = k D (E - alpha D)
template <class T, bool careful>
void score_identity_of(const Block<T>& block, BlockSums& sums) {
  using V = typename Group<T>::V;
  using M = typename Group<T>::M;
  const Block<T> b = block;
  Sum terms, squares, absolute;
  Count<compute_t<T>, kMultiple<T>> bad;
  const V zero = V::all(0), inverse = V::all(b.inverse), alpha = V::all(b.identity_alpha), two_alpha = alpha + alpha;
  for_each_group(b, nullptr, [&](int64_t i, int valid) FD_ALWAYS_INLINE {
    const Group<T> group{b, i, valid};
    const V t = group.at(b.teacher), d = t - group.at(b.fake), e = t - group.at(b.x);
    const V k = group.row(b.k_rows, b.k), kd = k * d;
    V term = kd * (e - alpha * d);
    V d_x = zero - kd;                          // d term / dx = -k D
    V d_fake = zero - k * (e - two_alpha * d);  // d term / dF = -k (E - 2 alpha D)
    V d_teacher = kd - d_fake;                  // d term / dT = k (D + E - 2 alpha D)
    if constexpr (careful) {
      const M on = group.on();
      const M finite = term.finite() & d_x.finite() & d_teacher.finite() & d_fake.finite();
      bad.add(on & ~finite);
      const M kept = b.zero_nonfinite ? on & finite : on;
      term = term.where(kept), d_x = d_x.where(kept), d_teacher = d_teacher.where(kept), d_fake = d_fake.where(kept);
      squares.add_square(d_x);
      absolute.add(d_x.abs());
    }
    terms.add(term);
    group.template put<true>(b.d_x, d_x * inverse);
    group.template put<true>(b.d_teacher, d_teacher * inverse);
    group.template put<true>(b.d_fake, d_fake * inverse);
  });
  sums.terms += terms.total(), sums.squares += squares.total(), sums.absolute += absolute.total();
  sums.bad += bad.total();
}

template <class T>
void score_identity(const Block<T>& b, BlockSums& sums) {
  const bool careful = b.mask != nullptr || b.zero_nonfinite || b.stats;
  careful ? score_identity_of<T, true>(b, sums) : score_identity_of<T, false>(b, sums);
  if (b.stream) fence_streams();
}

template <class T>
constexpr TypedKernels<T> typed() {
  return {distance<T, Reads::last>, distance<T, Reads::again>, largest<T>, score_difference<T>, score_identity<T>};
}

template <class From, class To>
void convert(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  // Those of bfloat16 the compiler vectorizes.
  if constexpr (!std::is_same_v<From, bfloat16> && !std::is_same_v<To, bfloat16>)
    for (; i + kLanes <= n; i += kLanes) store<true>(to + i, load(from + i), false);
  for (; i < n; ++i) fdistill::store(to_float(from[i]), to[i]);
}

template <class T>
void scale(const T* from, T* to, float factor, int64_t n) {
  const auto times = Group<T>::V::all(factor);
  int64_t i = 0;
  for (; i + kGroup<T> <= n; i += kGroup<T>) store<true>(to + i, load(from + i) * times, false);
  for (; i < n; ++i) fdistill::store(to_float(from[i]) * factor, to[i]);
}

template <class T>
constexpr Conversion<T> conversion() {
  return {convert<T, float>, convert<float, T>, scale<T>};
}

#define FD_STRING_OF(name) #name
#define FD_STRING(name) FD_STRING_OF(name)
constexpr Kernels kTable = {FD_STRING(FD_ISA), typed<float>(),         typed<double>(),      typed<bfloat16>(),
                            typed<float16>(),  conversion<bfloat16>(), conversion<float16>()};

}  // namespace

const Kernels& kernels() { return kTable; }

}  // namespace fdistill::FD_ISA
