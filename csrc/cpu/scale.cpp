#include "scale.h"

#include <algorithm>

#include "parallel.h"

namespace fdistill {
namespace {

constexpr int64_t kPiece = 16384;      // elements that one thread takes at a time
constexpr int64_t kPerThread = 65536;  // elements below which another thread does not pay

template <class T>
void scale(const T* from, T* to, int64_t batch, int64_t elements, const float* factor, int threads,
           const Conversion<T>& rows) {
  const int64_t pieces = (elements + kPiece - 1) / kPiece, work = batch * pieces;
  const int64_t members = std::clamp<int64_t>(batch * elements / kPerThread, 1, threads);
  parallel(static_cast<int>(members), [&](Team& team) {
    for (int64_t i = work * team.rank / team.size; i < work * (team.rank + 1) / team.size; ++i) {
      const int64_t b = i / pieces, at = i % pieces * kPiece, n = std::min(kPiece, elements - at);
      rows.scale(from + b * elements + at, to + b * elements + at, factor[b], n);
    }
  });
}

}  // namespace

void scale_rows(const void* from, void* to, DType dtype, int64_t batch, int64_t elements, const float* factor,
                int threads, const Kernels& kernels) {
  const auto run = [&]<class T>(const Conversion<T>& conversion) {
    scale(static_cast<const T*>(from), static_cast<T*>(to), batch, elements, factor, threads, conversion);
  };
  dtype == DType::bf16 ? run(kernels.conversion<bfloat16>()) : run(kernels.conversion<float16>());
}

}  // namespace fdistill
