// Rotated rows -> blocks: centering, scale, codes, packing (leankv_mlx/codec/quantize.py); the bit
// layout is the comment on top of layout.metal.
//
// A threadgroup of NSG SIMD groups makes one block. Each SIMD group takes a slot at a time; channel
// c * 32 + lane of its vector is x[c] of a lane. Codes wait in threadgroup memory as bytes,
// [slot][32 * C + 4], until all slots are done; then each SIMD group packs rows of words.

CONSTFN int lkv_codes_stride(int groups) { return groups * 32 + 4; }

// The code of the nearest level, x in units of the scale; between two levels the lower one.
template <int B>
DEVFN uint lkv_nearest(float x) {
  uint code = 0u;
  UNROLL for (int bit = B - 1; bit >= 0; bit--) {
    const uint above = code + (1u << bit);
    const float middle = 0.5f * (lkv_level<B>(above - 1u) + lkv_level<B>(above));
    code = x > middle ? above : code;
  }
  return code;
}

DEVFN uint lkv_nearest_of(int bits, float x) {
  switch (bits) {
    case 2: return lkv_nearest<2>(x);
    case 3: return lkv_nearest<3>(x);
    case 4: return lkv_nearest<4>(x);
    case 8: return lkv_nearest<8>(x);
    default: return 0u;
  }
}

// Codes at a scale; a scale of 0 gives codes near the middle.
template <int SIDE, int C>
DEVFN void lkv_codes(const THR float (&x)[C], float scale, THR uint (&codes)[C]) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  UNROLL for (int c = 0; c < C; c++) {
    codes[c] = lkv_nearest_of(lkv_group_bits(SIDE, c), x[c] * inverse);
  }
}

// Scale search: of several factors of the rms, each refined by least squares, the scale that leaves
// the smallest squared error.
template <int SIDE, int C>
DEVFN float lkv_search_scale(const THR float (&x)[C], float rms) {
  float best = rms, best_error = 3.0e38f;
  UNROLL1 for (int step = 0; step < 11; step++) {
    uint codes[C];
    float values[C], dot = 0.0f, norm = 0.0f, error = 0.0f;
    lkv_codes<SIDE, C>(x, (0.8f + 0.04f * (float)step) * rms, codes);
    UNROLL for (int c = 0; c < C; c++) {
      values[c] = lkv_level_of(lkv_group_bits(SIDE, c), codes[c]);
      dot = metal::fma(x[c], values[c], dot);
      norm = metal::fma(values[c], values[c], norm);
    }
    dot = simd_sum(dot);
    norm = simd_sum(norm);
    const float scale = dot / metal::max(norm, 1.0e-30f);
    UNROLL for (int c = 0; c < C; c++) {
      const float off = x[c] - scale * values[c];
      error = metal::fma(off, off, error);
    }
    error = simd_sum(error);
    best = error < best_error ? scale : best;
    best_error = metal::min(error, best_error);
  }
  return best;
}

// The scale of these levels that keeps the product of a vector with itself, if one does.
DEVFN float lkv_keeping(float squares, float dot, float scale) {
  return dot > 0.0f ? squares / dot : scale;
}

