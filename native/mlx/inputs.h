// Evaluated MLX arrays as the plain memory that the kernels take.
#pragma once

#include <cstring>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"
#include "primitives.h"

namespace leankv {

inline Type type_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return Type::f32;
  if (a.dtype() == mx::float16) return Type::f16;
  if (a.dtype() == mx::bfloat16) return Type::bf16;
  throw std::invalid_argument("expected float32, float16 or bfloat16.");
}

// Vectors [.., H, T, dim] of this memory, without gaps.
template <class V>
V without_gaps(auto* data, const mx::array& a) {
  return {.data = data,
          .type = type_of(a),
          .head_stride = int64_t{a.shape(-2)} * a.shape(-1),
          .row_stride = a.shape(-1)};
}

// Reads inputs in the order in which an operation lists them, when it is scheduled: they have
// memory by then, and what is read from it is read when the operation runs.
class Reader {
 public:
  Reader(const std::vector<mx::array>& in, mx::Stream stream) : in_(in), stream_(stream) {}

  // What comes next.
  const mx::array& next() const { return in_[at_]; }

  // In row order: the array's own memory where it can be, else that of a copy. Null if it is no
  // input.
  template <class T>
  const T* dense(bool present = true) {
    return present ? reinterpret_cast<const T*>(in_row_order(in_[at_++])) : nullptr;
  }

  // Rows [H, T, dim]: any strides but between channels.
  Vectors rows() { return batch().front(); }

  // Those of each of a batch, [B, H, T, dim]; one if there is no such axis.
  std::vector<Vectors> batch() {
    const mx::array& a = in_[at_++];
    const bool dense = a.shape(-1) == 1 || a.strides(-1) == 1;
    const int n = a.ndim() == 4 ? a.shape(0) : 1;
    Vectors first = without_gaps<Vectors>(dense ? a.data<char>() : in_row_order(a), a);
    int64_t stride = int64_t{a.shape(-3)} * first.head_stride;
    if (dense) {
      first.head_stride = a.strides(-3);
      first.row_stride = a.strides(-2);
      stride = a.ndim() == 4 ? a.strides(0) : 0;
    }
    std::vector<Vectors> all(n, first);
    for (int b = 0; b < n; ++b) {
      all[b].data = static_cast<const char*>(first.data) + b * stride * size_of(first.type);
    }
    return all;
  }

  Body body(const Format& format) {
    const mx::array& table = in_[at_ + 1];
    return {.pool = dense<uint32_t>(),  // braces are evaluated in order
            .table = dense<int32_t>(),
            .lengths = dense<int32_t>(),
            .width = table.shape(1),
            .format = format};
  }

 private:
  const char* in_row_order(const mx::array& a) {
    if (a.flags().row_contiguous) return a.data<char>();
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(a.nbytes()));
    char* to = copy.data<char>();
    auto& encoder = mx::cpu::get_command_encoder(stream_);
    encoder.add_temporary(copy);
    encoder.dispatch([from = mx::array::unsafe_weak_copy(a), to] {
      for (size_t i = 0; i < from.size(); ++i) {
        const auto at = mx::elem_to_loc(static_cast<int>(i), from) * from.itemsize();
        std::memcpy(to + i * from.itemsize(), from.data<char>() + at, from.itemsize());
      }
    });
    return to;
  }

  const std::vector<mx::array>& in_;
  mx::Stream stream_;
  size_t at_ = 0;
};

// A new output [.., T, dim]. Allocated when the graph is scheduled, written when it runs.
inline void allocate(mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

inline Output output_of(mx::array& out) { return without_gaps<Output>(out.data<char>(), out); }

// Of sequence b, if the output has an axis for them.
inline Output output_of(mx::array& out, int b) {
  Output all = output_of(out);
  all.data = all.row(b * out.shape(-3), 0);
  return all;
}

}  // namespace leankv
