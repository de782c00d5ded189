// The rotation of leankv_mlx/codec/rotation.py: fixed signs, then an orthonormal Walsh-Hadamard
// transform of each block of channels (a power of two, at least 32).
//
// One SIMD group holds one vector of 32 * C channels: channel c * 32 + lane is x[c] of a lane.
// So the first five stages are shuffles, the others stay within a lane, and no barrier is
// needed.

// BLOCK ** -0.5
CONSTFN float lkv_unit(int block) {
  float unit = block & 0x55555555 ? 1.0f : 0.70710678f;
  for (int b = block; b >= 4; b >>= 2) unit *= 0.5f;
  return unit;
}

template <int C, int BLOCK>
DEVFN void lkv_hadamard(THR float (&x)[C], uint lane) {
  UNROLL for (uint h = 1; h < 32; h <<= 1) {
    UNROLL for (int c = 0; c < C; c++) {
      const float other = simd_shuffle_xor(x[c], (ushort)h);
      x[c] = lane & h ? other - x[c] : x[c] + other;
    }
  }
  UNROLL for (int h = 1; h < BLOCK / 32; h <<= 1) {
    UNROLL for (int c = 0; c < C; c++) {
      if (c & h || (c | h) >= C) continue;
      const float a = x[c], b = x[c | h];
      x[c] = a + b;
      x[c | h] = a - b;
    }
  }
  UNROLL for (int c = 0; c < C; c++) x[c] *= lkv_unit(BLOCK);
}

// A vector as the model made it, [head_dim] -> rotated. BLOCK 0: it is rotated already. P is a
// pointer to constant memory if the array has fewer than 8 elements: MLX decides.
template <int C, int BLOCK, class P>
DEVFN void lkv_load_rotated(P vector, int head_dim, const DEV float* signs, uint lane,
                            THR float (&x)[C]) {
  UNROLL for (int c = 0; c < C; c++) {
    const int channel = c * 32 + (int)lane;
    x[c] = channel < head_dim ? (float)vector[channel] : 0.0f;
    if (BLOCK) x[c] *= signs[channel];
  }
  if (BLOCK) lkv_hadamard<C, (BLOCK ? BLOCK : 32)>(x, lane);
}

// A rotated vector -> as the model expects it, [head_dim]. BLOCK 0: it stays rotated.
template <int C, int BLOCK, class T>
DEVFN void lkv_store_unrotated(THR float (&x)[C], const DEV float* signs, int head_dim, uint lane,
                               DEV T* vector) {
  if (BLOCK) lkv_hadamard<C, (BLOCK ? BLOCK : 32)>(x, lane);
  UNROLL for (int c = 0; c < C; c++) {
    const int channel = c * 32 + (int)lane;
    if (channel < head_dim) vector[channel] = (T)(BLOCK ? x[c] * signs[channel] : x[c]);
  }
}

// One row of `append`: old rows are copied, new ones rotated. One SIMD group does it.
//   old [H, E, 32 C], fresh [H, N, head_dim], rows [H, E + N, 32 C]
template <int C, int BLOCK, class T, class P>
DEVFN void lkv_append_row(const DEV T* old, P fresh, int kept, int tokens, int head_dim,
                          const DEV float* signs, DEV T* rows, int head, int row, uint lane) {
  float x[C];
  if (row < kept) {
    lkv_load_rotated<C, 0>(old + ((size_t)head * kept + row) * (C * 32), C * 32, signs, lane, x);
  } else {
    lkv_load_rotated<C, BLOCK>(fresh + ((size_t)head * tokens + (row - kept)) * head_dim, head_dim,
                               signs, lane, x);
  }
  DEV T* target = rows + ((size_t)head * (kept + tokens) + row) * (C * 32);
  lkv_store_unrotated<C, 0>(x, signs, C * 32, lane, target);
}
