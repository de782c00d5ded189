// Tasks 0, 1, ... of which each thread has a share of its own, all in a row: it takes them from the
// front, so that it reads on where it stopped. One that has none left takes those at the back of
// the others.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace leankv {

class Shares {
 public:
  // Share i is tasks [ends[i - 1], ends[i]), from 0.
  explicit Shares(const std::vector<int>& ends) : shares_(ends.size()) {
    for (uint64_t i = 0, first = 0; i < ends.size(); first = ends[i++]) {
      shares_[i].left = first | static_cast<uint64_t>(ends[i]) << 32;
    }
  }

  int count() const { return static_cast<int>(shares_.size()); }

  // The next task of whoever has share `own`; -1 if none is left anywhere.
  int take(int own) {
    for (int i = 0; i < count(); ++i) {
      auto& left = shares_[(own + i) % count()].left;
      uint64_t now = left;
      while (static_cast<uint32_t>(now) < now >> 32) {
        if (left.compare_exchange_weak(now, i == 0 ? now + 1 : now - (uint64_t{1} << 32))) {
          return static_cast<int>(i == 0 ? static_cast<uint32_t>(now) : (now >> 32) - 1);
        }
      }
    }
    return -1;
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t>
        left;  // the first task in the low half, the one behind the last in the other
  };
  std::vector<Share> shares_;
};

}  // namespace leankv
