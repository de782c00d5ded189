// Prefill attention: split every head's query rows over the threads.
#include <atomic>

#include "ends.h"
#include "scratch.h"
#include "thread_pool.h"

namespace leankv {
namespace {

// Query rows of one tile, and a softmax that has seen nothing but the sink logits.
void begin(const PrefillJob& job, int head, PrefillTile& tile) {
  const PrefillArgs& a = job.args;
  const int lanes = kernels().lanes, rows = (tile.rows + lanes - 1) / lanes * lanes;
  alignas(64) float row[kMaxDim] = {};
  for (int r = 0; r < rows; ++r) {
    const int query_head = head * a.group + (tile.first + r) % a.group;
    const bool used = r < tile.rows, logit = used && job.ends.sink_logits;
    if (used) {
      read_query(job.ends, head, query_head, (tile.first + r) / a.group, a.k_dim, nullptr, row);
    } else {
      std::fill(row, row + a.k_dim, 0.0f);
    }
    float* to = tile.queries + r / lanes * lanes * a.k_dim + r % lanes;
    for (int i = 0; i < a.k_dim; ++i) to[i * lanes] = row[i];
    tile.max[r] = logit ? job.ends.sink_logits[query_head] * kLog2E : kLowest;
    tile.sum[r] = logit ? 1.0f : 0.0f;
  }
}

void end(const PrefillJob& job, int head, const PrefillTile& tile) {
  const PrefillArgs& a = job.args;
  const int lanes = kernels().lanes;
  alignas(64) float row[kMaxDim];
  for (int r = 0; r < tile.rows; ++r) {
    const float* from = tile.out + r / lanes * lanes * a.v_dim + r % lanes;
    for (int i = 0; i < a.v_dim; ++i) row[i] = from[i * lanes] / tile.sum[r];
    const int query_head = head * a.group + (tile.first + r) % a.group;
    write_output(job.ends, query_head, (tile.first + r) / a.group, a.v_dim, row);
  }
}

}  // namespace

void run_prefill(const PrefillJob& job) {
  const PrefillArgs& a = job.args;
  const int tiles = (a.rows() + kQueryTile - 1) / kQueryTile, tasks = tiles * a.heads;
  std::atomic<int> next{0};
  // A loop over threads, so that each has one tile's memory for all its tasks.
  const int threads = std::min(tasks, thread_count());
  const Scratch<PrefillTile> scratch(threads);
  parallel_for(threads, [&](int i) {
    PrefillTile& tile = scratch.data.get()[i];
    for (int task = next++; task < tasks; task = next++) {
      const int head = task / tiles;
      tile.first = (tiles - 1 - task % tiles) * kQueryTile;  // those that see the most come first
      tile.rows = std::min(kQueryTile, a.rows() - tile.first);
      begin(job, head, tile);
      kernels().prefill(a, head, tile);
      end(job, head, tile);
    }
  });
}

}  // namespace leankv
