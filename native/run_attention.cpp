// Decode attention: prepare the queries, split the tokens of every head of every sequence over the
// threads, merge.
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
  int sequence, head, first, last;
};

// At least one, so that a head without tokens has a task, and with it an output.
int units_of(const AttentionArgs& a, int head) { return std::max(1, a.units(head)); }

// Whether other threads would cost more than they do.
bool for_one_thread(const AttentionArgs& a, int units) {
  return thread_count() == 1 ||
         int64_t{units} * kTile * a.rows() * (a.k_dim + a.v_dim) < kSerialWork;
}

// How many threads have something to do.
int threads_for(const AttentionArgs& a, int units) {
  if (for_one_thread(a, units)) return 1;
  return std::clamp(units / (a.skip > 0 ? kMinSkipping : kMinUnits), 1, thread_count());
}

// Appends the tasks of a sequence, in the order of heads and their units; returns how many units it
// has. It is cut as if it were alone, into shares of the same number of units whose tasks become
// smaller, so that there are small ones left for whoever is done first, and all end at about the
// same time. Where it is cut is what its result depends on, and who takes a task is not.
int cut(const AttentionArgs& a, int sequence, std::vector<Task>& tasks) {
  int units = 0;
  for (int h = 0; h < a.heads; ++h) units += units_of(a, h);
  const int threads = threads_for(a, units);
  const int fewest = for_one_thread(a, units) ? units : a.skip > 0 ? kMinSkipping : kMinUnits;
  int head = 0, first = 0;  // the next unit
  for (int i = 1, done = 0; i <= threads; ++i) {
    for (const int end = static_cast<int>(int64_t{units} * i / threads); done < end;) {
      const int size = std::max(fewest, (end - done) / kCut);
      // Of the share and the head.
      const int left = std::min(end - done, units_of(a, head) - first);
      const int taken = left < size + fewest ? left : size;
      tasks.push_back({.sequence = sequence, .head = head, .first = first, .last = first + taken});
      done += taken;
      first += taken;
      if (first == units_of(a, head)) {
        first = 0;
        ++head;
      }
    }
  }
  return units;
}

// The ends of each thread's share of the tasks, which have so many units.
std::vector<int> shares_of(const std::vector<Task>& tasks, int units, int threads) {
  std::vector<int> ends;
  size_t next = 0;
  for (int i = 1, done = 0; i <= threads; ++i) {
    const int end = static_cast<int>(int64_t{units} * i / threads);
    for (; done < end; ++next) done += tasks[next].last - tasks[next].first;
    ends.push_back(static_cast<int>(next));
  }
  return ends;
}

// The queries of all sequences as AttentionArgs describes them, and the bias of centering.
class Queries {
 public:
  explicit Queries(const std::vector<AttentionJob>& jobs)
      : jobs_(jobs),
        fixed_(kernels().pairs && jobs[0].ends.queries.type != Type::f32),
        rows_(jobs[0].args.rows()),
        heads_(jobs[0].args.heads),
        dim_(jobs[0].args.k_dim),
        floats_(jobs.size() * heads_ * rows_ * (dim_ + 2)),
        pairs_(fixed_ ? jobs.size() * heads_ * rows_ * dim_ / 2 : 0) {
    bias_ = floats_.data.get() + jobs.size() * heads_ * rows_ * dim_;
    steps_ = bias_ + jobs.size() * heads_ * rows_;
  }

  void prepare(int sequence, int head) {
    const AttentionJob& job = jobs_[sequence];
    const AttentionArgs& a = job.args;
    const int64_t first = first_row(sequence) + head * rows_;
    const float* scales = job.scales ? job.scales + head * job.ends.k_rotation.head_dim : nullptr;
    float row[kMaxDim];
    for (int64_t r = 0; r < rows_; ++r) {
      read_query(job.ends, head, static_cast<int>(head * a.group + r / a.length), r % a.length,
                 dim_, scales, row);
      const int64_t chunk = r / kRowChunk * kRowChunk;
      const int64_t in_chunk = std::min(kRowChunk + chunk, rows_) - chunk;
      const int64_t at = (first + chunk) * dim_ + (r - chunk) * kTile;
      const QueryPlace place{.queries = floats_.data.get() + at,
                             .stride = in_chunk * kTile,
                             .pairs = fixed_ ? pairs_.data.get() + at / 2 : nullptr,
                             .step = steps_ + first + r};
      const float* mu = job.mu_k ? job.mu_k + head * dim_ : nullptr;
      bias_[first + r] = kernels().place(row, mu, dim_, place);
    }
  }

  void give_to(AttentionArgs& a, int sequence) const {
    const int64_t row = first_row(sequence);
    a.queries = floats_.data.get() + row * dim_;
    a.bias = bias_ + row;
    if (fixed_) {
      a.pairs = pairs_.data.get() + row * dim_ / 2;
      a.steps = steps_ + row;
    }
  }

 private:
  int64_t first_row(int sequence) const { return int64_t{sequence} * heads_ * rows_; }

  const std::vector<AttentionJob>& jobs_;
  const bool fixed_;  // point: products are of int16
  const int64_t rows_;
  const int heads_, dim_;
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

void run_attention(const std::vector<AttentionJob>& jobs) {
  const AttentionArgs& shape = jobs.front().args;  // of all, but for the tokens
  const int n = static_cast<int>(jobs.size()), heads = shape.heads;
  std::vector<Task> tasks;
  int units = 0;
  for (int i = 0; i < n; ++i) units += cut(jobs[i].args, i, tasks);
  Shares shares(shares_of(tasks, units, threads_for(shape, units)));
  // f(i), i < count, by all threads that there are shares for.
  const auto each = [&](int count, const auto& f) {
    if (shares.count() > 1) return parallel_for(count, f);
    for (int i = 0; i < count; ++i) f(i);
  };

  Partials memory(tasks.size(), shape.rows(), shape.v_dim);
  Queries queries(jobs);
  each(n * heads, [&](int i) { queries.prepare(i / heads, i % heads); });
  std::vector<AttentionArgs> args;
  for (int i = 0; i < n; ++i) {
    args.push_back(jobs[i].args);
    queries.give_to(args.back(), i);
    if (jobs[i].reads) std::fill(jobs[i].reads, jobs[i].reads + 2 * heads, 0);
  }

  std::vector<Partial> parts;
  // Of each head of each sequence: its first task, and tasks that are not done.
  std::vector<int> first_task(n * heads + 1);
  std::vector<std::atomic<int>> left(n * heads);
  for (size_t i = 0; i < tasks.size(); ++i) {
    const int head = tasks[i].sequence * heads + tasks[i].head;
    parts.push_back(memory.of(i));
    first_task[head + 1] = static_cast<int>(i) + 1;
    ++left[head];
  }
  each(shares.count(), [&](int own) {
    for (int i = shares.take(own); i >= 0; i = shares.take(own)) {
      const Task& task = tasks[i];
      kernels().attend(args[task.sequence], task.head, task.first, task.last, parts[i]);
      const int head = task.sequence * heads + task.head;
      if (--left[head] == 0) {  // whoever finishes a head merges it
        const int first = first_task[head];
        merge(jobs[task.sequence], task.head, &parts[first], first_task[head + 1] - first);
      }
    }
  });
}

}  // namespace leankv
