// Whole operations on plain memory: how a kernel's work is split over threads. No MLX here, so that
// a test program can run them under sanitizers.
#pragma once

#include <utility>
#include <vector>

#include "kernels/args.h"

namespace leankv {

// What goes into any attention besides the tokens, and what comes out.
struct Ends {
  Vectors queries;                     // [Hq, L, k_dim or the rotation's head_dim]
  Rotation k_rotation;                 // of the queries, if present
  Rotation v_rotation;                 // undone in the output, if present
  const float* sink_logits = nullptr;  // [Hq] or null
  float scale = 1.0f;
  Output out;  // [Hq, L, v_dim or the rotation's head_dim]
};

struct AttentionJob {
  AttentionArgs args;  // queries and bias are made here
  Ends ends;
  const float* scales = nullptr;  // [H, head_dim] or null: queries are multiplied by them first
  const float* mu_k = nullptr;    // [H, Dk], null without centers
  const float* mu_v = nullptr;
  float* lse = nullptr;      // [Hq, L]
  int32_t* reads = nullptr;  // [H, 2] or null: blocks whose values were read, and all blocks
};
// Of sequences of a model, which have the same shapes but for their tokens. All threads share all
// of them, and each gets the bits that it gets alone.
void run_attention(const std::vector<AttentionJob>& jobs);

struct PrefillJob {
  PrefillArgs args;
  Ends ends;
};
void run_prefill(const PrefillJob& job);

void run_encode(const EncodeArgs& args, int heads);

void run_repack(const RepackArgs& args, int heads);

// Where the slots of a body stand among those of all, for a head not before the end of the body
// before; and the heads that it is of, empty for all.
using Place = std::pair<int, std::vector<int>>;

// Everything of a sequence, in order: the first `sinks` exact rows, `slots` of the bodies, the
// other exact rows. Slots of a head that no body has become 0.
struct DecodeJob {
  DecodeArgs args;
  const Body* bodies = nullptr;
  const Place* places = nullptr;  // of the bodies
  int n_bodies = 0, heads = 0, slots = 0;
  Vectors exact_k, exact_v;
  int exact = 0, sinks = 0, k_dim = 0, v_dim = 0;
};
void run_decode(const DecodeJob& job);

// Exact rows [H, E, dim], then new rows [H, T, head_dim], which are divided by `scales`, [H,
// head_dim] or null, and rotated.
struct AppendJob {
  Vectors exact, rows;
  int n_exact = 0, n_rows = 0, heads = 0;
  const float* scales = nullptr;
  Rotation rotation;
  Output out;  // [H, E + T, dim]
};
void run_append(const std::vector<AppendJob>& jobs);

// One of the weights that the inputs are multiplied with.
struct Product {
  Weight weight;
  Vectors bias{};  // [1, 1, N], none without data
  Output out{};    // [1, R, N]
};

struct ProjectJob {
  Vectors x;  // [1, R, K]
  int rows = 0, inputs = 0;
  Vectors norm{};  // [1, 1, K], none without data
  float eps = 0;
  bool sparse = false;  // leave out the channels with |x| * norms <= threshold
  float threshold = 0;
  const float* norms = nullptr;  // [K], null for 1
  const Product* products = nullptr;
  int n = 0;
  Gate gate = Gate::none;   // with one: gate(first) * second is the second's output, the only one
  Vectors residual{};       // [1, R, N], none without data
  int32_t* read = nullptr;  // channels that took part, summed over the rows; or null
};
void run_project(const ProjectJob& job);

// MLX's codes [N, K * bits / 32] -> codes of the weight, of which only the shape is read.
void run_relay(const Weight& weight, const void* packed, uint32_t* codes);
// The inverse.
void run_restore(const Weight& weight, void* packed);
// Rows of the weight, n of them -> out [1, n, K] of the type of the scales. What is no row gives
// the first or the last.
void run_rows(const Weight& weight, const int32_t* ids, int n, const Output& out);

// Multiply-adds per second, n on each thread in use: the bound of attention's arithmetic.
double multiply_add_rate(int64_t n);

}  // namespace leankv