// Codes at a scale, channel by channel: the error of each moves the channels behind it
// (leankv_mlx/codec/shaping.py). `shaping` [32 * C][32 * C] is that of the head, `squares` x.x.
// Makes `scale` the one that keeps the product with x, and returns what the errors cost with that,
// in every lane: an error x - s l, l the levels, is (x - f l) + (f - s) l.
template <int SIDE, int C>
DEVFN float lkv_shaped_codes(const THR float (&x)[C], float squares, THR float& scale,
                             const DEV float* shaping, uint lane, THR uint (&codes)[C]) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  float targets[C], sums[C], dot = 0.0f, off_off = 0.0f, off_level = 0.0f, level_level = 0.0f;
  UNROLL for (int c = 0; c < C; c++) {
    targets[c] = x[c];
    sums[c] = 0.0f;
    codes[c] = 0u;
  }
  UNROLL for (int c = 0; c < C; c++) {
    const int bits = lkv_group_bits(SIDE, c);
    if (bits == 0) continue;
    UNROLL1 for (int i = 0; i < 32; i++) {
      const DEV float* row = shaping + (size_t)(c * 32 + i) * (32 * C);
      const float target = simd_shuffle(targets[c], (ushort)i);
      const float given = simd_shuffle(x[c], (ushort)i);
      const uint code = lkv_nearest_of(bits, target * inverse);
      const float level = lkv_level_of(bits, code);
      const float off = target - scale * level, error = given - scale * level;
      const float moved = simd_shuffle(sums[c], (ushort)i) + level, size = row[c * 32 + i];
      dot = metal::fma(given, level, dot);
      off_off = metal::fma(size * off, off, off_off);
      off_level = metal::fma(size * off, moved, off_level);
      level_level = metal::fma(size * moved, moved, level_level);
      if (i == (int)lane) codes[c] = code;
      UNROLL for (int d = c; d < C; d++) {
        const float adds = row[d * 32 + (int)lane];
        targets[d] = metal::fma(adds, error, targets[d]);
        sums[d] = metal::fma(adds, level, sums[d]);
      }
    }
  }
  const float keeping = lkv_keeping(squares, dot, scale), change = scale - keeping;
  scale = keeping;
  return off_off + change * (2.0f * off_level + change * level_level);
}

// The same at the factor of the rms whose codes cost least. Returns the scale.
template <int SIDE, int C>
DEVFN float lkv_shaped_search(const THR float (&x)[C], float squares, float rms,
                              const DEV float* shaping, uint lane, THR uint (&codes)[C]) {
  float best = rms, least = 0.0f;
  UNROLL1 for (int step = 0; step < 11; step++) {
    uint found[C];
    float scale = (0.8f + 0.04f * (float)step) * rms;
    const float cost = lkv_shaped_codes<SIDE, C>(x, squares, scale, shaping, lane, found);
    if (step > 0 && cost >= least) continue;
    best = scale;
    least = cost;
    UNROLL for (int c = 0; c < C; c++) codes[c] = found[c];
  }
  return best;
}

DEVFN uint lkv_scale_bits(float scale) {
  return lkv_half_bits(metal::min(metal::max(scale, 0.0f), 65504.0f));
}

// The vector of slot `slot` [32 * C] -> codes, and the bits of its scale. Slots behind the last row
// hold zeros. `shaping` is read if SHAPED.
template <int SIDE, int C, bool SEARCH, bool SHAPED, class T>
DEVFN uint lkv_encode_vector(const DEV T* vector, const DEV float* mu, const DEV float* shaping,
                             bool there, int slot, uint lane, TG_PTR(uchar) bytes) {
  float x[C], squares = 0.0f;
  uint codes[C];
  UNROLL for (int c = 0; c < C; c++) {
    const int channel = c * 32 + (int)lane;
    const bool stored = there && lkv_group_bits(SIDE, c) > 0;
    x[c] = stored ? (float)vector[channel] - mu[channel] : 0.0f;
    squares = metal::fma(x[c], x[c], squares);
  }
  squares = simd_sum(squares);
  float scale = metal::sqrt(squares / (float)lkv_channels(SIDE, C));
  uint bits = lkv_scale_bits(scale);
  if (SHAPED && SEARCH) {
    bits = lkv_scale_bits(lkv_shaped_search<SIDE, C>(x, squares, scale, shaping, lane, codes));
  } else if (SHAPED) {
    scale = lkv_float_of_half_bits(bits);
    lkv_shaped_codes<SIDE, C>(x, squares, scale, shaping, lane, codes);
  } else {
    if (SEARCH) bits = lkv_scale_bits(lkv_search_scale<SIDE, C>(x, scale));
    lkv_codes<SIDE, C>(x, lkv_float_of_half_bits(bits), codes);
  }
  if (SEARCH && !SHAPED) {
    float dot = 0.0f;
    UNROLL for (int c = 0; c < C; c++) {
      dot = metal::fma(x[c], lkv_level_of(lkv_group_bits(SIDE, c), codes[c]), dot);
    }
    bits = lkv_scale_bits(lkv_keeping(squares, simd_sum(dot), lkv_float_of_half_bits(bits)));
  }
  UNROLL for (int c = 0; c < C; c++) {
    bytes[slot * lkv_codes_stride(C) + c * 32 + (int)lane] = (uchar)codes[c];
  }
  return bits;
}

