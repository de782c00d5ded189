// The tiles of one block: scores from its keys, output from its values.
#pragma once

namespace leankv::LEANKV_ISA {

// What codes are multiplied with, by tile and query row.
struct Factors {
  const float* x = nullptr;        // [tile][rows][32]
  const int16_t* pairs = nullptr;  // the same as pairs, or null; see pairs.h
  const float* steps = nullptr;    // [rows], of the pairs
};

// acc [rows] at a distance of `stride` += these tiles * the factors from tile `first` on.
LEANKV_INLINE void add_tiles(const Tiles& tiles, int bits, int rows, const Factors& factors,
                             int first, float* acc, int stride) {
  if (!bits) return;
  const int at = first * rows * kTile;
#ifdef LEANKV_PAIRS
  if (factors.pairs && bits < 8) {
    pair_tile_for(bits, rows)(tiles, factors.pairs + at * W, factors.steps, acc, stride);
    return;
  }
#endif
  tile_for(bits, rows)(tiles, factors.x + at, acc, stride);
}

// Scores of a block: a tile of factors for each channel group, acc [rows][32]. Returns the words
// behind the keys. `ahead`: from this block to the next one.
LEANKV_INLINE const uint32_t* key_tiles(const Side& side, const uint32_t* words, int64_t ahead,
                                        int rows, const Factors& factors, float* acc) {
  for (int c = 0; c < side.groups;) {
    const int bits = side.bits[c];
    int run = 1;
    while (c + run < side.groups && side.bits[c + run] == bits) ++run;
    add_tiles({.words = words, .count = run, .ahead = ahead}, bits, rows, factors, c, acc, kTile);
    words += kTile * bits * run;
    c += run;
  }
  return words;
}

// Output of a block: one tile of factors, acc [rows][dim].
LEANKV_INLINE void value_tiles(const Side& side, const uint32_t* words, int64_t ahead, int rows,
                               const Factors& factors, float* acc) {
  for (int c = 0; c < side.groups; ++c) {
    add_tiles({.words = words, .count = 1, .ahead = ahead}, side.bits[c], rows, factors, 0,
              acc + c * kTile, side.dim());
    words += kTile * side.bits[c];
  }
}

}  // namespace leankv::LEANKV_ISA
