// Codes -> values in the inner loops of attention: four codes of a word share their masks and
// shifts. The layout is the comment on top of layout.metal.
//
// The strategy S is what the hardware does well:
//   LKV_CUBIC    byte -> float by the exponent trick, then the cubic (Apple)
//   LKV_SHUFFLE  each lane holds one level, a shuffle picks it (NVIDIA: one instruction); 8 bits
//                have more levels than lanes and are computed
//   LKV_TABLE    all levels in threadgroup memory

#define LKV_CUBIC 0
#define LKV_SHUFFLE 1
#define LKV_TABLE 2
#define LKV_TABLE_SIZE 284

CONSTFN int lkv_table_start(int bits) {
  return bits == 2 ? 0 : bits == 3 ? 4 : bits == 4 ? 12 : 28;
}

DEVFN void lkv_fill_table(TG_PTR(float) table, uint first, uint step) {
  for (uint i = first; i < LKV_TABLE_SIZE; i += step) {
    table[i] = i < 4u    ? lkv_level<2>(i)
               : i < 12u ? lkv_level<3>(i - 4u)
               : i < 28u ? lkv_level<4>(i - 12u)
                         : lkv_level<8>(i - 28u);
  }
}

// What decoding needs beside the words: this lane's level at each number of bits, or the table.
struct lkv_levels {
  float two, three, four;
  TG_PTR(const float) table;
};

DEVFN lkv_levels lkv_levels_of_lane(uint lane, TG_PTR(const float) table) {
  lkv_levels levels;
  levels.two = lkv_level<2>(lane & 3u);
  levels.three = lkv_level<3>(lane & 7u);
  levels.four = lkv_level<4>(lane & 15u);
  levels.table = table;
  return levels;
}

// Four codes as a quad of bytes, code i in byte i / (32 / 4 / B): bits from bit `at` of the byte
// up. `high` has the high bit of code i at bit 8 * (i >> 2) + (i & 3).
template <int B, int at>
DEVFN uint lkv_quad(uint word, uint high, int i) {
  const int field = lkv_field(B), shift = field * (i % (8 / field)) - at;
  const uint mask = (uint)((1 << field) - 1) * 0x01010101u;
  uint quad = (shift < 0 ? word << (shift < 0 ? -shift : 0) : word >> (shift < 0 ? 0 : shift)) &
              (mask << at);
  if (B == 3) {
    const int up = at + 2 - (i & 3);
    quad |= (up < 0 ? high >> (up < 0 ? -up : 0) : high << (up < 0 ? 0 : up)) &
            (0x01010101u << (at + 2));
  }
  return quad;
}

// The value of the code at position i of a word, in units of the scale.
template <int B, int S>
DEVFN float lkv_value(uint word, uint high, int i, const THR lkv_levels& levels) {
  const float top = (float)((1 << B) - 1);
  if (B == 8 && S != LKV_TABLE) {
    // 256 code - 128 top, exact: 2^23 + 127.5 would not be a float.
    const float x = lkv_magic<1>(word, i) - (8388608.0f + 128.0f * top);
    return lkv_cubic<B, 256>(x);
  }
  const int byte = i / (8 / lkv_field(B));
  if (S == LKV_CUBIC) {
    const float x = lkv_magic<0>(lkv_quad<B, 1>(word, high, i), byte) - (8388608.0f + top);
    return lkv_cubic<B, 2>(x);  // x = 2 code - top, exact
  }
  // A shuffle needs only the low bits right, so the word itself will do where codes are whole.
  const uint code =
      B == 3 ? lkv_quad<B, 0>(word, high, i) >> (8 * byte) : word >> (lkv_field(B) * i);
  if (S == LKV_SHUFFLE) {
    return lkv_pick<(B == 8 ? 4 : B)>(B == 2 ? levels.two : B == 3 ? levels.three : levels.four,
                                      code);
  }
  return levels.table[lkv_table_start(B) + (int)(code & (uint)((1 << B) - 1))];
}

template <int S>
DEVFN float lkv_value_of(int bits, uint word, uint high, int i, const THR lkv_levels& levels) {
  switch (bits) {
    case 2: return lkv_value<2, S>(word, high, i, levels);
    case 3: return lkv_value<3, S>(word, high, i, levels);
    case 4: return lkv_value<4, S>(word, high, i, levels);
    case 8: return lkv_value<8, S>(word, high, i, levels);
    default: return 0.0f;
  }
}