// Word j of a lane whose 32 codes lie at a distance of `stride`.
DEVFN uint lkv_pack_word(TG_PTR(const uchar) codes, int stride, int bits, int j) {
  uint word = 0u;
  if (bits == 3 && j == 2) {
    for (int i = 0; i < 32; i++) word |= ((uint)codes[i * stride] >> 2) << lkv_high_bit(i);
    return word;
  }
  const int field = lkv_field(bits), per_word = lkv_per_word(bits);
  for (int i = 0; i < per_word; i++) {
    word |= ((uint)codes[(j * per_word + i) * stride] & ((1u << field) - 1u)) << (field * i);
  }
  return word;
}

template <int SIDE, int C, int NSG>
DEVFN void lkv_pack_side(TG_PTR(const uchar) bytes, bool lane_is_slot, uint lane, uint simd_group,
                         DEV uint* words) {
  const int stride = lkv_codes_stride(C);
  int row = 0;
  for (int c = 0; c < C; c++) {
    const int bits = lkv_group_bits(SIDE, c);
    TG_PTR(const uchar) codes =
        lane_is_slot ? bytes + (int)lane * stride + c * 32 : bytes + c * 32 + (int)lane;
    for (int j = 0; j < bits; j++, row++) {
      if (row % NSG != (int)simd_group) continue;
      words[row * 32 + (int)lane] = lkv_pack_word(codes, lane_is_slot ? 1 : stride, bits, j);
    }
  }
}

// One block. k [H, tokens, Dk], v [H, tokens, Dv], mu_k [H, Dk], mu_v [H, Dv], shaping [H, Dk, Dk]
// if SHAPED -> blocks [H, count, words]
template <int KF, int VF, int KC, int VC, bool SEARCH, bool SHAPED, int NSG, class KT, class VT>
DEVFN void lkv_encode_block(const DEV KT* k, const DEV VT* v, int tokens, const DEV float* mu_k,
                            const DEV float* mu_v, const DEV float* shaping, DEV uint* blocks,
                            int head, int block, int count, uint lane, uint simd_group,
                            TG_PTR(uchar) k_bytes, TG_PTR(uchar) v_bytes) {
  constexpr int k_words = 32 * lkv_rows(KF, KC), v_words = 32 * lkv_rows(VF, VC);
  DEV uint* words = blocks + ((size_t)head * count + block) * (size_t)(k_words + v_words + 32);
  for (int slot = (int)simd_group; slot < 32; slot += NSG) {
    const bool there = block * 32 + slot < tokens;
    const size_t row = (size_t)head * tokens + (there ? block * 32 + slot : 0);
    const DEV float* costs = SHAPED ? shaping + (size_t)head * (KC * 32) * (KC * 32) : shaping;
    const uint k_scale = lkv_encode_vector<KF, KC, SEARCH, SHAPED>(
        k + row * (KC * 32), mu_k + head * (KC * 32), costs, there, slot, lane, k_bytes);
    const uint v_scale = lkv_encode_vector<VF, VC, SEARCH, false>(
        v + row * (VC * 32), mu_v + head * (VC * 32), shaping, there, slot, lane, v_bytes);
    if (lane == 0) words[k_words + v_words + slot] = k_scale | (v_scale << 16);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  lkv_pack_side<KF, KC, NSG>(k_bytes, true, lane, simd_group, words);
  lkv_pack_side<VF, VC, NSG>(v_bytes, false, lane, simd_group, words + k_words);
}
