// Evaluated MLX arrays as the plain memory that the kernels take.
#pragma once

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/common/utils.h"
#include "primitives.h"

namespace leankv {

inline Type type_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return Type::f32;
  if (a.dtype() == mx::float16) return Type::f16;
  if (a.dtype() == mx::bfloat16) return Type::bf16;
  throw std::invalid_argument("expected float32, float16 or bfloat16.");
}

// An input in row order: the array's own memory where it can be, else a copy.
class Dense {
 public:
  explicit Dense(const mx::array& a) : data_(a.data<char>()) {
    if (a.flags().row_contiguous) return;
    copy_.reset(new char[a.nbytes()]);
    for (size_t i = 0; i < a.size(); ++i) {
      const char* from = data_ + mx::elem_to_loc(static_cast<int>(i), a) * a.itemsize();
      std::memcpy(copy_.get() + i * a.itemsize(), from, a.itemsize());
    }
    data_ = copy_.get();
  }

  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  std::unique_ptr<char[]> copy_;
  const char* data_;
};

// Rows [H, T, dim]: any strides but between channels.
class Rows {
 public:
  explicit Rows(const mx::array& a) {
    vectors_.type = type_of(a);
    if (a.shape(2) == 1 || a.strides(2) == 1) {
      vectors_.data = a.data<char>();
      vectors_.head_stride = a.strides(0);
      vectors_.row_stride = a.strides(1);
    } else {
      dense_.reset(new Dense(a));
      vectors_.data = dense_->as<char>();
      vectors_.head_stride = int64_t{a.shape(1)} * a.shape(2);
      vectors_.row_stride = a.shape(2);
    }
  }

  const Vectors& vectors() const { return vectors_; }

 private:
  std::unique_ptr<Dense> dense_;
  Vectors vectors_;
};

// Reads inputs in the order in which an operation lists them.
class Reader {
 public:
  explicit Reader(const std::vector<mx::array>& in) : in_(in) {}

  const mx::array& next() { return in_[at_++]; }

  template <class T>
  const T* dense() {
    dense_.push_back(std::make_unique<Dense>(next()));
    return dense_.back()->template as<T>();
  }

  Vectors rows() {
    rows_.push_back(std::make_unique<Rows>(next()));
    return rows_.back()->vectors();
  }

  Body body(const Format& format) {
    Body body;
    body.pool = dense<uint32_t>();
    body.width = in_[at_].shape(1);
    body.table = dense<int32_t>();
    body.lengths = dense<int32_t>();
    body.format = format;
    return body;
  }

  void rotation(Rotation& rotation, bool present) {
    if (present) rotation.signs = dense<float>();
  }

 private:
  const std::vector<mx::array>& in_;
  size_t at_ = 0;
  std::vector<std::unique_ptr<Dense>> dense_;
  std::vector<std::unique_ptr<Rows>> rows_;
};

// A new output [.., T, dim]. Allocated when the graph is scheduled, written when it runs.
inline void allocate(mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

inline Output output_of(mx::array& out) {
  return {out.data<char>(), type_of(out), int64_t{out.shape(1)} * out.shape(2), out.shape(2)};
}

}  // namespace leankv
