// The bit layout of a block, in the words of leankv_mlx/codec/packing.py.
//
// A block is 32 slots of one head in one format: KC = k_dim / 32 key tiles, VC value tiles, and
// one row of 32 scale words. A tile is 32 x 32 codes; at B bits it is B rows of 32 words, word j
// of lane l at j * 32 + l, and each lane owns 32 codes i = 0..31:
//   key tile of channel group c:   lane = slot, i = channel of the group
//   value tile of channel group c: lane = channel of the group, i = slot
// B in {2, 4, 8} is a field of B bits: row i / (32 / B), shift B * (i % (32 / B)). B = 3 is a
// 2-bit field in rows 0 and 1 and a row 2 of high bits, so that four codes can be decoded as a
// quad of bytes: at bit 8 * ((i & 15) >> 2) + 4 * (i >> 4) + (i & 3).
// Scales: slot l's word has the fp16 scale of the key in its low half, that of the value in its
// high half.
// A group of 0 bits stores nothing and decodes to 0.
//
// A format is two integers, one for the keys and one for the values, with three bits for each
// channel group, group 0 lowest: 0, 1, 2, 3, 4 for 0, 2, 3, 4, 8 bits (kernels/gpu/launch.py).

CONSTFN int lkv_group_bits(int side, int c) {
  return ((side >> (3 * c)) & 7) == 0   ? 0
         : ((side >> (3 * c)) & 7) == 4 ? 8
                                        : ((side >> (3 * c)) & 7) + 1;
}

// Rows of 32 words of the first `groups` channel groups. Spelled out, because it is asked for with
// the counter of an unrolled loop, and a loop in here would then run on the GPU.
CONSTFN int lkv_rows(int side, int groups) {
  return (groups > 0 ? lkv_group_bits(side, 0) : 0) + (groups > 1 ? lkv_group_bits(side, 1) : 0) +
         (groups > 2 ? lkv_group_bits(side, 2) : 0) + (groups > 3 ? lkv_group_bits(side, 3) : 0) +
         (groups > 4 ? lkv_group_bits(side, 4) : 0) + (groups > 5 ? lkv_group_bits(side, 5) : 0) +
         (groups > 6 ? lkv_group_bits(side, 6) : 0) + (groups > 7 ? lkv_group_bits(side, 7) : 0);
}

// Channels that are stored.
CONSTFN int lkv_channels(int side, int groups) {
  int channels = 0;
  for (int c = 0; c < groups; c++) channels += lkv_group_bits(side, c) ? 32 : 0;
  return channels;
}

// The bits of all groups if they are equal and stored, else 0.
CONSTFN int lkv_uniform(int side, int groups) {
  for (int c = 1; c < groups; c++) {
    if (lkv_group_bits(side, c) != lkv_group_bits(side, 0)) return 0;
  }
  return lkv_group_bits(side, 0);
}

// Up to the last channel group that is stored: a mask of channels leaves out those behind.
CONSTFN int lkv_kept(int side, int groups) {
  int kept = groups;
  while (kept > 0 && lkv_group_bits(side, kept - 1) == 0) kept--;
  return kept;
}

CONSTFN int lkv_field(int bits) { return bits == 3 ? 2 : bits; }
CONSTFN int lkv_per_word(int bits) { return bits ? 32 / lkv_field(bits) : 32; }
CONSTFN int lkv_high_bit(int i) { return 8 * ((i & 15) >> 2) + 4 * (i >> 4) + (i & 3); }

// Codes that one word of every group has: the step in which value tiles are read.
CONSTFN int lkv_step(int side, int groups) {
  int step = 16;
  for (int c = 0; c < groups; c++) {
    step = lkv_group_bits(side, c) && lkv_per_word(lkv_group_bits(side, c)) < step
               ? lkv_per_word(lkv_group_bits(side, c))
               : step;
  }
  return step == 16 || lkv_uniform(side, groups) ? step : 4;
}

// Code i of a lane; `tile` points to the lane's word of row 0.
DEVFN uint lkv_code(const DEV uint* tile, int bits, int i) {
  const int field = lkv_field(bits), per_word = lkv_per_word(bits);
  uint code = (tile[i / per_word * 32] >> (field * (i % per_word))) & ((1u << field) - 1u);
  if (bits == 3) code |= ((tile[2 * 32] >> lkv_high_bit(i)) & 1u) << 2;
  return code;
}

// The codebook: level(code) = x * (a + b * x * x), x = code - (2^B - 1) / 2, in units of the
// scale. UNIT, a power of two, is what x counts as 1: scaling the constants instead of x is
// exact and free.
template <int B, int UNIT>
DEVFN float lkv_cubic(float x) {
  const float unit = 1.0f / (float)UNIT;
  const float a = B == 2 ? 0.8914833f : B == 3 ? 0.4720540f : B == 4 ? 0.2401280f : 0.015811765f;
  const float b = B == 2   ? 0.04896949f
                  : B == 3 ? 0.01151046f
                  : B == 4 ? 0.002102614f
                           : 1.0537124e-6f;
  return x * metal::fma(b * unit * unit * unit, x * x, a * unit);
}
template <int B>
DEVFN float lkv_level(uint code) {
  return lkv_cubic<B, 1>((float)code - 0.5f * (float)((1 << B) - 1));
}
DEVFN float lkv_level_of(int bits, uint code) {
  return bits == 2   ? lkv_level<2>(code)
         : bits == 3 ? lkv_level<3>(code)
         : bits == 4 ? lkv_level<4>(code)
         : bits == 8 ? lkv_level<8>(code)
                     : 0.0f;
}
