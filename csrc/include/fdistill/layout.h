// How the operands of a call lie in memory: one iteration order for all of them, found once per call.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace fdistill {

constexpr int kMaxDims = 64;  // PyTorch's own limit

// A tensor as the caller describes it. Strides are in elements; dimensions beyond `dims` have stride 0, which is how a weight
// [B] or [B, F] stands beside x [B, F, C, H, W].
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int dims = 0;
  int64_t strides[kMaxDims];

  explicit operator bool() const { return data != nullptr; }
  int64_t stride(int d) const { return d < dims ? strides[d] : 0; }
};

// The dimensions of one sample, outermost first, ordered by the strides of a leading operand and merged wherever every
// operand allows it.
template <int operands>
struct Layout {
  int64_t batch = 0, elements = 1;  // samples; elements of one sample
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[operands][kMaxDims];
  int64_t batch_stride[operands];

  Layout(int x_dims, const int64_t* shape, const Tensor* tensors, const int* leaders, int n_leaders) {
    batch = shape[0];
    int order[kMaxDims], n = 0;
    for (int d = 1; d < x_dims; ++d) {
      elements *= shape[d];
      if (shape[d] != 1) order[n++] = d;
    }
    const auto key = [&](int d) {  // an expanded operand says nothing about the order
      for (int i = 0; i < n_leaders; ++i)
        if (tensors[leaders[i]] && tensors[leaders[i]].stride(d) != 0) return tensors[leaders[i]].stride(d);
      return int64_t{0};
    };
    std::stable_sort(order, order + n, [&](int a, int b) { return key(a) > key(b); });
    for (int o = 0; o < operands; ++o) batch_stride[o] = tensors[o] ? tensors[o].stride(0) : 0;
    for (int i = 0; i < n; ++i) {
      const int d = order[i];
      bool merges = dims > 0;
      for (int o = 0; merges && o < operands; ++o)
        merges = !tensors[o] || stride[o][dims - 1] == tensors[o].stride(d) * shape[d];
      const int to = merges ? dims - 1 : dims++;
      size[to] = merges ? size[to] * shape[d] : shape[d];
      for (int o = 0; o < operands; ++o) stride[o][to] = tensors[o] ? tensors[o].stride(d) : 0;
    }
    if (dims == 0) {  // one element: dense for whoever asks
      dims = 1, size[0] = 1;
      for (int o = 0; o < operands; ++o) stride[o][0] = tensors[o].dims == x_dims ? 1 : 0;
    }
  }

  int64_t inner() const { return size[dims - 1]; }
  int64_t inner_stride(int o) const { return stride[o][dims - 1]; }

  // Elements from position `at` of a sample to the end of its innermost row.
  int64_t run(int64_t at) const { return inner() - at % inner(); }

  int64_t offset(int o, int64_t b, int64_t at) const {
    int64_t result = b * batch_stride[o];
    for (int d = dims - 1; d > 0; --d) {
      result += at % size[d] * stride[o][d];
      at /= size[d];
    }
    return result + at * stride[o][0];
  }

  bool constant_in_sample(int o) const {
    return std::all_of(stride[o], stride[o] + dims, [](int64_t s) { return s == 0; });
  }

  // Calls visit(offset, stride, count) for each innermost row of n elements from position `at` of sample b.
  template <class Visit>
  void for_each_run(int o, int64_t b, int64_t at, int64_t n, Visit&& visit) const {
    int64_t index[kMaxDims];
    int64_t rest = at, position = b * batch_stride[o];
    for (int d = dims - 1; d >= 0; --d) {
      index[d] = d > 0 ? rest % size[d] : rest;
      rest /= size[d];
      position += index[d] * stride[o][d];
    }
    while (true) {
      const int64_t count = std::min(n, inner() - index[dims - 1]);
      visit(position, inner_stride(o), count);
      n -= count;
      if (n == 0) return;
      position -= index[dims - 1] * inner_stride(o);
      index[dims - 1] = 0;
      for (int d = dims - 2; d >= 0; --d) {
        position += stride[o][d];
        if (++index[d] < size[d] || d == 0) break;
        position -= size[d] * stride[o][d];
        index[d] = 0;
      }
    }
  }
};

}  // namespace fdistill
