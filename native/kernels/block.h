// The tiles of one block: scores from its keys, output from its values.
#pragma once

namespace leankv::LEANKV_ISA {

// What codes are multiplied with, by tile and query row.
struct Factors {
  const float* x = nullptr;        // [tile][rows][32]
  const int16_t* pairs = nullptr;  // the same as pairs, or null; see pairs.h
  const float* steps = nullptr;    // [rows], of the pairs
};

// acc [rows] at a distance of `stride` += tiles of `bits` bits * factors from tile `first` on.
LEANKV_INLINE void add_tiles(const uint32_t* words, int bits, int tiles, int rows, const Factors& factors,
                             int first, float* acc, int stride) {
  if (!bits) return;
  const int at = first * rows * kTile;
#ifdef LEANKV_PAIRS
  if (factors.pairs && bits < 8) {
    pair_tile_for(bits, rows)(words, tiles, factors.pairs + at * W, factors.steps, acc, stride);
    return;
  }
#endif
  tile_for(bits, rows)(words, tiles, factors.x + at, acc, stride);
}

// Words that are read soon. The hardware finds what lies ahead by itself, but stops at the end of a page,
// and a block is about as long as one. A part at a time: a processor keeps track of a few lines only.
struct Prefetch {
  const uint32_t* words;
  int n;

  LEANKV_INLINE void part(int i, int parts) const {
    for (int at = i * n / parts; at < (i + 1) * n / parts; at += 16) __builtin_prefetch(words + at);
  }
};

// Scores of a block: a tile of factors for each channel group, acc [rows][32]. Returns the words behind
// the keys.
LEANKV_INLINE const uint32_t* key_tiles(const Side& side, const uint32_t* words, int rows,
                                        const Factors& factors, float* acc) {
  for (int c = 0; c < side.groups;) {
    const int bits = side.bits[c];
    int run = 1;
    while (c + run < side.groups && side.bits[c + run] == bits) ++run;
    add_tiles(words, bits, run, rows, factors, c, acc, kTile);
    words += kTile * bits * run;
    c += run;
  }
  return words;
}

// Output of a block: one tile of factors, acc [rows][dim].
LEANKV_INLINE void value_tiles(const Side& side, const uint32_t* words, int rows, const Factors& factors,
                               float* acc, const Prefetch& next) {
  for (int c = 0; c < side.groups; ++c) {
    next.part(c, side.groups);
    add_tiles(words, side.bits[c], 1, rows, factors, 0, acc + c * kTile, side.dim());
    words += kTile * side.bits[c];
  }
}

}  // namespace leankv::LEANKV_ISA
