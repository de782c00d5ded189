// Weights from MLX's layout and back, and single rows of them. Portable: what is slow is memory.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "run.h"
#include "scratch.h"
#include "thread_pool.h"

namespace leankv {
namespace {

// Channels [32 * stretch, ..) of an output in MLX's packing: 8 codes are `bits` bytes.
class Packed {
 public:
  Packed(int inputs, int bits) : row_(int64_t{inputs} * bits / 8), bits_(bits) {}

  // f(i, code) of channel i of the stretch.
  template <class F>
  void each(const char* rows, int output, int stretch, F&& f) const {
    const char* from = rows + at(output, stretch);
    for (int i = 0; i < kStretch; i += 8, from += bits_) {
      uint64_t eight = 0;
      std::memcpy(&eight, from, bits_);
      for (int j = 0; j < 8; ++j, eight >>= bits_) f(i + j, code_of(eight));
    }
  }
  // The inverse: codes are what f(i) returns.
  template <class F>
  void put(char* rows, int output, int stretch, F&& f) const {
    char* to = rows + at(output, stretch);
    for (int i = 0; i < kStretch; i += 8, to += bits_) {
      uint64_t eight = 0;
      for (int j = 0; j < 8; ++j) eight |= uint64_t{f(i + j)} << (j * bits_);
      std::memcpy(to, &eight, bits_);
    }
  }
  uint32_t code_of(uint64_t word) const { return word & ((1u << bits_) - 1); }

 private:
  int64_t at(int output, int stretch) const { return output * row_ + stretch * 4 * bits_; }

  int64_t row_;
  int bits_;
};

// Where the codes of a tile's output are in its words.
struct Field {
  int lane, shift;

  Field(const Weight& w, int place) : lane(place % kLanes), shift(place / kLanes * w.bits) {}
};

// f(tile, outputs of it that exist, stretch, index of the stretch's first word).
template <class F>
void each_stretch(const Weight& w, F&& f) {
  parallel_for(w.tiles(), [&](int t) {
    const int outputs = std::min(w.tile(), w.outputs - t * w.tile());
    for (int s = 0; s < w.inputs / kStretch; ++s) {
      f(t, outputs, s, (int64_t{t} * w.inputs + s * kStretch) * kLanes);
    }
  });
}

}  // namespace

void run_relay(const Weight& w, const void* packed, uint32_t* codes) {
  const Packed rows(w.inputs, w.bits);
  each_stretch(w, [&](int t, int outputs, int stretch, int64_t at) {
    uint32_t words[kStretch][kLanes] = {};
    for (int p = 0; p < outputs; ++p) {
      const Field field(w, p);
      rows.each(static_cast<const char*>(packed), t * w.tile() + p, stretch,
                [&](int i, uint32_t code) { words[i][field.lane] |= code << field.shift; });
    }
    std::memcpy(codes + at, words, sizeof(words));
  });
}

void run_restore(const Weight& w, void* packed) {
  const Packed rows(w.inputs, w.bits);
  each_stretch(w, [&](int t, int outputs, int stretch, int64_t at) {
    for (int p = 0; p < outputs; ++p) {
      const Field field(w, p);
      const uint32_t* words = w.codes + at + field.lane;
      rows.put(static_cast<char*>(packed), t * w.tile() + p, stretch,
               [&](int i) { return rows.code_of(words[i * kLanes] >> field.shift); });
    }
  });
}

void run_rows(const Weight& w, const int32_t* ids, int n, const Output& out) {
  const Packed packing(w.inputs, w.bits);
  const auto one = [&](int i) {
    const int id = std::clamp(ids[i], 0, w.outputs - 1), t = id / w.tile(), p = id % w.tile();
    const Field field(w, p);
    const uint32_t* words = w.tile_codes(t) + field.lane;
    const Scratch<float> products(w.inputs), zeros(w.inputs);
    float *product = products.data.get(), *zero = zeros.data.get();
    for (int k = 0; k < w.inputs; k += w.group) {
      float scale = 0, begin = 0;
      const auto side = [&](const void* all, float* to) {
        const char* at = w.side(all, t, k / w.group) + p * size_of(w.type);
        kernels().read({.data = at, .type = w.type}, 0, 0, 1, 1, to);
      };
      side(w.scales, &scale);
      side(w.zeros, &begin);
      for (int j = k; j < k + w.group; ++j) {
        product[j] = scale * static_cast<float>(packing.code_of(words[j * kLanes] >> field.shift));
        zero[j] = begin;
      }
    }
    // MLX rounds the product to the weight's dtype before it adds.
    const Output to{.data = out.row(0, i), .type = out.type};
    kernels().write(to, 0, 0, 1, w.inputs, product);
    kernels().read({.data = to.data, .type = to.type}, 0, 0, 1, w.inputs, product);
    for (int j = 0; j < w.inputs; ++j) product[j] += zero[j];
    kernels().write(to, 0, 0, 1, w.inputs, product);
  };
  if (n > 4) return parallel_for(n, one);
  for (int i = 0; i < n; ++i) one(i);  // too little to wake a thread for
}

}  // namespace leankv
