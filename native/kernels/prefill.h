// Prefill attention of up to kQueryTile rows of one head: online softmax over tiles of its tokens.
//
// Lanes are query rows, for the scores and for the output, so that no vector is ever transposed or
// summed over its lanes: keys and values are broadcast, as they lie in memory.
#pragma once

namespace leankv::LEANKV_ISA {

constexpr int kRowVectors = 2;
constexpr int kRowLanes = kRowVectors * W;             // rows of a block
constexpr int kColumns = kAccumulators / kRowVectors;  // keys or channels at a time
static_assert(kKeyTile % kColumns == 0 && kTile % kColumns == 0 && kQueryTile % kRowLanes == 0);

// to[j][lane] = begin(j, vector) + sum over i < n of x[i * I + j * J] * y[i][lane], j < kColumns.
template <int I, int J, class Begin>
LEANKV_INLINE void outer_products(const float* x, const float* y, int n, float* to, Begin&& begin) {
  vf sums[kColumns][kRowVectors];
  unroll<kColumns>([&](auto j) LEANKV_LAMBDA {
    unroll<kRowVectors>([&](auto v) LEANKV_LAMBDA { sums[j][v] = begin(j, v); });
  });
  for (int i = 0; i < n; ++i, x += I, y += kRowLanes) {
    vf rows[kRowVectors];
    unroll<kRowVectors>([&](auto v) LEANKV_LAMBDA { rows[v] = load(y + v * W); });
    unroll<kColumns>([&](auto j) LEANKV_LAMBDA {
      const vf factor = splat(x[j * J]);
      unroll<kRowVectors>([&](auto v) LEANKV_LAMBDA { add_product(sums[j][v], rows[v], factor); });
    });
  }
  unroll<kColumns>([&](auto j) LEANKV_LAMBDA {
    unroll<kRowVectors>([&](auto v)
                            LEANKV_LAMBDA { store(to + j * kRowLanes + v * W, sums[j][v]); });
  });
}

// The block's scores of n keys, and of what follows them up to a multiple of kColumns.
inline void score_keys(PrefillTile& tile, const float* queries, int n, int dim) {
  for (int t = 0; t < n; t += kColumns) {
    outer_products<1, kTileStride>(tile.keys + t * kTileStride, queries, dim,
                                   tile.scores + t * kRowLanes,
                                   [](int, int) LEANKV_LAMBDA { return vf{}; });
  }
}

// out = out * factors + probabilities * values.
inline void add_values(const PrefillTile& tile, const vf* factors, int n, int dim, float* out) {
  for (int c = 0; c < dim; c += kColumns) {
    float* to = out + c * kRowLanes;
    outer_products<kTileStride, 1>(
        tile.values + c, tile.scores, n, to,
        [&](int j, int v) LEANKV_LAMBDA { return load(to + j * kRowLanes + v * W) * factors[v]; });
  }
}

// Scores of n keys -> probabilities relative to the new maximum of each row; `factors` is what the
// change of the maximum does to everything before. Masked: `seen` says how many tokens a row sees.
template <bool Masked>
void weigh_keys(PrefillTile& tile, const int32_t* seen, int n, float* max, float* sum,
                vf* factors) {
  unroll<kRowVectors>([&](auto v) LEANKV_LAMBDA {
    const vi limit = load<vi>(seen + v * W);
    const auto visible = [&](int t) LEANKV_LAMBDA { return limit > vi{} + tile.positions[t]; };
    float* scores = tile.scores + v * W;
    const vf before = load(max + v * W);
    vf top = before, total{};
    for (int t = 0; t < n; ++t) {
      const vf score = load(scores + t * kRowLanes);
      top = vmax(top, Masked ? (visible(t) ? score : splat(kLowest)) : score);
    }
    for (int t = 0; t < n; ++t) {
      vf p = exp2_negative(load(scores + t * kRowLanes) - top);
      if constexpr (Masked) p = visible(t) ? p : vf{};
      total += p;
      store(scores + t * kRowLanes, p);
    }
    factors[v] = exp2_negative(before - top);
    store(max + v * W, top);
    store(sum + v * W, load(sum + v * W) * factors[v] + total);
  });
}

// The next tokens of a head from `at` on, kKeyTile of them if as many come before `end`; returns
// how many.
inline int take_keys(const PrefillArgs& a, int head, int end, int& at, PrefillTile& tile) {
  const bool* present = a.present ? a.present + int64_t{head} * a.tokens : nullptr;
  int n = 0;
  for (; at < end && n < kKeyTile; ++at) {
    if (present && !present[at]) continue;
    read(a.k, head, at, 1, a.k_dim, tile.keys + n * kTileStride);
    read(a.v, head, at, 1, a.v_dim, tile.values + n * kTileStride);
    tile.positions[n++] = at;
  }
  for (int t = n; t % kColumns; ++t) {  // keys that are scored and then left out
    std::memset(tile.keys + t * kTileStride, 0, sizeof(float) * a.k_dim);
  }
  return n;
}

// See Kernels::prefill.
inline void prefill(const PrefillArgs& a, int head, PrefillTile& tile) {
  const int blocks = (tile.rows + kRowLanes - 1) / kRowLanes, last = tile.first + tile.rows - 1;
  std::memset(tile.out, 0, sizeof(float) * blocks * kRowLanes * a.v_dim);
  int32_t seen[kQueryTile];  // rising
  for (int r = 0; r < blocks * kRowLanes; ++r) {
    seen[r] = a.seen(tile.first + r < last ? tile.first + r : last);
  }
  const int end = a.seen(last);
  for (int at = 0; at < end;) {
    const int n = take_keys(a, head, end, at, tile);
    for (int b = 0; b < blocks && n; ++b) {
      const int row = b * kRowLanes;
      const int32_t* own = seen + row;
      if (tile.positions[0] >= own[kRowLanes - 1]) continue;  // none of them is seen
      score_keys(tile, tile.queries + row * a.k_dim, n, a.k_dim);
      vf factors[kRowVectors];
      const auto weigh = tile.positions[n - 1] < own[0] ? weigh_keys<false> : weigh_keys<true>;
      weigh(tile, own, n, tile.max + row, tile.sum + row, factors);
      add_values(tile, factors, n, a.v_dim, tile.out + row * a.v_dim);
    }
  }
}

}  // namespace leankv::LEANKV_ISA
