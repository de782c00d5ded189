// Encoding, decoding and repacking of blocks, a task for each head and a few blocks.
#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "run.h"
#include "thread_pool.h"

namespace leankv {
namespace {

// Exact rows [first, first + n), n <= 32, of one side to output rows from `to` on.
void copy_exact(const Vectors& from, const Output& out, const Rotation& rotation, int head,
                int first, int n, int dim, int64_t to) {
  alignas(64) float rows[kTile * kMaxDim];
  kernels().read(from, head, first, n, dim, rows);
  int out_dim = dim;
  if (rotation.signs) {
    out_dim = rotation.head_dim;
    for (int t = 0; t < n; ++t) {
      kernels().unrotate(rotation, rows + t * dim);
      std::copy_n(rows + t * dim, out_dim, rows + t * out_dim);
    }
  }
  kernels().write(out, head, to, n, out_dim, rows);
}

}  // namespace

void run_encode(const EncodeArgs& args, int heads) {
  const int blocks = blocks_of(args.tokens);
  parallel_for(heads * blocks, [&](int i) { kernels().encode(args, i / blocks, i % blocks); });
}

void run_repack(const RepackArgs& args, int heads) {
  constexpr int kBlocks = 16;  // of a task: some ten microseconds
  const int all = heads * blocks_of(args.kept);
  parallel_for((all + kBlocks - 1) / kBlocks, [&](int task) {
    const int last = std::min(all, (task + 1) * kBlocks);
    for (int i = task * kBlocks; i < last; ++i) {
      kernels().repack(args, i / blocks_of(args.kept), i % blocks_of(args.kept));
    }
  });
}

void run_decode(const DecodeJob& job) {
  struct Piece {
    const Body* body;  // null for exact rows
    int first, n;      // block, or exact rows
    int64_t to;        // output row
  };
  std::vector<Piece> pieces;
  int64_t to = 0;
  const auto exact = [&](int first, int last) {
    for (; first < last; first += kTile) {
      const int n = std::min(kTile, last - first);
      pieces.push_back({.body = nullptr, .first = first, .n = n, .to = to});
      to += n;
    }
  };
  exact(0, job.sinks);
  for (const Body* body = job.bodies; body < job.bodies + job.n_bodies; ++body) {
    for (int b = 0; b < body->width; ++b, to += kTile) {
      pieces.push_back({.body = body, .first = b, .n = kTile, .to = to});
    }
  }
  exact(job.sinks, job.exact);

  const int n = static_cast<int>(pieces.size());
  parallel_for(n * job.heads, [&](int i) {
    const Piece& piece = pieces[i % n];
    const int head = i / n;
    const DecodeArgs& a = job.args;
    if (piece.body) return kernels().decode(a, *piece.body, head, piece.first, piece.to);
    copy_exact(job.exact_k, a.k, a.k_rotation, head, piece.first, piece.n, job.k_dim, piece.to);
    copy_exact(job.exact_v, a.v, a.v_rotation, head, piece.first, piece.n, job.v_dim, piece.to);
  });
}

void run_append(const std::vector<AppendJob>& jobs) {
  constexpr int kRows = 4 * kTile;       // of a task, which is one head in a decode step
  constexpr size_t kSerial = 256 << 10;  // bytes below which waking a thread costs more
  struct Piece {
    const AppendJob* job;
    int head, first, last;
  };
  std::vector<Piece> pieces;
  size_t bytes = 0;
  for (const AppendJob& job : jobs) {
    const int rows = job.n_exact + job.n_rows;
    bytes += size_t(job.heads) * rows * job.rotation.dim * size_of(job.out.type);
    for (int head = 0; head < job.heads; ++head) {
      for (int first = 0; first < rows; first += kRows) {
        pieces.push_back({&job, head, first, std::min(first + kRows, rows)});
      }
    }
  }
  const auto one = [&](int i) {
    alignas(64) float row[kMaxDim];
    const auto& [job, head, first, last] = pieces[i];
    const Vectors& exact = job->exact;
    const int dim = job->rotation.dim, given = job->rotation.head_dim;
    const float* scales = job->scales ? job->scales + int64_t{head} * given : nullptr;
    const int old = std::clamp(job->n_exact, first, last);
    const size_t bytes_of_row = size_t(dim) * size_of(exact.type);
    const int together = exact.row_stride == dim ? old - first : 1;  // rows without gaps
    for (int t = first; t < old; t += together) {
      std::memcpy(job->out.row(head, t), exact.row(head, t), together * bytes_of_row);
    }
    for (int t = old; t < last; ++t) {
      std::fill(row + given, row + dim, 0.0f);
      kernels().read(job->rows, head, t - job->n_exact, 1, given, row);
      for (int i = 0; scales && i < given; ++i) row[i] /= scales[i];
      kernels().rotate(job->rotation, row);
      kernels().write(job->out, head, t, 1, dim, row);
    }
  };
  const int n = static_cast<int>(pieces.size());
  if (bytes >= kSerial) return parallel_for(n, one);
  for (int i = 0; i < n; ++i) one(i);
}

}  // namespace leankv
