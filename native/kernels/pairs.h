// The loop of tile.h in products of int16, for processors that do two of them, and their sum, at
// the cost of one of floats.
//
// Pair i of a lane's 32 codes, or of the 32 factors that they are multiplied with, is numbers j and
// j + 4 with j = 8 * (i / 4) + i % 4: an int16 each, in a lane of 32 bits. Levels are rounded as
// Cubic::fixed says, factors to multiples of a step of their row: by at most 2^-16 of the largest
// of a rotated query, which itself errs by 2^-12 (fp16) or 2^-9 (bf16) of each, and by 2^-16 of the
// largest probability, or 2^-14 where they are all alike.
#pragma once

namespace leankv::LEANKV_ISA {

constexpr float kMostOfPair = 32766;
// Of a tile's 32 factors, without their signs: their products with the largest level stay below
// 2^31, and rounding adds at most 16.
constexpr float kMostOfTile = 387000;

template <int B>
constexpr bool kSumsFit = (kMostOfTile + 16) * fixed_level<B>((1 << B) - 1) < 0x1p31;
static_assert(kSumsFit<2> && kSumsFit<3> && kSumsFit<4>);

// The smallest step that a query can have.
inline float step_of_query(const float* row, int dim) {
  vi top{};  // as integers, because then NaN is more than any number
  float most_of_tile = 0;
  for (int c = 0; c < dim; c += kTile) {
    vf total{};
    for (int i = c; i < c + kTile; i += W) {
      const vi x = (vi)load(row + i) & 0x7FFFFFFF;
      top = x > top ? x : top;
      total += (vf)x;
    }
    const float of_tile = sum(total);
    most_of_tile = of_tile > most_of_tile ? of_tile : most_of_tile;
  }
  const float one = __builtin_bit_cast(float, max(top)) * (1 / kMostOfPair);
  const float all = most_of_tile * (1 / kMostOfTile);
  return all > one ? all : one;
}

// For 32 probabilities: their sum is at most W times that of the largest lane, which is found with
// the largest of them at once.
LEANKV_INLINE float step_of_weights(const float* row) {
  vi top{};
  vf total{};
  unroll<NV>([&](auto n) LEANKV_LAMBDA {
    const vi x = (vi)load(row + n * W) & 0x7FFFFFFF;
    top = x > top ? x : top;
    total += (vf)x;
  });
  const vf step = vmax(total * (W / kMostOfTile), (vf)top * (1 / kMostOfPair));  // NaN if top is
  return __builtin_bit_cast(float, max((vi)step));
}

// 32 factors -> their pairs.
LEANKV_INLINE void pack_pairs(const float* row, float step, int32_t* pairs) {
  using v4 = int32_t __attribute__((vector_size(16)));
  const float inverse = step > 1e-35f ? 1 / step : 0.0f;
  alignas(64) float rounded[kTile];
  for (int i = 0; i < kTile; i += W) store(rounded + i, load(row + i) * inverse + kWhole);
  for (int i = 0; i < kPairs; i += 4) {
    const v4 first = load<v4>(rounded + 2 * i), second = load<v4>(rounded + 2 * i + 4);
    store(pairs + i, (first & 0xFFFF) | (second << 16));
  }
}

// n pairs -> [n, 2 * W], each once for every lane: to read them so costs less than to repeat them.
LEANKV_INLINE void repeat_pairs(const int32_t* pairs, int n, int16_t* to) {
  asm("" : : : "memory");  // GCC would shuffle where it can load
  for (int i = 0; i < n; ++i) store(to + i * 2 * W, pairs[i] + vi{});
}

// As tile(). pairs: [tiles, R, kPairs, 2 * W]; steps: [R].
template <int B, int R>
void pair_tile(const Tiles& tiles, const int16_t* pairs, const float* steps, float* acc,
               int stride) {
  const PairLevels<B> levels;
  const uint32_t* words = tiles.words;
  for (int t = 0; t < tiles.count; ++t, words += kTile * B, pairs += R * kTile * W) {
    for (int lane = 0; lane < kTile; lane += W) {
      fetch_ahead<B>(words + tiles.ahead, lane, W);
      vi sums[R] = {};
      unroll<PairLevels<B>::kRows>([&](auto k) LEANKV_LAMBDA {
        levels.template row<k>(words + lane, [&](auto i, vs pair) LEANKV_LAMBDA {
          unroll<R>([&](auto r) LEANKV_LAMBDA {
            add_products(sums[r], pair, pairs + (r * kPairs + i) * 2 * W);
          });
        });
      });
      unroll<R>([&](auto r) LEANKV_LAMBDA {
        float* to = acc + r * stride + lane;
        store(to, load(to) + to_float(sums[r]) * (steps[r] * (1 / Cubic<B>::fixed)));
      });
    }
  }
}

using PairTileFn = void (*)(const Tiles&, const int16_t*, const float*, float*, int);

template <int B>
LEANKV_INLINE PairTileFn pair_tile_rows(int rows) {
  PairTileFn found = nullptr;
  with_rows(rows, [&](auto r) LEANKV_LAMBDA { found = pair_tile<B, r>; });
  return found;
}

// The loop for groups of 2, 3 or 4 bits and 1 to kRowChunk rows.
LEANKV_INLINE PairTileFn pair_tile_for(int bits, int rows) {
  switch (bits) {
    case 2: return pair_tile_rows<2>(rows);
    case 3: return pair_tile_rows<3>(rows);
    default: return pair_tile_rows<4>(rows);
  }
}

}  // namespace leankv::LEANKV_ISA
