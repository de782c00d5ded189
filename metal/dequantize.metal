// Blocks -> rotated rows with their centers added, for prefill; the bit layout is the comment on
// top of layout.metal.
//
// One SIMD group decodes the 32 slots of one channel group of one block, with lane = channel on
// both sides, so that rows are written in order. Of a key tile, lanes of the same word read it
// together. Slots that are not in use become zeros.

template <class T>
DEVFN void lkv_dequantize_group(const DEV uint* tile, const DEV uint* scales, int bits, bool is_key,
                                float mu, int used, int dim, uint lane, DEV T* rows) {
  for (int slot = 0; slot < 32; slot++) {
    float x = 0.0f;
    if (slot < used) {
      const uint code = bits == 0 ? 0u
                        : is_key  ? lkv_code(tile + slot, bits, (int)lane)
                                  : lkv_code(tile + (int)lane, bits, slot);
      const uint scale = is_key ? scales[slot] & 0xffffu : scales[slot] >> 16;
      x = metal::fma(lkv_level_of(bits, code), bits ? lkv_float_of_half_bits(scale) : 0.0f, mu);
    }
    rows[(size_t)slot * dim] = (T)x;
  }
}

// Channel group `group` of block `block` of a head: the key groups first, then the value groups.
//   pool [blocks, words], table [H, width], lengths [H], mu_k [H, Dk], mu_v [H, Dv] ->
//   k [H, width * 32, Dk], v [H, width * 32, Dv]
template <int KF, int VF, int KC, int VC, class IP, class LP, class T>
DEVFN void lkv_dequantize(const DEV uint* pool, IP table, int width, LP lengths,
                          const DEV float* mu_k, const DEV float* mu_v, DEV T* k, DEV T* v,
                          int head, int block, int group, uint lane) {
  constexpr int k_words = 32 * lkv_rows(KF, KC), v_words = 32 * lkv_rows(VF, VC);
  const int used = lengths[head] - block * 32;
  // Entries behind the last block are 0 and must not be read: a pool may be empty.
  const int id = used > 0 ? table[head * width + block] : 0;
  const DEV uint* words = pool + (size_t)id * (size_t)(k_words + v_words + 32);
  const bool is_key = group < KC;
  const int c = is_key ? group : group - KC, channel = c * 32 + (int)lane;
  const int bits = is_key ? lkv_group_bits(KF, c) : lkv_group_bits(VF, c);
  const DEV uint* tile = words + (is_key ? 32 * lkv_rows(KF, c) : k_words + 32 * lkv_rows(VF, c));
  const int dim = 32 * (is_key ? KC : VC);
  const float mu = is_key ? mu_k[head * dim + channel] : mu_v[head * dim + channel];
  DEV T* rows = (is_key ? k : v) + ((size_t)head * width + block) * (size_t)(32 * dim) + channel;
  lkv_dequantize_group(tile, words + k_words + v_words, bits, is_key, mu, used, dim, lane, rows);
}
