// The one inner loop: acc[r][lane] += sum over i of x[r][i] * level(code i of lane).
//
// With x = query channels and lanes = slots it makes scores, with x = probabilities and lanes =
// channels it makes the output. Each code is decoded once for up to kRowChunk query rows.
#pragma once

namespace leankv::LEANKV_ISA {

// Vectors of lanes at a time, so that the sums of R rows stay in registers.
constexpr int vectors_for(int rows) {
  int n = 1;
  while (2 * n <= NV && 2 * n * rows <= kAccumulators) n *= 2;
  return n;
}

// Sums of each row and vector, taken in turn: with fewer than 8 to 10 independent ones the latency
// of the additions is the limit.
constexpr int turns_for(int rows, int vectors) {
  int n = 1;
  while (2 * n * rows * vectors <= kAccumulators && n < 4) n *= 2;
  return n;
}

// Tiles one behind the other, whose sums add up.
struct Tiles {
  const uint32_t* words;
  int count;
  int64_t ahead;  // words from here to those that are read next: the same tiles of another block
};

constexpr int kLine = 16;  // words of a cache line

LEANKV_INLINE void fetch(const uint32_t* words, int n) {
  for (int i = 0; i < n; i += kLine) __builtin_prefetch(words + i);
}

// Fetches what lies ahead of lanes [lane, lane + n) of one tile, so that the fetches of a block are
// spread over the work on the one before: a processor keeps track of a few lines at a time only,
// and by itself it does not look beyond a page, which is about as long as a block.
template <int B>
LEANKV_INLINE void fetch_ahead(const uint32_t* ahead, int lane, int n) {
  for (int l = (lane + kLine - 1) / kLine * kLine; l < lane + n; l += kLine) {
    unroll<B>([&](auto k) LEANKV_LAMBDA { __builtin_prefetch(ahead + k * kTile + l); });
  }
}

template <int B, int R, int N>
LEANKV_INLINE void tile_lanes(const uint32_t* words, int tiles, const float* x, float* acc,
                              int stride) {
  constexpr int S = turns_for(R, N), T = kTogether<B>;
  vf sums[S][R][N] = {};
  unroll<R>([&](auto r) LEANKV_LAMBDA {
    unroll<N>([&](auto n) LEANKV_LAMBDA { sums[0][r][n] = load(acc + r * stride + n * W); });
  });
  const Levels<B> levels;
  for (; tiles > 0; --tiles, words += kTile * B, x += R * kTile) {
    unroll<kTile / T>([&](auto k) LEANKV_LAMBDA {
      vf values[T][N];
      unroll<N>([&](auto n) LEANKV_LAMBDA {
        if constexpr (T == 1) {
          values[0][n] = levels.template at<in_order<B>(k)>(words + n * W);
        } else {
          levels.template together<k>(words + n * W, n, values);
        }
      });
      unroll<T>([&](auto t) LEANKV_LAMBDA {
        constexpr int j = k * T + t, i = in_order<B>(j);
        unroll<R>([&](auto r) LEANKV_LAMBDA {
          const vf factor = splat(x[r * kTile + i]);
          unroll<N>([&](auto n)
                        LEANKV_LAMBDA { add_product(sums[j % S][r][n], values[t][n], factor); });
        });
      });
    });
  }
  unroll<R>([&](auto r) LEANKV_LAMBDA {
    unroll<N>([&](auto n) LEANKV_LAMBDA {
      vf total = sums[0][r][n];
      unroll<S - 1>([&](auto s) LEANKV_LAMBDA { total += sums[s + 1][r][n]; });
      store(acc + r * stride + n * W, total);
    });
  });
}

// x: [tiles, R, 32]; acc: R rows of 32 at a distance of `stride`.
template <int B, int R>
void tile(const Tiles& tiles, const float* x, float* acc, int stride) {
  constexpr int N = vectors_for(R);
  for (int lane = 0; lane < kTile; lane += N * W) {
    for (int t = 0; t < tiles.count; ++t) {
      fetch_ahead<B>(tiles.words + tiles.ahead + t * kTile * B, lane, N * W);
    }
    tile_lanes<B, R, N>(tiles.words + lane, tiles.count, x, acc + lane, stride);
  }
}

using TileFn = void (*)(const Tiles&, const float*, float*, int);

// f(Index<rows>).
template <class F>
LEANKV_INLINE void with_rows(int rows, F&& f) {
  unroll<kRowChunk>([&](auto r) LEANKV_LAMBDA {
    if (rows == r + 1) f(Index<r + 1>{});
  });
}

template <int B>
LEANKV_INLINE TileFn tile_rows(int rows) {
  TileFn found = nullptr;
  with_rows(rows, [&](auto r) LEANKV_LAMBDA { found = tile<B, r>; });
  return found;
}

// The loop for groups of `bits` bits and 1 to kRowChunk rows.
LEANKV_INLINE TileFn tile_for(int bits, int rows) {
  switch (bits) {
    case 2: return tile_rows<2>(rows);
    case 3: return tile_rows<3>(rows);
    case 4: return tile_rows<4>(rows);
    default: return tile_rows<8>(rows);
  }
}

}  // namespace leankv::LEANKV_ISA
