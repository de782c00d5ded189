// Encoding, decoding and repacking of blocks, a task for each head and a few blocks.
#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "ends.h"
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
    const Body* body;    // null for exact rows, and for no rows
    int head, first, n;  // block, or exact rows; -1 for none
    int64_t to;          // output row
  };
  std::vector<Piece> pieces;
  const auto each = [&](int head, const Body* body, int first, int n, int64_t to) {
    for (int i = 0; i < n; i += kTile, to += kTile) {
      const int at = body ? first + i / kTile : first < 0 ? first : first + i;
      pieces.push_back(
          {.body = body, .head = head, .first = at, .n = std::min(kTile, n - i), .to = to});
    }
  };
  for (int head = 0; head < job.heads; ++head) {
    each(head, nullptr, 0, job.sinks, 0);
    int end = 0;
    for (int i = 0; i < job.n_bodies; ++i) {
      const auto& [start, heads] = job.places[i];
      if (!heads.empty() && std::find(heads.begin(), heads.end(), head) == heads.end()) continue;
      each(head, nullptr, -1, start - end, job.sinks + end);
      end = start + job.bodies[i].width * kTile;
      each(head, &job.bodies[i], 0, end - start, job.sinks + start);
    }
    each(head, nullptr, -1, job.slots - end, job.sinks + end);
    each(head, nullptr, job.sinks, job.exact - job.sinks, job.sinks + job.slots);
  }

  parallel_for(static_cast<int>(pieces.size()), [&](int i) {
    const Piece& p = pieces[i];
    const DecodeArgs& a = job.args;
    if (p.body) return kernels().decode(a, *p.body, p.head, p.first, p.to);
    if (p.first < 0) {
      for (const Output* out : {&a.k, &a.v}) {
        std::memset(out->row(p.head, p.to), 0, size_t(p.n) * out->row_stride * size_of(out->type));
      }
      return;
    }
    copy_exact(job.exact_k, a.k, a.k_rotation, p.head, p.first, p.n, job.k_dim, p.to);
    copy_exact(job.exact_v, a.v, a.v_rotation, p.head, p.first, p.n, job.v_dim, p.to);
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
      put_in_order(job->rotation, head, row);
      kernels().rotate(job->rotation, row);
      kernels().write(job->out, head, t, 1, dim, row);
    }
  };
  const int n = static_cast<int>(pieces.size());
  if (bytes >= kSerial) return parallel_for(n, one);
  for (int i = 0; i < n; ++i) one(i);
}

}  // namespace leankv
