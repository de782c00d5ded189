// Slots of a body -> new blocks, bit for bit.
#pragma once

namespace leankv::LEANKV_ISA {

// What stands where no slot is wanted: a slot of code 0 and scale 0 in every tile.
alignas(64) constexpr uint32_t kEmpty[kTile * (2 * 8 * kMaxGroups + 1)] = {};

// Where the 32 slots of a new block come from.
struct Sources {
  const uint32_t* block[kTile];
  int slot[kTile];
};

// The code of `slot` in each of W lanes.
template <int B>
LEANKV_INLINE vu code_of(const uint32_t* words, int slot) {
  vu c = load<vu>(words + field_row(B, slot) * kTile) >> field_shift(B, slot);
  if constexpr (B == 3) {
    return (c & 3u) | (((load<vu>(words + 2 * kTile) >> high_bit(slot)) & 1u) << 2);
  }
  return c & ((1u << B) - 1);
}

// Value tile at word `start` of a block: lanes are channels, so a slot is a code of every lane.
template <int B>
inline void repack_value_tile(const Sources& from, int start, uint32_t* to) {
  for (int lane = 0; lane < kTile; lane += W) {
    vu rows[B] = {};
    unroll<kTile>([&](auto i) LEANKV_LAMBDA {
      add_code<B, i>(rows, code_of<B>(from.block[i] + start + lane, from.slot[i]));
    });
    unroll<B>([&](auto j) LEANKV_LAMBDA { store(to + start + j * kTile + lane, rows[j]); });
  }
}

// Rows of words in which a lane is a slot: key tiles and scales.
inline void repack_words(const Sources& from, int start, int words, uint32_t* to) {
  const uint32_t* at[kTile];
  for (int l = 0; l < kTile; ++l) at[l] = from.block[l] + start + from.slot[l];
  for (int row = 0; row < words; row += kTile) {
    for (int l = 0; l < kTile; ++l) to[start + row + l] = at[l][row];
  }
}

// See Kernels::repack.
inline void repack(const RepackArgs& a, int head, int block) {
  const Format& format = a.body.format;
  const int first = block * kTile, left = a.kept - first, slots = a.body.width * kTile;
  const int32_t* index = a.index + static_cast<int64_t>(head) * a.kept + first;
  uint32_t* to =
      a.blocks + (static_cast<int64_t>(head) * blocks_of(a.kept) + block) * format.words();
  Sources from;
  bool whole = left >= kTile;  // an unchanged block
  for (int i = 0; i < kTile; ++i) {
    const int slot = i < left ? index[i] : -1;
    const bool wanted = slot >= 0 && slot < slots;
    from.block[i] = wanted ? a.body.block(head, slot / kTile) : kEmpty;
    from.slot[i] = wanted ? slot % kTile : 0;
    whole = whole && wanted && from.slot[i] == i && from.block[i] == from.block[0];
  }
  if (whole) {
    std::memcpy(to, from.block[0], sizeof(uint32_t) * format.words());
    return;
  }
  int start = format.k.words();
  repack_words(from, 0, start, to);
  each_group(format.v, [&](auto bits, int) {
    repack_value_tile<bits>(from, start, to);
    start += bits * kTile;
  });
  repack_words(from, start, kTile, to);
}

}  // namespace leankv::LEANKV_ISA
