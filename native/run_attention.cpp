// Decode attention: prepare the queries, split every head's tokens over the threads, merge.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ends.h"
#include "scratch.h"
#include "thread_pool.h"

namespace leankv {
namespace {

constexpr int kMinUnits = 8;      // of a task: less is not worth its merge
constexpr int kMinSkipping = 32;  // the same where each task scores the exact rows as well
constexpr int kShares = 2;  // tasks at least that are left for each thread, until they are minimal
constexpr int64_t kSerialWork = 1 << 20;  // products below which waking a thread costs more

struct Task {
  int head, first, last;
};

// Tasks of one head lie together, in the order of its tokens; one a head if `whole`. Else the sizes
// fall with what is left, so that all threads end at about the same time.
std::vector<Task> split(const AttentionArgs& a, int units, bool whole) {
  const int fewest = a.skip > 0 ? kMinSkipping : kMinUnits;
  std::vector<Task> tasks;
  int left = units;
  for (int h = 0; h < a.heads; ++h) {
    const int n = a.units(h);
    int first = 0;
    do {
      const int size = whole ? n : std::max(fewest, left / (kShares * thread_count()));
      const int last = n - first < size + fewest ? n : first + size;
      tasks.push_back({h, first, last});
      left -= last - first;
      first = last;
    } while (first < n);
  }
  return tasks;
}

// Queries of one head in the order of AttentionArgs::queries, and the bias of centering.
void prepare(const AttentionJob& job, int head, float* queries, float* bias) {
  const AttentionArgs& a = job.args;
  const int rows = a.rows(), dim = a.k_dim;
  float row[kMaxDim];
  for (int r = 0; r < rows; ++r) {
    read_query(job.ends, head * a.group + r / a.length, r % a.length, dim, row);
    const int chunk = r / kRowChunk * kRowChunk, in_chunk = std::min(kRowChunk, rows - chunk);
    float* to = queries + int64_t{chunk} * dim + (r - chunk) * kTile;
    float dot = 0;
    for (int i = 0; i < dim; ++i) {
      to[i / kTile * in_chunk * kTile + i % kTile] = row[i];
      if (job.mu_k) dot += row[i] * job.mu_k[head * dim + i];
    }
    bias[r] = dot;
  }
}

// The parts of one head -> its output, log-sum-exp and what was read.
void merge(const AttentionJob& job, int head, const Partial* parts, int n) {
  for (int i = 0; job.reads && i < n; ++i) {
    job.reads[2 * head] += parts[i].reads[0];
    job.reads[2 * head + 1] += parts[i].reads[1];
  }
  const AttentionArgs& a = job.args;
  const int dim = a.v_dim;
  float row[kMaxDim];
  for (int r = 0; r < a.rows(); ++r) {
    const int query_head = head * a.group + r / a.length;
    const float* logits = job.ends.sink_logits;
    const float logit = logits ? logits[query_head] * kLog2E : kLowest;
    float top = logit, body = 0;
    for (int i = 0; i < n; ++i) top = std::max(top, parts[i].max[r]);
    float sum = logits ? std::exp2(logit - top) : 0;
    std::fill(row, row + dim, 0.0f);
    for (int i = 0; i < n; ++i) {
      const float factor = std::exp2(parts[i].max[r] - top);
      sum += factor * parts[i].sum[r];
      body += factor * parts[i].body_sum[r];
      const float* out = parts[i].out + int64_t{r} * dim;
      for (int d = 0; d < dim; ++d) row[d] += factor * out[d];
    }
    for (int d = 0; d < dim; ++d) {  // centers count with the mass of the body only
      row[d] = (row[d] + (job.mu_v ? body * job.mu_v[head * dim + d] : 0.0f)) / sum;
    }
    write_output(job.ends, query_head, r % a.length, dim, row);
    job.lse[int64_t{query_head} * a.length + r % a.length] = (top + std::log2(sum)) * kLn2;
  }
}

}  // namespace

void run_attention(const AttentionJob& job) {
  AttentionArgs a = job.args;
  const int64_t rows = a.rows();
  int units = 0;
  for (int h = 0; h < a.heads; ++h) units += a.units(h);
  const bool alone =
      thread_count() == 1 || units * kTile * rows * (a.k_dim + a.v_dim) < kSerialWork;
  const auto tasks = split(a, units, alone);
  const int64_t part_size = rows * (4 + a.v_dim + 2 * kMaxWidth);
  const Scratch<float> queries(a.heads * rows * (a.k_dim + 1)), scratch(tasks.size() * part_size);
  float* bias = queries.data.get() + a.heads * rows * a.k_dim;
  for (int h = 0; h < a.heads; ++h) {
    prepare(job, h, queries.data.get() + h * rows * a.k_dim, bias + h * rows);
  }
  a.queries = queries.data.get();
  a.bias = bias;

  std::vector<int32_t> reads(2 * tasks.size());
  if (job.reads) std::fill(job.reads, job.reads + 2 * a.heads, 0);
  std::vector<Partial> parts;
  std::vector<int> first_task(a.heads + 1);
  std::vector<std::atomic<int>> left(a.heads);  // tasks of each head that are not done
  for (size_t i = 0; i < tasks.size(); ++i) {
    float* at = scratch.data.get() + i * part_size;
    parts.push_back({at, at + rows, at + 2 * rows, at + 4 * rows, at + (4 + a.v_dim) * rows,
                     at + 3 * rows, &reads[2 * i]});
    first_task[tasks[i].head + 1] = static_cast<int>(i) + 1;
    ++left[tasks[i].head];
  }
  const auto one = [&](int i) {
    const Task& task = tasks[i];
    kernels().attend(a, task.head, task.first, task.last, parts[i]);
    if (--left[task.head] == 0) {  // whoever finishes a head merges it
      const int first = first_task[task.head];
      merge(job, task.head, &parts[first], first_task[task.head + 1] - first);
    }
  };
  if (alone) {
    for (size_t i = 0; i < tasks.size(); ++i) one(static_cast<int>(i));
  } else {
    parallel_for(static_cast<int>(tasks.size()), one);
  }
}

}  // namespace leankv
