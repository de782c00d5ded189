// What the kernels work on: plain pointers and numbers, so that a kernel's translation unit
// includes nothing that the linker could merge with code of other instruction sets.
//
// Shapes: H KV heads, R = group * L query rows of a KV head (row g * L + l is new token l of query
// head g), E exact rows, Dk and Dv the stored channels. Everything is rotated.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "../projection.h"
#include "vectors.h"

namespace leankv {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLowest = -1e30f;  // a score that is masked, finite so that differences are too
#ifdef LEANKV_SANITIZED
constexpr int kRowChunk = 2;  // the loops are the same, with fewer instances to build
#else
constexpr int kRowChunk = 8;  // query rows that share one decoding of a code
#endif

constexpr int kMaxWidth = 16;      // floats of the widest vector
constexpr int kPairs = kTile / 2;  // of the codes or factors of a tile, see kernels/pairs.h

// Signs and Walsh-Hadamard blocks (leankv_mlx/codec/rotation.py); none if signs is null.
struct Rotation {
  const float* signs = nullptr;  // [dim]
  int dim = 0;                   // stored channels
  int block = 0;                 // a power of two that divides dim
  int head_dim = 0;              // channels of the model, at most dim
  // [H, head_dim] or null: the channels of the model in the order in which they are rotated. It is
  // for whoever has a row to rotate; `rotate` takes them as they are.
  const int32_t* order = nullptr;
};

// Compressed tokens of one sequence in one format.
struct Body {
  const uint32_t* pool = nullptr;    // [blocks, words]
  const int32_t* table = nullptr;    // block ids [H, width]
  const int32_t* lengths = nullptr;  // slots in use [H]
  int width = 0;
  Format format;

  LEANKV_INLINE int blocks(int head) const { return blocks_of(lengths[head]); }
  LEANKV_INLINE const uint32_t* block(int head, int i) const {
    return pool + int64_t{table[int64_t{head} * width + i]} * format.words();
  }
};

struct AttentionArgs {
  int heads = 0, group = 0, length = 0, k_dim = 0, v_dim = 0;
  const Body* bodies = nullptr;
  int n_bodies = 0;
  Vectors exact_k, exact_v;
  int exact = 0;  // E
  bool causal = false;
  float skip = 0;  // values of blocks in which no token weighs this much stay unread
  // Queries in units of log2, [H][chunk of rows][channel group][row][32]: what a tile needs lies
  // together. A chunk has kRowChunk rows, the last one the rest.
  const float* queries = nullptr;
  // The same in fixed point if products of int16 will do, or null; see kernels/pairs.h.
  const int32_t* pairs = nullptr;  // [kPairs] in place of [32]
  const float* steps = nullptr;    // [H, R]
  const float* bias = nullptr;     // [H, R]: what centering takes off body scores, in units of log2

  LEANKV_INLINE int rows() const { return group * length; }
  // Of 32 tokens: exact rows first, then blocks of the bodies.
  LEANKV_INLINE int units(int head) const {
    int n = blocks_of(exact);
    for (int i = 0; i < n_bodies; ++i) n += bodies[i].blocks(head);
    return n;
  }
};

// Attention of the rows of one head over some of its units, with the softmax not yet normalized.
struct Partial {
  float* max = nullptr;       // [R], in units of log2
  float* sum = nullptr;       // [R]
  float* body_sum = nullptr;  // [R], the part of the sum that is of centered tokens
  float* least = nullptr;     // [R], in units of log2: the score that a block must reach to be read
  float* out = nullptr;       // [R, Dv]
  float* lanes = nullptr;     // [2, R, kMaxWidth]: the sums lane by lane, body and exact rows
  int32_t* reads = nullptr;   // [2]: blocks whose values were read, and all blocks
};

constexpr int kQueryTile = 128;  // query rows that share one conversion of a key tile
constexpr int kKeyTile = 64;
// Floats from row to row of a key tile. Not a multiple of 64: rows would lie in the same few cache
// sets.
constexpr int kTileStride = kMaxDim + 16;

// Prefill attention. Query row r of a KV head is new token r / group of query head r % group.
struct PrefillArgs {
  int heads = 0, group = 0, length = 0, tokens = 0, k_dim = 0, v_dim = 0;
  Vectors k, v;                   // [H, N, dim], the new tokens last
  const bool* present = nullptr;  // [H, N]: which rows are tokens; null if all are
  bool causal = false;

