// The arithmetic of the losses over a block of elements. Compiled once per instruction set (FD_ISA names it), without
// contraction to fused multiply-adds, so that every set gives the same bits.
#include "kernels.h"

#include "simd.h"

namespace fdistill::FD_ISA {
namespace {

// Operands of 16 elements from a block, starting at i; a partial group at the end is padded with zeros.
template <class T>
struct Group {
  const Block<T>& b;
  int64_t i;
  int valid;
  using C = compute_t<T>;
  using V = Lanes<C>;

  V at(const T* p) const {
    if (valid == kLanes) return load(p + i);
    T padded[kLanes] = {};
    for (int j = 0; j < valid; ++j) padded[j] = p[i + j];
    return load(padded);
  }
  V row(const C* rows, C value) const {
    if (rows == nullptr) return V::all(value);
    if (valid == kLanes) return load(rows + i);
    C padded[kLanes] = {};
    for (int j = 0; j < valid; ++j) padded[j] = rows[i + j];
    return load(padded);
  }
  Mask<C> on() const {
    if (valid == kLanes) return b.mask == nullptr ? Mask<C>::all() : Mask<C>::of(b.mask + i);
    uint8_t bytes[kLanes] = {};
    for (int j = 0; j < valid; ++j) bytes[j] = b.mask == nullptr || b.mask[i + j];
    return Mask<C>::of(bytes);
  }
  void put(T* p, const V& v) const {
    if (p == nullptr) return;
    if (valid == kLanes) return store(p + i, v, b.stream);
    T padded[kLanes];
    store(padded, v, false);
    for (int j = 0; j < valid; ++j) p[i + j] = padded[j];
  }
  template <bool guided>
  V teacher() const {  // as predicted: T = uncond + s (teacher - uncond)
    if constexpr (!guided) return at(b.teacher);
    const V u = at(b.uncond);
    return u + V::all(b.guidance) * (at(b.teacher) - u);
  }
};

// Calls body for each group of 16: body<false> on full groups where nothing needs a mask, body<true> otherwise.
template <class T, class Body>
void for_each_group(const Block<T>& b, bool masked, Body&& body) {
  const int64_t full = b.n - b.n % kLanes;
  if (masked)
    for (int64_t i = 0; i < full; i += kLanes) body(Group<T>{b, i, kLanes}, std::true_type{});
  else
    for (int64_t i = 0; i < full; i += kLanes) body(Group<T>{b, i, kLanes}, std::false_type{});
  if (full < b.n) body(Group<T>{b, full, static_cast<int>(b.n - full)}, std::true_type{});
}

// sum |x - T|,  T = a x_t + c (guided teacher)
template <class T, bool guided, bool converted>
double distance_of(const Block<T>& b) {
  Sum sum;
  const auto body = [&](const Group<T>& g, auto) __attribute__((always_inline)) {
    auto t = g.template teacher<guided>();
    if constexpr (converted) t = g.row(b.a_rows, b.a) * g.at(b.x_t) + g.row(b.c_rows, b.c) * t;
    sum.add((g.at(b.x) - t).abs());
  };
  for_each_group(b, false, body);
  return sum.total();
}

template <class T>
double distance(const Block<T>& b) {
  const bool guided = b.uncond != nullptr, converted = b.x_t != nullptr;
  if (guided) return converted ? distance_of<T, true, true>(b) : distance_of<T, true, false>(b);
  return converted ? distance_of<T, false, true>(b) : distance_of<T, false, false>(b);
}

// g = k (fake - teacher),  k = w c / (n_b + eps)
template <class T, bool guided>
void score_difference_of(const Block<T>& b, BlockSums& sums) {
  using C = compute_t<T>;
  using V = Lanes<C>;
  Sum squares, absolute;
  Count<C> bad;
  const V inverse = V::all(b.inverse);
  const auto body = [&](const Group<T>& group, auto careful) __attribute__((always_inline)) {
    V g = group.row(b.k_rows, b.k) * (group.at(b.fake) - group.template teacher<guided>());
    if constexpr (careful.value) {
      const Mask<C> on = group.on(), finite = g.finite();
      if (b.stats) bad.add(on & ~finite);
      g = g.where(b.zero_nonfinite ? on & finite : on);
      if (b.stats) absolute.add(g.abs());
    }
    const Lanes<double> wide = widen(g);
    squares.add(wide * wide);
    group.put(b.d_x, g * inverse);
  };
  for_each_group(b, b.mask != nullptr || b.zero_nonfinite || b.stats, body);
  sums.squares += squares.total();
  sums.absolute += absolute.total();
  sums.bad += bad.total();
}

template <class T>
void score_difference(const Block<T>& b, BlockSums& sums) {
  b.uncond == nullptr ? score_difference_of<T, false>(b, sums) : score_difference_of<T, true>(b, sums);
  if (b.stream) fence_streams();
}

// With D = T - F, E = T - x:  term = k D (E - alpha D)
template <class T>
void score_identity(const Block<T>& b, BlockSums& sums) {
  using C = compute_t<T>;
  using V = Lanes<C>;
  Sum terms, squares, absolute;
  Count<C> bad;
  const V inverse = V::all(b.inverse), alpha = V::all(b.alpha), two_alpha = V::all(2 * b.alpha);
  const auto body = [&](const Group<T>& group, auto careful) __attribute__((always_inline)) {
    const V t = group.at(b.teacher), d = t - group.at(b.fake), e = t - group.at(b.x);
    const V k = group.row(b.k_rows, b.k), kd = k * d;
    V term = kd * (e - alpha * d);
    V d_x = V::all(0) - kd;                     // d term / dx = -k D
    V d_fake = V::all(0) - k * (e - two_alpha * d);  // d term / dF = -k (E - 2 alpha D)
    V d_teacher = kd - d_fake;                  // d term / dT = k (D + E - 2 alpha D)
    if constexpr (careful.value) {
      const Mask<C> on = group.on();
      const Mask<C> finite = term.finite() & d_x.finite() & d_teacher.finite() & d_fake.finite();
      if (b.stats) bad.add(on & ~finite);
      const Mask<C> kept = b.zero_nonfinite ? on & finite : on;
      term = term.where(kept), d_x = d_x.where(kept), d_teacher = d_teacher.where(kept), d_fake = d_fake.where(kept);
      if (b.stats) {
        const Lanes<double> wide = widen(d_x);
        squares.add(wide * wide);
        absolute.add(d_x.abs());
      }
    }
    terms.add(term);
    group.put(b.d_x, d_x * inverse);
    group.put(b.d_teacher, d_teacher * inverse);
    group.put(b.d_fake, d_fake * inverse);
  };
  for_each_group(b, b.mask != nullptr || b.zero_nonfinite || b.stats, body);
  sums.terms += terms.total();
  sums.squares += squares.total();
  sums.absolute += absolute.total();
  sums.bad += bad.total();
  if (b.stream) fence_streams();
}

template <class T>
constexpr TypedKernels<T> typed() {
  return {distance<T>, score_difference<T>, score_identity<T>};
}

#define FD_STRING_OF(name) #name
#define FD_STRING(name) FD_STRING_OF(name)
constexpr Kernels kTable = {FD_STRING(FD_ISA), typed<float>(), typed<double>(), typed<bfloat16>(), typed<float16>()};

}  // namespace

const Kernels& kernels() { return kTable; }

}  // namespace fdistill::FD_ISA
