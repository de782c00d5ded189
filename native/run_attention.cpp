// Decode attention: prepare the queries, split every head's tokens over the threads, merge.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "ends.h"
#include "scratch.h"
#include "shares.h"
#include "thread_pool.h"

namespace leankv {
namespace {

constexpr int kMinUnits = 8;              // of a task: less is not worth its merge
constexpr int kMinSkipping = 32;          // the same where each task scores the exact rows as well
constexpr int kCut = 4;                   // a task is this part of what is left of a share
constexpr int64_t kSerialWork = 1 << 20;  // products below which waking a thread costs more

struct Task {
  int head, first, last;
};

// At least one, so that a head without tokens has a task, and with it an output.
int units_of(const AttentionArgs& a, int head) { return std::max(1, a.units(head)); }

// Which task is whose does not change the result, only how the tasks are cut does.
struct Plan {
  std::vector<Task> tasks;  // in the order of heads and their units
  std::vector<int> ends;    // of each thread's share of the tasks
};

// The same number of units for each thread. The tasks of a share become smaller, so that there are
// small ones left for whoever is done first, and all end at about the same time.
Plan plan(const AttentionArgs& a, int units, int threads) {
  const int fewest = threads == 1 ? units : a.skip > 0 ? kMinSkipping : kMinUnits;
  threads = std::clamp(units / fewest, 1, threads);
  Plan plan;
  int head = 0, first = 0;  // the next unit
  for (int i = 1, done = 0; i <= threads; ++i) {
    for (const int end = static_cast<int>(int64_t{units} * i / threads); done < end;) {
      const int size = std::max(fewest, (end - done) / kCut);
      // Of the share and the head.
      const int left = std::min(end - done, units_of(a, head) - first);
      const int taken = left < size + fewest ? left : size;
      plan.tasks.push_back({.head = head, .first = first, .last = first + taken});
      done += taken;
      first += taken;
      if (first == units_of(a, head)) {
        first = 0;
        ++head;
      }
    }
    plan.ends.push_back(static_cast<int>(plan.tasks.size()));
  }
  return plan;
}

// The queries of all heads as AttentionArgs describes them, and the bias of centering.
class Queries {
 public:
  Queries(const AttentionJob& job, bool alone)
      : fixed_(kernels().pairs && job.ends.queries.type != Type::f32),
        rows_(job.args.rows()),
        dim_(job.args.k_dim),
        floats_(job.args.heads * rows_ * (dim_ + 2)),
        pairs_(fixed_ ? job.args.heads * rows_ * dim_ / 2 : 0) {
    bias_ = floats_.data.get() + job.args.heads * rows_ * dim_;
    steps_ = bias_ + job.args.heads * rows_;
    const auto one = [&](int head) { prepare(job, head); };
    if (alone) {
      for (int h = 0; h < job.args.heads; ++h) one(h);
    } else {
      parallel_for(job.args.heads, one);
    }
  }

  void give_to(AttentionArgs& a) const {
    a.queries = floats_.data.get();
    a.bias = bias_;
    if (fixed_) {
      a.pairs = pairs_.data.get();
      a.steps = steps_;
    }
  }

 private:
  void prepare(const AttentionJob& job, int head) {
    const AttentionArgs& a = job.args;
    float row[kMaxDim];
    for (int64_t r = 0; r < rows_; ++r) {
      read_query(job.ends, static_cast<int>(head * a.group + r / a.length), r % a.length, dim_,
                 row);
      const int64_t chunk = r / kRowChunk * kRowChunk;
      const int64_t in_chunk = std::min(kRowChunk + chunk, rows_) - chunk;
      const int64_t at = (head * rows_ + chunk) * dim_ + (r - chunk) * kTile;
      const QueryPlace place{.queries = floats_.data.get() + at,
                             .stride = in_chunk * kTile,
                             .pairs = fixed_ ? pairs_.data.get() + at / 2 : nullptr,
                             .step = steps_ + head * rows_ + r};
      const float* mu = job.mu_k ? job.mu_k + head * dim_ : nullptr;
      bias_[head * rows_ + r] = kernels().place(row, mu, dim_, place);
    }
  }