  LEANKV_INLINE int rows() const { return group * length; }
  // How many rows, from the first, row r of a head may look at.
  LEANKV_INLINE int seen(int r) const { return causal ? tokens - length + r / group + 1 : tokens; }
};

// Up to kQueryTile query rows of a head, and room for what their kernel needs. Queries and output
// lie in blocks of Kernels::lanes rows, [block][dim][lanes]: a lane of a vector is a query row, and
// what keys and values are multiplied with is the same for all lanes.
struct PrefillTile {
  int first = 0, rows = 0;
  alignas(64) float queries[kQueryTile * kMaxDim];  // in units of log2
  alignas(64) float out[kQueryTile * kMaxDim];      // not yet normalized
  float max[kQueryTile];  // in units of log2; given, as if of earlier tokens
  float sum[kQueryTile];  // given as well
  alignas(64) float keys[kKeyTile * kTileStride];
  alignas(64) float values[kKeyTile * kTileStride];
  alignas(64) float scores[kKeyTile * 2 * kMaxWidth];
  int32_t positions[kKeyTile];
};

enum class Rounding { search, rms };

struct EncodeArgs {
  Vectors k, v;
  const float* mu_k = nullptr;  // [H, Dk]
  const float* mu_v = nullptr;
  // What errors of keys cost, [H, Dk, Dk] (leankv_mlx/codec/shaping.py); null if all cost the same.
  const float* shaping = nullptr;
  int tokens = 0;
  Format format;
  Rounding rounding = Rounding::search;
  uint32_t* blocks = nullptr;  // [H, ceil(T / 32), words]
};

struct DecodeArgs {
  Output k, v;
  const float* mu_k = nullptr;  // [H, Dk]
  const float* mu_v = nullptr;
  Rotation k_rotation, v_rotation;  // undone where present
};

struct RepackArgs {
  Body body;
  const int32_t* index = nullptr;  // slots [H, T]; a slot that the body does not have is left empty
  int kept = 0;                    // T
  uint32_t* blocks = nullptr;      // [H, ceil(T / 32), words]
};

// Where a query goes in AttentionArgs: 32 channels every `stride` floats.
struct QueryPlace {
  float* queries = nullptr;
  int64_t stride = 0;
  int32_t* pairs = nullptr;  // kPairs every stride / 2; null if not wanted
  float* step = nullptr;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // Attention of one head over its units [first, last).
  void (*attend)(const AttentionArgs&, int head, int first, int last, const Partial&);
  bool pairs;  // whether products of int16 are faster than those of floats
  // A query -> its place; returns its product with mu, 0 if that is null.
  float (*place)(const float* row, const float* mu, int dim, const QueryPlace&);
  // Row r of n parts -> output row [Dv] and log-sum-exp in units of log2. `logit`: of a token
  // without a value, in the same units; mu [Dv] or null: what is added to the values of the bodies.
  float (*merge)(const AttentionArgs&, const Partial* parts, int n, int r, float logit,
                 const float* mu, float* row);
  // Rows [32 * block, 32 * block + 32) of one head to one block.
  void (*encode)(const EncodeArgs&, int head, int block);
  // Block i of one head to output rows [row, row + 32); slots that are not in use become 0.
  void (*decode)(const DecodeArgs&, const Body&, int head, int i, int64_t row);
  // Indices [32 * block, 32 * block + 32) of one head to one new block.
  void (*repack)(const RepackArgs&, int head, int block);
  // n rows of floats, n <= 32 for rotations: read, rotated or un-rotated, and written.
  void (*read)(const Vectors&, int head, int64_t first, int n, int dim, float* rows);
  void (*write)(const Output&, int head, int64_t first, int n, int dim, const float* rows);
  void (*rotate)(const Rotation&, float* row);    // head_dim channels, zeros behind -> dim
  void (*unrotate)(const Rotation&, float* row);  // dim -> head_dim channels
  // Rows of queries of one head over all tokens that they see.
  int lanes;
  void (*prefill)(const PrefillArgs&, int head, PrefillTile&);
  // At least n multiply-adds and nothing else, for benchmarks; returns how many.
  int64_t (*multiply_add)(int64_t n);
  // Root-mean-square norm of a row [dim], dim a multiple of 32.
  void (*norm)(float* row, const float* weight, float eps, int dim);
  // A few rows by channels [first, last) of a tile, multiples of its group -> out [R, P].
  void (*multiply)(const Weight&, const Channels&, int tile, int first, int last, float* out);
  // Channels [first, first + n) of a tile, multiples of its group, as numbers -> panels of
  // `columns` outputs, [ceil(P / columns), n, columns].
  void (*unpack)(const Weight&, int tile, int first, int n, float* panels);
  // Rows [n, block] by a panel [n, columns], n channels of both -> out [block, columns], or added
  // to it.
  void (*multiply_block)(const float* rows, const float* panel, int n, bool add, float* out);
  int block, columns;
  void (*finish)(const Finish&, const Products&);
};

extern const Kernels kAvx512, kAvx2, kNeon, kGeneric;

}  // namespace leankv
