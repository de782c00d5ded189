// Blocks -> rows.
#pragma once

namespace leankv::LEANKV_ISA {

// One tile -> values [i][lane] in units of the scale.
template <int B>
inline void unpack_tile(const uint32_t* words, float* values) {
  const Levels<B> levels;
  for (int lane = 0; lane < kTile; lane += W) {
    unroll<kTile>([&](auto i) LEANKV_LAMBDA {
      store(values + i * kTile + lane, levels.template at<i>(words + lane));
    });
  }
}

// One side of a block -> rows [32, dim], scaled and with the center added.
inline const uint32_t* decode_side(const Side& side, const uint32_t* words, bool lanes_are_slots,
                                   const float* scales, const float* mu, float* rows) {
  const int dim = side.dim();
  for (int t = 0; t < kTile; ++t) std::memcpy(rows + t * dim, mu, sizeof(float) * dim);
  each_group(side, [&](auto bits, int first) {
    alignas(64) float values[kTile * kTile];
    unpack_tile<bits>(words, values);
    words += bits * kTile;
    for (int t = 0; t < kTile; ++t) {
      float* row = rows + t * dim + first;
      if (lanes_are_slots) {
        for (int i = 0; i < kTile; ++i) row[i] += values[i * kTile + t] * scales[t];
      } else {
        for (int i = 0; i < kTile; i += W) {
          store(row + i, load(row + i) + load(values + t * kTile + i) * scales[t]);
        }
      }
    }
  });
  return words;
}

inline void write_side(const Output& to, const Rotation& rotation, int head, int64_t row, int live,
                       int dim, float* rows) {
  int out_dim = dim;
  if (rotation.signs) {
    out_dim = rotation.head_dim;
    for (int t = 0; t < live; ++t) {
      unrotate(rotation, rows + t * dim);
      std::memmove(rows + t * out_dim, rows + t * dim, sizeof(float) * out_dim);
    }
  }
  std::memset(rows + live * out_dim, 0, sizeof(float) * (kTile - live) * out_dim);
  write(to, head, row, kTile, out_dim, rows);
}

// See Kernels::decode.
inline void decode(const DecodeArgs& a, const Body& body, int head, int i, int64_t row) {
  alignas(64) float rows[kTile * kMaxDim], k_scales[kTile], v_scales[kTile];
  const int k_dim = body.format.k.dim(), v_dim = body.format.v.dim();
  int live = body.lengths[head] - i * kTile;
  live = live < 0 ? 0 : live > kTile ? kTile : live;
  if (!live) {
    write_side(a.k, a.k_rotation, head, row, 0, k_dim, rows);
    return write_side(a.v, a.v_rotation, head, row, 0, v_dim, rows);
  }
  const uint32_t* words = body.block(head, i);
  const Scales scales(words + body.format.words() - kTile);
  std::memcpy(k_scales, scales.k, sizeof(k_scales));
  std::memcpy(v_scales, scales.v, sizeof(v_scales));
  words = decode_side(body.format.k, words, true, k_scales, a.mu_k + head * k_dim, rows);
  write_side(a.k, a.k_rotation, head, row, live, k_dim, rows);
  decode_side(body.format.v, words, false, v_scales, a.mu_v + head * v_dim, rows);
  write_side(a.v, a.v_rotation, head, row, live, v_dim, rows);
}

}  // namespace leankv::LEANKV_ISA
