// Gathers slots of a body into new blocks of the same format, for eviction, trim and compaction;
// the codes and scales are moved as they are. The bit layout is the comment on top of
// layout.metal.
//
// A SIMD group makes rows of 32 words. In a key tile a lane is a slot, so whole words move; in a
// value tile a lane is a channel, so each of its codes comes from another word.

// Word j of this lane of a value tile; `slots` are the kept slots of the new block, -1 for none,
// and `start` is where the tile begins in a block.
template <class IP, class SP>
DEVFN uint lkv_repack_values(const DEV uint* pool, IP ids, SP slots, int count, int words,
                             int start, int bits, int j, uint lane) {
  const int per_word = lkv_per_word(bits), field = lkv_field(bits);
  const bool high = bits == 3 && j == 2;
  uint word = 0u;
  for (int i = high ? 0 : j * per_word; i < (high ? 32 : (j + 1) * per_word); i++) {
    const int slot = i < count ? slots[i] : -1;
    if (slot < 0) continue;
    const DEV uint* tile = pool + (size_t)ids[slot / 32] * (size_t)words + start;
    const uint code = lkv_code(tile + (int)lane, bits, slot % 32);
    word |= high ? (code >> 2) << lkv_high_bit(i)
                 : (code & ((1u << field) - 1u)) << (field * (i % per_word));
  }
  return word;
}

// Row `row` of words of new block `block`, of `width` source blocks a head.
//   pool [blocks, words], table [H, width], slots [H, kept] -> fresh [H, count, words]
template <int KF, int VF, int KC, int VC, class IP, class SP>
DEVFN void lkv_repack_row(const DEV uint* pool, IP table, int width, SP slots, int kept,
                          DEV uint* fresh, int head, int block, int count, int row, uint lane) {
  constexpr int k_rows = lkv_rows(KF, KC), v_rows = lkv_rows(VF, VC);
  constexpr int words = 32 * (k_rows + v_rows + 1);
  const int left = kept - block * 32;
  IP ids = table + head * width;
  SP mine = slots + (size_t)head * kept + block * 32;
  DEV uint* target = fresh + ((size_t)head * count + block) * (size_t)words + row * 32 + (int)lane;
  if (row < k_rows || row == k_rows + v_rows) {
    const int slot = (int)lane < left ? mine[lane] : -1;
    const size_t at = slot < 0 ? 0 : (size_t)ids[slot / 32] * (size_t)words + row * 32 + slot % 32;
    *target = slot < 0 ? 0u : pool[at];
    return;
  }
  int start = k_rows, bits = 0;  // the group that the row lies in
  for (int c = 0; c < VC && start + bits <= row; c++) {
    start += bits;
    bits = lkv_group_bits(VF, c);
  }
  *target = lkv_repack_values(pool, ids, mine, left, words, 32 * start, bits, row - start, lane);
}
