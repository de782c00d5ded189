// Rows -> blocks: centering, scale, codes, packing (leankv_mlx/codec/quantize.py).
#pragma once

namespace leankv::LEANKV_ISA {

constexpr float kLargestScale = 65504.0f;  // of fp16
constexpr int kSearchSteps = 11;           // SEARCH_FACTORS: 0.80, 0.84, ..., 1.20

// Codes of the nearest levels of x, in units of the scale; between two levels the lower one.
template <int B>
LEANKV_INLINE vu nearest(vf x) {
  static constexpr Thresholds<B> thresholds{};
  vi code{};
  unroll<(1 << B) - 1>([&](auto i) LEANKV_LAMBDA { code -= x > thresholds.at[i]; });
  return (vu)code;
}

// 255 comparisons are too many: invert the cubic by Newton's method, which converges from the
// right, and correct the guess by the midpoints on its two sides.
template <>
LEANKV_INLINE vu nearest<8>(vf x) {
  constexpr float a = Cubic<8>::a, b = Cubic<8>::b, top = 255;
  const vf y = x < 0.0f ? -x : x;
  vf guess = vmax(-splat(kMiddle<8>), -(y * (1 / a)));  // vmax(-m, -g) = -min(m, g)
  guess = -guess;
  for (int step = 0; step < 4; ++step) {
    const vf square = guess * guess;
    guess -= (guess * (a + b * square) - y) / (a + 3 * b * square);
  }
  guess = (x < 0.0f ? -guess : guess) + kMiddle<8>;
  const auto clamped = [](vf c) LEANKV_LAMBDA {
    c = vmax(c, vf{});
    return c < top ? c : splat(top);
  };
  vf c = __builtin_convertvector(__builtin_convertvector(clamped(guess) + 0.5f, vi), vf);
  const auto at = [](vf k) LEANKV_LAMBDA { return cubic<8>((vu)__builtin_convertvector(k, vi)); };
  const vf here = at(c), above = at(clamped(c + 1.0f)), below = at(clamped(c - 1.0f));
  const vf up = x > (here + above) * 0.5f ? splat(1.0f) : vf{};
  const vf down = x <= (here + below) * 0.5f ? splat(1.0f) : vf{};
  return (vu)__builtin_convertvector(clamped(c + up - down), vi);
}

// f(bits, first channel) for every group that is stored.
template <class F>
LEANKV_INLINE void each_group(const Side& side, F&& f) {
  for (int c = 0; c < side.groups; ++c) {
    switch (side.bits[c]) {
      case 2: f(Index<2>{}, c * kTile); break;
      case 3: f(Index<3>{}, c * kTile); break;
      case 4: f(Index<4>{}, c * kTile); break;
      case 8: f(Index<8>{}, c * kTile); break;
    }
  }
}

LEANKV_INLINE float fp16_round(float x) { return from_f16(to_f16(splat(x)))[0]; }

// The same scale for every lane, as the factor that brings x to units of it.
LEANKV_INLINE vf inverse(float scale) { return splat(scale > 0 ? 1.0f / scale : 0.0f); }

inline float rms_of(const Side& side, const float* x) {
  vf squares{};
  int channels = 0;
  each_group(side, [&](auto, int first) {
    channels += kTile;
    unroll<NV>([&](auto v) LEANKV_LAMBDA {
      const vf y = load(x + first + v * W);
      squares += y * y;
    });
  });
  return __builtin_sqrtf(sum(squares) / channels);
}

// Scale search: of several factors of the rms, each refined by least squares, the scale that leaves
// the smallest squared error.
inline float search_scale(const Side& side, const float* x) {
  const float rms = rms_of(side, x);
  float best = rms, best_error = __builtin_inff();
  alignas(64) float values[kMaxDim];
  for (int step = 0; step < kSearchSteps; ++step) {
    const vf to_units = inverse(static_cast<float>(0.8 + 0.04 * step) * rms);
    vf dots{}, norms{}, errors{};
    each_group(side, [&](auto bits, int first) {
      const Levels<bits> levels;
      unroll<NV>([&](auto v) LEANKV_LAMBDA {
        const vf y = load(x + first + v * W);
        const vf value = levels.of(nearest<bits>(y * to_units));
        store(values + first + v * W, value);
        dots += y * value;
        norms += value * value;
      });
    });
    const float norm = sum(norms), scale = sum(dots) / (norm > 1e-30f ? norm : 1e-30f);
    each_group(side, [&](auto, int first) {
      unroll<NV>([&](auto v) LEANKV_LAMBDA {
        const vf off = load(x + first + v * W) - scale * load(values + first + v * W);
        errors += off * off;
      });
    });
    if (const float error = sum(errors); error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

LEANKV_INLINE vh scale_as_stored(float scale) {
  return to_f16(splat(scale < 0 ? 0 : scale > kLargestScale ? kLargestScale : scale));
}

// One vector as below, channel by channel: the error of each moves the channels behind it
// (leankv_mlx/codec/shaping.py). A lane has a factor of the search; the best one is that whose
// codes cost least with the scale that is stored. With A l, l the levels, that costs no second
// pass: an error x - s l is (x - f l) + (f - s) l.
inline uint32_t encode_shaped(const Side& side, Rounding rounding, const float* x,
                              const float* shaping, uint8_t* codes) {
  constexpr int kVectors = (kSearchSteps + W - 1) / W, kLanes = kVectors * W;
  const bool search = rounding == Rounding::search;
  const int dim = side.dim();
  const float rms = rms_of(side, x), plain = from_f16(scale_as_stored(rms))[0];
  alignas(64) float scales[kLanes], targets[kMaxDim * kLanes], levels_moved[kMaxDim * kLanes];
  alignas(64) uint8_t found[kMaxDim * kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    scales[lane] = search ? static_cast<float>(0.8 + 0.04 * lane) * rms : plain;
  }
  vf scale[kVectors], to_units[kVectors], dots[kVectors] = {};
  vf off_off[kVectors] = {}, off_level[kVectors] = {}, level_level[kVectors] = {};
  float square = 0;
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = load(scales + v * W);
    to_units[v] = scale[v] > 0.0f ? 1.0f / scale[v] : vf{};
  }
  for (int i = 0; i < dim; ++i) {
    for (int v = 0; v < kVectors; ++v) store(targets + i * kLanes + v * W, splat(x[i]));
  }
  std::memset(levels_moved, 0, sizeof(float) * dim * kLanes);
  each_group(side, [&](auto bits, int first) {
    const Levels<bits> levels;
    for (int i = first; i < first + kTile; ++i) {
      const float* row = shaping + int64_t{i} * dim;
      vf errors[kVectors], level[kVectors];
      square += x[i] * x[i];
      for (int v = 0; v < kVectors; ++v) {
        const int at = i * kLanes + v * W;
        const vf target = load(targets + at);
        const vu code = nearest<bits>(target * to_units[v]);
        store(found + at, __builtin_convertvector(code, vb));
        level[v] = levels.of(code);
        errors[v] = x[i] - scale[v] * level[v];
        const vf off = target - scale[v] * level[v], moved = load(levels_moved + at) + level[v];
        dots[v] += x[i] * level[v];
        off_off[v] += row[i] * off * off;
        off_level[v] += row[i] * off * moved;
        level_level[v] += row[i] * moved * moved;
      }
      for (int j = i + 1; j < dim; ++j) {
        for (int v = 0; v < kVectors; ++v) {
          float *target = targets + j * kLanes + v * W, *sum = levels_moved + j * kLanes + v * W;
          store(target, load(target) + row[j] * errors[v]);
          store(sum, load(sum) + row[j] * level[v]);
        }
      }
    }
  });
  alignas(64) float stored[kLanes], costs[kLanes];
  for (int v = 0; v < kVectors; ++v) {
    const vf keeping = dots[v] > 0.0f ? square / dots[v] : scale[v], change = scale[v] - keeping;
    store(stored + v * W, keeping);
    store(costs + v * W, off_off[v] + change * (2.0f * off_level[v] + change * level_level[v]));
  }
  int best = 0;
  for (int lane = 1; lane < (search ? kSearchSteps : 1); ++lane) {
    if (costs[lane] < costs[best]) best = lane;
  }
  std::memset(codes, 0, dim);
  each_group(side, [&](auto, int first) {
    for (int i = first; i < first + kTile; ++i) codes[i] = found[i * kLanes + best];
  });
  return scale_as_stored(search ? stored[best] : plain)[0];
}

// One vector [dim] -> codes uint8 [dim] (0 where nothing is stored) and the bits of its fp16 scale.
inline uint32_t encode_vector(const Side& side, Rounding rounding, const float* x, uint8_t* codes) {
  const bool search = rounding == Rounding::search;
  const vh fitted = scale_as_stored(search ? search_scale(side, x) : rms_of(side, x));
  const vf unit = from_f16(fitted);
  std::memset(codes, 0, side.dim());
  vf squares{}, dots{};
  each_group(side, [&](auto bits, int first) {
    const Levels<bits> levels;
    unroll<NV>([&](auto v) LEANKV_LAMBDA {
      const vf y = load(x + first + v * W);
      const vu code = nearest<bits>(unit > 0.0f ? y / unit : vf{});
      store(codes + first + v * W, __builtin_convertvector(code, vb));
      squares += y * y;
      dots += y * levels.of(code);
    });
  });
  const float dot = sum(dots);
  return search && dot > 0 ? scale_as_stored(sum(squares) / dot)[0] : fitted[0];
}

// Code I of W lanes into the words of a tile, whose bits there are 0.
template <int B, int I>
LEANKV_INLINE void add_code(vu (&rows)[B], vu c) {
  if constexpr (B == 3) {
    rows[field_row(B, I)] |= (c & 3u) << field_shift(B, I);
    rows[2] |= (c >> 2) << high_bit(I);
  } else {
    rows[field_row(B, I)] |= c << field_shift(B, I);
  }
}

// Codes [i][lane], rows at a distance of `stride`, -> the words of a tile.
template <int B>
inline void pack_tile(const uint8_t* codes, int stride, uint32_t* words) {
  for (int lane = 0; lane < kTile; lane += W) {
    vu rows[B] = {};
    unroll<kTile>([&](auto i) LEANKV_LAMBDA {
      add_code<B, i>(rows, __builtin_convertvector(load<vb>(codes + i * stride + lane), vu));
    });
    unroll<B>([&](auto j) LEANKV_LAMBDA { store(words + j * kTile + lane, rows[j]); });
  }
}

// One side of a block: rows [n, dim] -> words; the scales go to `scales` [32], shifted. `shaping`
// may be null.
inline uint32_t* encode_side(const Side& side, Rounding rounding, const float* shaping,
                             const float* rows, int n, bool lanes_are_slots, int shift,
                             uint32_t* words, uint32_t* scales) {
  const int dim = side.dim();
  alignas(64) uint8_t codes[kTile * kMaxDim];
  alignas(64) float none[kMaxDim] = {};  // what stands behind the last row
  for (int t = 0; t < kTile; ++t) {
    const float* x = t < n ? rows + t * dim : none;
    uint8_t* to = codes + t * dim;
    const uint32_t scale = shaping ? encode_shaped(side, rounding, x, shaping, to)
                                   : encode_vector(side, rounding, x, to);
    scales[t] |= scale << shift;
  }
  each_group(side, [&](auto bits, int first) {
    alignas(64) uint8_t turned[kTile * kTile];
    const uint8_t* tile = codes + first;
    int stride = dim;
    if (lanes_are_slots) {
      for (int t = 0; t < kTile; ++t) {
        for (int i = 0; i < kTile; ++i) turned[i * kTile + t] = codes[t * dim + first + i];
      }
      tile = turned;
      stride = kTile;
    }
    pack_tile<bits>(tile, stride, words);
    words += bits * kTile;
  });
  return words;
}

inline void center(float* rows, int n, int dim, const float* mu) {
  for (int t = 0; t < n; ++t) {
    for (int i = 0; i < dim; i += W) {
      store(rows + t * dim + i, load(rows + t * dim + i) - load(mu + i));
    }
  }
}

// See Kernels::encode.
inline void encode(const EncodeArgs& a, int head, int block) {
  const int first = block * kTile, left = a.tokens - first, n = left < kTile ? left : kTile;
  uint32_t* words =
      a.blocks + (static_cast<int64_t>(head) * blocks_of(a.tokens) + block) * a.format.words();
  alignas(64) float rows[kTile * kMaxDim];
  uint32_t scales[kTile] = {};
  const int k_dim = a.format.k.dim(), v_dim = a.format.v.dim();
  read(a.k, head, first, n, k_dim, rows);
  center(rows, n, k_dim, a.mu_k + head * k_dim);
  const float* shaping = a.shaping ? a.shaping + int64_t{head} * k_dim * k_dim : nullptr;
  words = encode_side(a.format.k, a.rounding, shaping, rows, n, true, 0, words, scales);
  read(a.v, head, first, n, v_dim, rows);
  center(rows, n, v_dim, a.mu_v + head * v_dim);
  words = encode_side(a.format.v, a.rounding, nullptr, rows, n, false, 16, words, scales);
  std::memcpy(words, scales, sizeof(scales));
}

}  // namespace leankv::LEANKV_ISA
