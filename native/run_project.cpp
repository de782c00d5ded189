// Products with quantized weights: up to kMaxRows rows multiply with the codes, tile by tile, a
// group of channels for all of them before the next; more rows multiply with tiles that are
// unpacked.
//
// What a row of few gets does not depend on how many there are, if all channels take part: how the
// channels are cut depends on the weights alone, and each output is summed up in their order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "run.h"
#include "scratch.h"
#include "shares.h"
#include "thread_pool.h"

namespace leankv {
namespace {

constexpr int kBlockRows = 512;   // of many: what is unpacked once for them
constexpr int kPanel = 128;       // channels that are unpacked together: a panel stays in L1
constexpr int kFewTiles = 32;     // that are cut, so that all threads get equally much
constexpr int kShortest = 256;    // channels of a part
constexpr int kFinished = 16384;  // products that one thread finishes: some microseconds

int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

Vectors from_row(Vectors v, int64_t row) {
  if (v.data) v.data = v.row(0, row);
  return v;
}
Output from_row(Output out, int64_t row) {
  out.data = out.row(0, row);
  return out;
}

// Rows of inputs as the weights see them.
class Inputs {
 public:
  explicit Inputs(const ProjectJob& job) : job_(job), norm_(job.norm.data ? job.inputs : 0) {
    if (job.norm.data) kernels().read(job.norm, 0, 0, 1, job.inputs, norm_.data.get());
  }

  void read(int r, float* row) const {
    kernels().read(job_.x, 0, r, 1, job_.inputs, row);
    if (job_.norm.data) kernels().norm(row, norm_.data.get(), job_.eps, job_.inputs);
  }
  // Whether a channel takes part; one that is no number does.
  bool chosen(int k, float x) const {
    const float size = job_.norms ? std::fabs(x) * job_.norms[k] : std::fabs(x);
    return !(size <= job_.threshold);
  }

 private:
  const ProjectJob& job_;
  Scratch<float> norm_;
};

// What the products of rows [first, first + rows) go through, and where they go.
class Finishes {
 public:
  Finishes(const ProjectJob& job, int first, int rows)
      : gated_(job.gate == Gate::none ? 0 : size_t(rows) * job.products[0].weight.outputs) {
    for (int i = 0; i < job.n; ++i) {
      const Product& product = job.products[i];
      const int n = product.weight.outputs;
      biases_.emplace_back(product.bias.data ? n : 0);
      float* bias = product.bias.data ? biases_.back().data.get() : nullptr;
      if (bias) kernels().read(product.bias, 0, 0, 1, n, bias);
      Finish f{.bias = bias, .residual = from_row(job.residual, first)};
      if (job.gate == Gate::none || i == 1) f.out = from_row(product.out, first);
      if (job.gate != Gate::none && i == 0) {
        f.gate = job.gate;
        f.residual = {};
        f.out = {.data = gated_.data.get(), .row_stride = n};
      }
      if (job.gate != Gate::none && i == 1) {
        f.factors = {.data = gated_.data.get(), .row_stride = n};
      }
      all_.push_back(f);
    }
  }

  const Finish& operator[](int i) const { return all_[i]; }

 private:
  Scratch<float> gated_;
  std::vector<Scratch<float>> biases_;
  std::vector<Finish> all_;
};

// The channels that take part, of all rows.
class Taken {
 public:
  explicit Taken(const ProjectJob& job)
      : rows_(job.rows),
        inputs_(job.inputs),
        x_(size_t(job.rows) * job.inputs),
        values_(size_t(job.rows) * (job.inputs + 1)),
        sums_(size_t(job.rows) * job.inputs / kStretch),
        ids_(job.inputs + kAhead + 1),
        starts_(job.inputs / kStretch + 1) {
    const Inputs inputs(job);
    for (int r = 0; r < rows_; ++r) inputs.read(r, x_.data.get() + int64_t{r} * inputs_);
    const int n = rows_ == 1 ? (job.sparse ? take<true, 1>(inputs) : take<false, 1>(inputs))
                             : (job.sparse ? take<true, 0>(inputs) : take<false, 0>(inputs));
    for (int i = 0; i < kAhead; ++i) ids()[n + i] = inputs_ + (n ? ids()[i % n] : 0);
  }

  Channels channels() const {
    return {.rows = rows_,
            .ids = ids_.data.get(),
            .starts = starts_.data.get(),
            .values = values_.data.get(),
            .sums = sums_.data.get()};
  }
  int read() const { return read_; }

 private:
  int32_t* ids() { return ids_.data.get(); }

