// All kernels of one instruction set; included once by each translation unit, behind its simd_*.h.
// Those of products with weights are a unit of their own (project.h): both take a minute to compile.
#pragma once

#include "tile.h"
#ifdef LEANKV_PAIRS
#include "pairs.h"
#endif
#include "block.h"
#include "rows.h"
#include "attention.h"
#include "prefill.h"
#include "encode.h"
#include "decode.h"
#include "repack.h"
#include "peak.h"

namespace leankv::LEANKV_ISA {

// See project.h.
void norm(float* row, const float* weight, float eps, int dim);
void multiply(const Weight& w, const Channels& c, int tile, int first, int last, float* out);
void unpack(const Weight& w, int tile, int first, int n, float* panels);
void multiply_block(const float* rows, const float* panel, int n, bool add, float* out);
void finish(const Finish& f, const Products& p);

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