  const bool fixed_;  // point: products are of int16
  const int64_t rows_;
  const int dim_;
  const Scratch<float> floats_;
  const Scratch<int32_t> pairs_;
  float* bias_;
  float* steps_;
};

// The memory of what each task finds.
class Partials {
 public:
  Partials(size_t tasks, int rows, int v_dim)
      : rows_(rows),
        v_dim_(v_dim),
        // Whole cache lines, because neighbours are of different threads.
        size_((rows_ * (4 + v_dim_ + 2 * kMaxWidth) + 15) / 16 * 16),
        floats_(tasks * size_),
        reads_(2 * tasks) {}

  Partial of(size_t task) {
    float* next = floats_.data.get() + task * size_;
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    return {.max = take(rows_),  // in this order: `size_` floats in all
            .sum = take(rows_),
            .body_sum = take(rows_),
            .least = take(rows_),
            .out = take(rows_ * v_dim_),
            .lanes = take(2 * rows_ * kMaxWidth),
            .reads = &reads_[2 * task]};
  }

 private:
  const int64_t rows_;
  const int v_dim_;
  const int64_t size_;  // floats of a part
  const Scratch<float> floats_;
  std::vector<int32_t> reads_;
};

// The parts of one head -> its output, log-sum-exp and what was read.
void merge(const AttentionJob& job, int head, const Partial* parts, int n) {
  for (int i = 0; job.reads && i < n; ++i) {
    job.reads[2 * head] += parts[i].reads[0];
    job.reads[2 * head + 1] += parts[i].reads[1];
  }
  const AttentionArgs& a = job.args;
  const float* mu = job.mu_v ? job.mu_v + head * a.v_dim : nullptr;
  alignas(64) float row[kMaxDim];
  for (int r = 0; r < a.rows(); ++r) {
    const int query_head = head * a.group + r / a.length;
    const float* logits = job.ends.sink_logits;
    const float lse =
        kernels().merge(a, parts, n, r, logits ? logits[query_head] * kLog2E : kLowest, mu, row);
    write_output(job.ends, query_head, r % a.length, a.v_dim, row);
    job.lse[int64_t{query_head} * a.length + r % a.length] = lse * kLn2;
  }
}

}  // namespace

void run_attention(const AttentionJob& job) {
  AttentionArgs a = job.args;
  const int64_t rows = a.rows();
  int units = 0;
  for (int h = 0; h < a.heads; ++h) units += units_of(a, h);
  const bool alone =
      thread_count() == 1 || units * kTile * rows * (a.k_dim + a.v_dim) < kSerialWork;
  const auto [tasks, ends] = plan(a, units, alone ? 1 : thread_count());
  Partials memory(tasks.size(), a.rows(), a.v_dim);
  const Queries queries(job, alone);
  queries.give_to(a);

  if (job.reads) std::fill(job.reads, job.reads + 2 * a.heads, 0);
  std::vector<Partial> parts;
  std::vector<int> first_task(a.heads + 1);
  std::vector<std::atomic<int>> left(a.heads);  // tasks of each head that are not done
  for (size_t i = 0; i < tasks.size(); ++i) {
    parts.push_back(memory.of(i));
    first_task[tasks[i].head + 1] = static_cast<int>(i) + 1;
    ++left[tasks[i].head];
  }
  Shares shares(ends);
  const auto work = [&](int own) {
    for (int i = shares.take(own); i >= 0; i = shares.take(own)) {
      const Task& task = tasks[i];
      kernels().attend(a, task.head, task.first, task.last, parts[i]);
      if (--left[task.head] == 0) {  // whoever finishes a head merges it
        const int first = first_task[task.head];
        merge(job, task.head, &parts[first], first_task[task.head + 1] - first);
      }
    }
  };
  if (shares.count() == 1) {
    work(0);
  } else {
    parallel_for(shares.count(), work);
  }
}

}  // namespace leankv
