// All kernels of one instruction set; included once by each translation unit, behind its simd_*.h.
#pragma once

#include "tile.h"
#ifdef LEANKV_PAIRS
#include "pairs.h"
#endif
#include "block.h"
#include "rows.h"
#include "attention.h"
#include "prefill.h"
#include "project.h"
#include "encode.h"
#include "decode.h"
#include "repack.h"
#include "peak.h"

namespace leankv::LEANKV_ISA {

constexpr Kernels kernels(const char* name) {
#ifdef LEANKV_PAIRS
  constexpr bool pairs = true;
#else
  constexpr bool pairs = false;
#endif
  return {.name = name,
          .attend = attend,
          .pairs = pairs,
          .place = place,
          .merge = merge,
          .encode = encode,
          .decode = decode,
          .repack = repack,
          .read = read,
          .write = write,
          .rotate = rotate,
          .unrotate = unrotate,
          .lanes = kRowLanes,
          .prefill = prefill,
          .multiply_add = multiply_add,
          .norm = norm,
          .multiply = multiply,
          .unpack = unpack,
          .multiply_block = multiply_block,
          .block = kColumns,
          .columns = kRowLanes,
          .finish = finish};
}

}  // namespace leankv::LEANKV_ISA
