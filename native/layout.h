// The bit layout of a block, in the words of leankv_mlx/codec/packing.py.
//
// A block is 32 slots of one head in one format: k_dim / 32 key tiles, v_dim / 32 value tiles, and
// one row of 32 scale words. A tile is 32 x 32 codes; at B bits it is B rows of 32 words, word j of
// lane l at j * 32 + l, and each lane owns 32 codes i = 0..31:
//   key tile of channel group c:   lane = slot, i = channel of the group
//   value tile of channel group c: lane = channel of the group, i = slot
// B in {2, 4, 8} is a field of B bits: row i / (32 / B), shift B * (i % (32 / B)). B = 3 is a 2-bit
// field in rows 0 and 1 and a row 2 of high bits, at bit
// 8 * ((i & 15) >> 2) + 4 * (i >> 4) + (i & 3).
//
// Scales: slot l's word has the fp16 scale of the key in its low half, of the value in its high
// half. A group of 0 bits stores nothing and decodes to 0.
#pragma once

#include <cstdint>

// Forced, because the kernels' translation units must not leave copies of shared functions behind
// that the linker could pick for code that runs on older processors.
// A sanitizer's build is a program of its own, and instrumenting such functions takes gigabytes.
#ifdef LEANKV_SANITIZED
#define LEANKV_INLINE inline
#define LEANKV_LAMBDA
#else
#define LEANKV_INLINE inline __attribute__((always_inline))
#define LEANKV_LAMBDA __attribute__((always_inline))
#endif

namespace leankv {

constexpr int kTile = 32;      // slots of a block, channels of a group, lanes of a tile
constexpr int kMaxGroups = 8;  // head_dim up to 256
constexpr int kMaxDim = kTile * kMaxGroups;
constexpr int kMaxNew = 8;  // new tokens of a decode step

LEANKV_INLINE constexpr int field_bits(int bits) { return bits == 3 ? 2 : bits; }
LEANKV_INLINE constexpr int codes_per_word(int bits) { return 32 / field_bits(bits); }
LEANKV_INLINE constexpr int field_row(int bits, int i) { return i / codes_per_word(bits); }
LEANKV_INLINE constexpr int field_shift(int bits, int i) {
  return field_bits(bits) * (i % codes_per_word(bits));
}
LEANKV_INLINE constexpr int high_bit(int i) { return 8 * ((i & 15) >> 2) + 4 * (i >> 4) + (i & 3); }

LEANKV_INLINE constexpr int blocks_of(int slots) { return (slots + kTile - 1) / kTile; }

// Bits of each channel group of the keys or of the values.
struct Side {
  int groups = 0;
  uint8_t bits[kMaxGroups] = {};

  LEANKV_INLINE int dim() const { return kTile * groups; }
  LEANKV_INLINE int words() const {
    int sum = 0;
    for (int c = 0; c < groups; ++c) sum += bits[c];
    return kTile * sum;
  }
};

struct Format {
  Side k, v;

  LEANKV_INLINE int words() const { return k.words() + v.words() + kTile; }
};

}  // namespace leankv