  // Writes every channel behind the last one taken, and goes on from there if it is taken: which
  // ones are is not foreseeable. Rows: how many there are, 0 if the compiler is not to know.
  template <bool Sparse, int Rows>
  int take(const Inputs& inputs) {
    const int rows = Rows ? Rows : rows_;
    int n = 0;
    for (int s = 0; s < inputs_ / kStretch; ++s) {
      const int begin = starts_.data.get()[s] = n;
      for (int k = s * kStretch; k < (s + 1) * kStretch; ++k) {
        ids()[n] = k;
        bool taken = !Sparse;
        for (int r = 0; r < rows; ++r) {
          float x = x_.data.get()[int64_t{r} * inputs_ + k];
          if constexpr (Sparse) {
            const bool chosen = inputs.chosen(k, x);
            x = chosen ? x : 0.0f;
            taken |= chosen;
            read_ += chosen;
          }
          value(n)[r] = x;
        }
        n += taken;
      }
      for (int r = 0; r < rows; ++r) {
        float sums[4] = {};  // that do not wait for each other
        for (int i = begin; i < n; ++i) sums[(i - begin) % 4] += value(i)[r];
        sums_.data.get()[s * rows + r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    }
    starts_.data.get()[inputs_ / kStretch] = n;
    return n;
  }

  float* value(int i) { return values_.data.get() + int64_t{i} * rows_; }

  int rows_, inputs_, read_ = 0;
  Scratch<float> x_, values_, sums_;
  Scratch<int32_t> ids_, starts_;
};

// The tiles of all weights, cut into parts of their channels where there are few of them, and the
// memory of what each part sums up to.
class Parts {
 public:
  struct Part {
    const Weight* weight;
    int tile, first, last;
    float* out;  // [R, P]
  };

  explicit Parts(const ProjectJob& job) : job_(job), memory_(size(job)) {
    float* out = memory_.data.get();
    for (int i = 0; i < job.n; ++i) {
      const Weight& w = job.products[i].weight;
      const int cut = cuts(job), part = rounded_up((job.inputs + cut - 1) / cut, w.group);
      products_.push_back(out);
      for (int t = 0; t < w.tiles(); ++t) {
        for (int p = 0; p < cut; ++p, out += int64_t{job.rows} * w.tile()) {
          all_.push_back({.weight = &w,
                          .tile = t,
                          .first = std::min(p * part, job.inputs),
                          .last = std::min((p + 1) * part, job.inputs),
                          .out = out});
        }
      }
    }
  }

  const std::vector<Part>& all() const { return all_; }

  // Of all rows by one tile of a product.
  Products products(int i, int tile) const {
    const Weight& w = job_.products[i].weight;
    const int64_t size = int64_t{job_.rows} * w.tile();
    return {.from = products_[i] + tile * cuts(job_) * size,
            .row_stride = w.tile(),
            .part_stride = size,
            .parts = cuts(job_),
            .row = 0,
            .rows = job_.rows,
            .column = tile * w.tile(),
            .columns = std::min(w.tile(), w.outputs - tile * w.tile())};
  }

 private:
  // The shapes alone decide, so that the order of a sum does not depend on the threads.
  static int cuts(const ProjectJob& job) {
    int tiles = 0;
    for (int i = 0; i < job.n; ++i) tiles += job.products[i].weight.tiles();
    return std::clamp(kFewTiles / tiles, 1, std::max(1, job.inputs / kShortest));
  }
  static size_t size(const ProjectJob& job) {
    size_t outputs = 0;
    for (int i = 0; i < job.n; ++i) {
      outputs += size_t(job.products[i].weight.tiles()) * job.products[i].weight.tile();
    }
    return outputs * job.rows * cuts(job);
  }

  const ProjectJob& job_;
  Scratch<float> memory_;
  std::vector<float*> products_;
  std::vector<Part> all_;
};

void run_few(const ProjectJob& job) {
  const Taken taken(job);
  if (job.read) *job.read = taken.read();
  const Channels channels = taken.channels();
  const Parts parts(job);
  const int n = static_cast<int>(parts.all().size()), threads = std::min(thread_count(), n);
  std::vector<int> ends(threads);
  for (int i = 0; i < threads; ++i) ends[i] = static_cast<int>(int64_t{n} * (i + 1) / threads);
  Shares shares(ends);
  parallel_for(threads, [&](int own) {
    for (int i = shares.take(own); i >= 0; i = shares.take(own)) {
      const Parts::Part& part = parts.all()[i];
      kernels().multiply(*part.weight, channels, part.tile, part.first, part.last, part.out);
    }
  });

  const Finishes finishes(job, 0, job.rows);
  for (int i = 0; i < job.n; ++i) {
    const Weight& w = job.products[i].weight;
    const int together = std::max(1, kFinished / (job.rows * w.tile()));
    parallel_for((w.tiles() + together - 1) / together, [&](int turn) {
      const int end = std::min(w.tiles(), (turn + 1) * together);
      for (int t = turn * together; t < end; ++t) {
        kernels().finish(finishes[i], parts.products(i, t));
      }
    });
  }
}

// Many rows, [block of rows][K][rows of a block]: what they are multiplied with is the same for all
// lanes of a vector.
class Blocks {
 public:
  Blocks(const ProjectJob& job, int first, int rows)
      : block_(kernels().block),
        inputs_(job.inputs),
        x_(size_t(rounded_up(rows, block_)) * inputs_) {
    const Inputs inputs(job);
    std::atomic<int> read{0};
    const int blocks = (rows + block_ - 1) / block_;
    parallel_for(blocks, [&](int b) {
      const Scratch<float> row(inputs_);
      int chosen = 0;
      for (int r = 0; r < block_; ++r) {
        const int at = b * block_ + r;
        float* from = row.data.get();
        if (at >= rows) {
          std::fill_n(from, inputs_, 0.0f);
        } else {
          inputs.read(first + at, from);
          if (job.sparse) chosen += choose(inputs, from);
        }
        float* to = x_.data.get() + int64_t{b} * block_ * inputs_ + r;
        for (int k = 0; k < inputs_; ++k) to[int64_t{k} * block_] = from[k];
      }
      read += chosen;
    });
    read_ = read;
  }

  const float* at(int block, int channel) const {
    return x_.data.get() + (int64_t{block} * inputs_ + channel) * block_;
  }
  int read() const { return read_; }

 private:
  int choose(const Inputs& inputs, float* row) const {
    int chosen = 0;
    for (int k = 0; k < inputs_; ++k) {
      const bool yes = inputs.chosen(k, row[k]);
      row[k] = yes ? row[k] : 0.0f;
      chosen += yes;
    }
    return chosen;
  }

  int block_, inputs_, read_ = 0;
  Scratch<float> x_;
};

// Blocks [first, last) of the rows by one tile.
struct ManyTask {
  int product, tile, first, last;
};

void multiply_many(const ManyTask& task, const Weight& w, const Blocks& x, const Finish& finish,
                   int rows, float* panels, float* out) {
  const Kernels& k = kernels();
  const int width = (w.tile() + k.columns - 1) / k.columns, blocks = task.last - task.first;
  for (int from = 0; from < w.inputs; from += kPanel) {
    const int n = std::min(kPanel, w.inputs - from);
    k.unpack(w, task.tile, from, n, panels);
    for (int panel = 0; panel < width; ++panel) {
      for (int b = 0; b < blocks; ++b) {
        k.multiply_block(x.at(task.first + b, from), panels + int64_t{panel} * n * k.columns, n,
                         from > 0, out + (int64_t{panel} * blocks + b) * k.block * k.columns);
      }
    }
  }
  const int row = task.first * k.block, end = std::min(rows, task.last * k.block);
  for (int panel = 0; panel < width; ++panel) {
    const int column = task.tile * w.tile() + panel * k.columns;
    const int columns = std::min({k.columns, w.tile() - panel * k.columns, w.outputs - column});
    if (columns <= 0) break;
    k.finish(finish, {.from = out + int64_t{panel} * blocks * k.block * k.columns,
                      .row_stride = k.columns,
                      .row = row,
                      .rows = end - row,
                      .column = column,
                      .columns = columns});
  }
}

void run_many(const ProjectJob& job, int first, int rows) {
  const Blocks x(job, first, rows);
  if (job.read) *job.read += x.read();
  const Finishes finishes(job, first, rows);
  const int block = kernels().block, blocks = (rows + block - 1) / block;
  // The first output of a gate is a factor of the second.
  const int stages = job.gate == Gate::none ? 1 : 2;
  for (int stage = 0; stage < stages; ++stage) {
    const int begin = stage, end = stages == 1 ? job.n : stage + 1;
    int tiles = 0, widest = 0;
    for (int i = begin; i < end; ++i) {
      tiles += job.products[i].weight.tiles();
      widest = std::max(widest, rounded_up(job.products[i].weight.tile(), kernels().columns));
    }
    const int cuts = std::clamp(kFewTiles / tiles, 1, std::max(1, blocks / 16));
    const int cut = (blocks + cuts - 1) / cuts;
    std::vector<ManyTask> tasks;
    for (int i = begin; i < end; ++i) {
      for (int t = 0; t < job.products[i].weight.tiles(); ++t) {
        for (int b = 0; b < blocks; b += cut) {
          tasks.push_back({.product = i, .tile = t, .first = b, .last = std::min(blocks, b + cut)});
        }
      }
    }
    std::atomic<int> next{0};
    const int n = static_cast<int>(tasks.size()), threads = std::min(thread_count(), n);
    const size_t panels = size_t(widest) * kPanel, size = panels + size_t(widest) * cut * block;
    const Scratch<float> memory(size * threads);
    // A loop over threads, so that each has memory for all its tasks.
    parallel_for(threads, [&](int thread) {
      float* own = memory.data.get() + size * thread;
      for (int i = next++; i < n; i = next++) {
        const int product = tasks[i].product;
        multiply_many(tasks[i], job.products[product].weight, x, finishes[product], rows, own,
                      own + panels);
      }
    });
  }
}

}  // namespace

void run_project(const ProjectJob& job) {
  if (job.read) *job.read = 0;
  if (job.rows == 0) return;
  if (job.rows <= kMaxRows) return run_few(job);
  const int turns = (job.rows + kBlockRows - 1) / kBlockRows;
  const int rows = rounded_up((job.rows + turns - 1) / turns, kernels().block);
  for (int first = 0; first < job.rows; first += rows) {
    run_many(job, first, std::min(rows, job.rows - first));
  }
}

}  // namespace leankv
