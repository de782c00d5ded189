// Uninitialized memory, aligned to cache lines.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace leankv {

template <class T>
struct Scratch {
  explicit Scratch(size_t n)
      : data(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64)), std::free) {
    if (!data) throw std::bad_alloc();
  }
  std::unique_ptr<T, void (*)(void*)> data;
};

}  // namespace leankv
