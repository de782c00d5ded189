// Rows of numbers in memory, in any dtype of a model.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace leankv {

enum class Type { f32, f16, bf16 };

LEANKV_INLINE constexpr int size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Vectors [H, T, dim] with dense channels; strides in elements.
struct Vectors {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t head_stride = 0, row_stride = 0;

  LEANKV_INLINE const char* row(int head, int64_t t) const {
    return static_cast<const char*>(data) + (head * head_stride + t * row_stride) * size_of(type);
  }
};

// The same to be written.
struct Output {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t head_stride = 0, row_stride = 0;

  LEANKV_INLINE char* row(int head, int64_t t) const {
    return static_cast<char*>(data) + (head * head_stride + t * row_stride) * size_of(type);
  }
};

}  // namespace leankv
