// Decode attention of one head: online softmax over its blocks, then over its exact rows.
#pragma once

namespace leankv::LEANKV_ISA {

// Up to kRowChunk query rows of a head and where their results go.
struct Chunk {
  int first = 0, rows = 0, v_dim = 0;
  Factors queries;                 // a tile for each channel group
  const int32_t* pairs = nullptr;  // of the queries, see AttentionArgs
  const float* bias = nullptr;     // [rows]
  float* max = nullptr;            // [rows]
  float* body_sum = nullptr;       // [rows][W]
  float* exact_sum = nullptr;      // [rows][W]
  float* out = nullptr;            // [rows][v_dim]
  float* least = nullptr;          // [rows]
  int32_t* reads = nullptr;        // [2], see Partial
};

// Rescales everything of row r to a new maximum.
inline void move_max(const Chunk& chunk, int r, float to) {
  const float factor = __builtin_exp2f(chunk.max[r] - to);
  chunk.max[r] = to;
  store(chunk.body_sum + r * W, load(chunk.body_sum + r * W) * factor);
  store(chunk.exact_sum + r * W, load(chunk.exact_sum + r * W) * factor);
  float* out = chunk.out + r * chunk.v_dim;
  for (int i = 0; i < chunk.v_dim; i += W) store(out + i, load(out + i) * factor);
}

// x of the slots of vector v that are in use, y of others. `live`: how many are, an Index<32> if
// all are, as in all blocks but a head's last one.
template <class Live>
LEANKV_INLINE vf in_use(int v, Live live, vf x, vf y) {
  if constexpr (std::is_same_v<Live, Index<kTile>>) {
    return x;
  } else {
    return lane_ids() + v * W < live ? x : y;
  }
}

// One row of 32 scores -> probabilities relative to the row's maximum, 0 behind `live`. Returns
// whether any score is above the row's least one.
template <class Live>
LEANKV_INLINE bool softmax(const Chunk& chunk, int r, const vf* scores, Live live, float* sums,
                           vf* probabilities) {
  vf masked[NV], top = splat(kLowest);
  unroll<NV>([&](auto v) LEANKV_LAMBDA {
    masked[v] = in_use(v, live, scores[v], splat(kLowest));
    top = vmax(top, masked[v]);
  });
  if (any_above(top, chunk.max[r]))
    move_max(chunk, r, max(top));  // seldom: finding a maximum is slow
  vf total = load(sums + r * W);
  unroll<NV>([&](auto v) LEANKV_LAMBDA {
    probabilities[v] = in_use(v, live, exp2_negative(masked[v] - chunk.max[r]), vf{});
    total += probabilities[v];
  });
  store(sums + r * W, total);
  return any_above(top, chunk.least[r]);
}

// Scales of 32 slots: K in the low halves of the words, V in the high halves.
struct Scales {
  vf k[NV], v[NV];

  LEANKV_INLINE explicit Scales(const uint32_t* words) {
    unroll<NV>([&](auto n) LEANKV_LAMBDA {
      const vu word = load<vu>(words + n * W);
      k[n] = from_f16(__builtin_convertvector(word & 0xFFFFu, vh));
      v[n] = from_f16(__builtin_convertvector(word >> 16, vh));
    });
  }
};

// `next`: the block that follows. Where the values of this one are not read, those of the next,
// which are likely not to be either, are not fetched.
template <class Live>
inline void attend_block(const Chunk& chunk, const Format& format, const uint32_t* block, Live live,
                         const uint32_t* next) {
  alignas(64) float scores[kRowChunk * kTile];
  for (int i = 0; i < chunk.rows * kTile; i += W) store(scores + i, vf{});
  const int64_t ahead = next - block;
  const uint32_t* values = key_tiles(format.k, block, ahead, chunk.rows, chunk.queries, scores);
  const uint32_t* behind = values + format.v.words();
  const Scales scales(behind);
  fetch(behind + ahead, kTile);
  bool read = false;  // whether any row needs the values
  for (int r = 0; r < chunk.rows; ++r) {
    vf s[NV], p[NV];
    unroll<NV>([&](auto n) LEANKV_LAMBDA {
      s[n] = load(scores + r * kTile + n * W) * scales.k[n] + chunk.bias[r];
    });
    const bool counts = softmax(chunk, r, s, live, chunk.body_sum, p);
    read |= counts;
    unroll<NV>([&](auto n)
                   LEANKV_LAMBDA {  // a select, because the scale of an unused slot may be NaN
                     const vf weighted = in_use(n, live, p[n] * scales.v[n], vf{});
                     store(scores + r * kTile + n * W, counts ? weighted : vf{});
                   });
  }
  if (read) {
    Factors weights{.x = scores};
#ifdef LEANKV_PAIRS
    alignas(64) int16_t pairs[kRowChunk * kTile * W];
    float steps[kRowChunk];
    if (chunk.queries.pairs) {
      for (int r = 0; r < chunk.rows; ++r) {
        steps[r] = step_of_weights(scores + r * kTile);
        alignas(64) int32_t packed[kPairs];
        pack_pairs(scores + r * kTile, steps[r], packed);
        repeat_pairs(packed, kPairs, pairs + r * kTile * W);
      }
      weights = {.x = scores, .pairs = pairs, .steps = steps};
    }
#endif
    value_tiles(format.v, values, ahead, chunk.rows, weights, chunk.out);
  }
  chunk.reads[0] += read;
  ++chunk.reads[1];
}

// n blocks of a body, from block `first` on.
inline void attend_blocks(Chunk chunk, const Body& body, int head, int first, int n) {
#ifdef LEANKV_PAIRS
  alignas(64) int16_t pairs[kRowChunk * kMaxDim * W];
  if (chunk.pairs) {
    repeat_pairs(chunk.pairs, chunk.rows * body.format.k.dim() / 2, pairs);
    chunk.queries.pairs = pairs;
  }
#endif
  // As Body::block, but the words of a block are added up once.
  const int words = body.format.words(), length = body.lengths[head];
  const int32_t* table = body.table + int64_t{head} * body.width;
  const auto block = [&](int i) LEANKV_LAMBDA { return body.pool + int64_t{table[i]} * words; };
  for (int i = first; i < first + n; ++i) {
    const int left = length - i * kTile;
    // The one behind the last is most likely this thread's as well.
    const uint32_t* next = block(left > kTile ? i + 1 : i);
    if (left < kTile) {
      attend_block(chunk, body.format, block(i), left, next);
    } else {
      attend_block(chunk, body.format, block(i), Index<kTile>{}, next);
    }
  }
}

// Scores of n exact rows: scores[r][t] = q_r . k_t. Their values v, which add_rows reads in another
// order than they lie in, are fetched meanwhile.
template <Type T, int R>
void dot_rows(const Vectors& k, const Vectors& v, int head, int first, int n, int dim, int v_dim,
              const float* q, float* scores) {
  constexpr int N = R <= kAccumulators / 2 ? 2 : 1;  // rows at a time
  for (int t = 0; t < n; t += N) {
    const char* rows[N];
    unroll<N>([&](auto j) LEANKV_LAMBDA {
      const int row = t + j < n ? t + j : t;
      rows[j] = k.row(head, first + row);
      const char* values = v.row(head, first + row);
      for (int i = 0; i < v_dim * size_of(v.type); i += 64) __builtin_prefetch(values + i);
    });
    vf sums[N][R] = {};
    for (int c = 0; c < dim / kTile; ++c) {
      unroll<NV>([&](auto i) LEANKV_LAMBDA {
        vf x[N];
        unroll<N>([&](auto j) LEANKV_LAMBDA { x[j] = read_vector<T>(rows[j], c * kTile + i * W); });
        unroll<R>([&](auto r) LEANKV_LAMBDA {
          const vf y = load(q + (c * R + r) * kTile + i * W);
          unroll<N>([&](auto j) LEANKV_LAMBDA { sums[j][r] += x[j] * y; });
        });
      });
    }
    unroll<N>([&](auto j) LEANKV_LAMBDA {
      if (t + j >= n) return;
      unroll<R>([&](auto r) LEANKV_LAMBDA { scores[r * kTile + t + j] = sum(sums[j][r]); });
    });
  }
}

// out[r] += sum over t of p[r][t] * v_t, for n exact rows.
template <Type T, int R>
void add_rows(const Vectors& v, int head, int first, int n, int dim, const float* p, float* out) {
  constexpr int N = vectors_for(R);
  for (int i = 0; i < dim; i += N * W) {
    vf sums[R][N];
    unroll<R>([&](auto r) LEANKV_LAMBDA {
      unroll<N>([&](auto j) LEANKV_LAMBDA { sums[r][j] = load(out + r * dim + i + j * W); });
    });
    for (int t = 0; t < n; ++t) {
      const char* row = v.row(head, first + t);
      vf x[N];
      unroll<N>([&](auto j) LEANKV_LAMBDA { x[j] = read_vector<T>(row, i + j * W); });
      unroll<R>([&](auto r) LEANKV_LAMBDA {
        const vf factor = splat(p[r * kTile + t]);
        unroll<N>([&](auto j) LEANKV_LAMBDA { sums[r][j] += x[j] * factor; });
      });
    }
    unroll<R>([&](auto r) LEANKV_LAMBDA {
      unroll<N>([&](auto j) LEANKV_LAMBDA { store(out + r * dim + i + j * W, sums[r][j]); });
    });
  }
}

// Probabilities [rows][32] of the exact rows [first, first + n), n <= 32. Under the causal rule new
// token l sees exact rows up to E - L + l: the new tokens are the last exact rows.
inline void weigh_exact(const AttentionArgs& a, const Chunk& chunk, int head, int first, int n,
                        float* scores) {
  std::memset(scores, 0, sizeof(float) * chunk.rows * kTile);
  with_type(a.exact_k.type, [&](auto tag) {
    with_rows(chunk.rows, [&](auto rows) {
      dot_rows<decltype(tag)::value, rows>(a.exact_k, a.exact_v, head, first, n, a.k_dim, a.v_dim,
                                           chunk.queries.x, scores);
    });
  });
  for (int r = 0; r < chunk.rows; ++r) {
    const int token = (chunk.first + r) % a.length;
    const int seen = a.causal ? a.exact - a.length + token + 1 - first : n;
    vf s[NV], p[NV];
    unroll<NV>([&](auto v) LEANKV_LAMBDA { s[v] = load(scores + r * kTile + v * W); });
    softmax(chunk, r, s, seen < n ? seen : n, chunk.exact_sum, p);
    unroll<NV>([&](auto v) LEANKV_LAMBDA { store(scores + r * kTile + v * W, p[v]); });
  }
}

inline void attend_exact(const AttentionArgs& a, const Chunk& chunk, int head, int first, int n) {
  alignas(64) float scores[kRowChunk * kTile];
  weigh_exact(a, chunk, head, first, n, scores);
  with_type(a.exact_v.type, [&](auto tag) {
    with_rows(chunk.rows, [&](auto rows) {
      add_rows<decltype(tag)::value, rows>(a.exact_v, head, first, n, a.v_dim, scores, chunk.out);
    });
  });
}

// Sets the least score of a block: a token not above it weighs at most `skip`, because the exact
// rows are a part of what the softmax is normalized by.
inline void set_least(const AttentionArgs& a, const Chunk& chunk, int head) {
  alignas(64) float scores[kRowChunk * kTile];
  Chunk exact = chunk;
  exact.v_dim = 0;  // the maximum and the sum, and no output
  for (int first = 0; first < a.exact; first += kTile) {
    const int left = a.exact - first;
    weigh_exact(a, exact, head, first, left < kTile ? left : kTile, scores);
  }
  for (int r = 0; r < chunk.rows; ++r) {
    float* sums = chunk.exact_sum + r * W;
    chunk.least[r] = chunk.max[r] + __builtin_log2f(sum(load(sums)) * a.skip);
    store(sums, vf{});
  }
}

// Blocks that one chunk of several goes through at a time: they stay in the nearest cache.
constexpr int kRun = 4;

// f(chunk) for all rows of the head.
template <class F>
LEANKV_INLINE void each_chunk(const AttentionArgs& a, int head, const Partial& p, int32_t* reads,
                              F&& f) {
  const int64_t row = static_cast<int64_t>(head) * a.rows();
  for (int first = 0; first < a.rows(); first += kRowChunk) {
    const int left = a.rows() - first;
    const int64_t at = (row + first) * a.k_dim;
    f(Chunk{.first = first,
            .rows = left < kRowChunk ? left : kRowChunk,
            .v_dim = a.v_dim,
            .queries = {.x = a.queries + at, .steps = a.pairs ? a.steps + row + first : nullptr},
            .pairs = a.pairs ? a.pairs + at / 2 : nullptr,
            .bias = a.bias + row + first,
            .max = p.max + first,
            .body_sum = p.lanes + first * W,
            .exact_sum = p.lanes + (a.rows() + first) * W,
            .out = p.out + static_cast<int64_t>(first) * a.v_dim,
            .least = p.least + first,
            .reads = reads});
  }
}

// See Kernels::place.
inline float place(const float* row, const float* mu, int dim, const QueryPlace& to) {
  vf product{};
  for (int i = 0; i < dim; i += W) {
    const vf x = load(row + i);
    store(to.queries + i / kTile * to.stride + i % kTile, x);
    if (mu) product += x * load(mu + i);
  }
#ifdef LEANKV_PAIRS
  if (to.pairs) {
    *to.step = step_of_query(row, dim);
    for (int c = 0; c < dim / kTile; ++c) {
      pack_pairs(row + c * kTile, *to.step, to.pairs + c * to.stride / 2);
    }
  }
#endif
  return sum(product);
}

// See Kernels::attend.
inline void attend(const AttentionArgs& a, int head, int first, int last, const Partial& p) {
  std::memset(p.lanes, 0, sizeof(float) * 2 * a.rows() * W);
  std::memset(p.out, 0, sizeof(float) * a.rows() * a.v_dim);
  for (int r = 0; r < a.rows(); ++r) {
    p.max[r] = kLowest;
    p.least[r] = -__builtin_inff();
  }
  int32_t reads[2] = {};           // not in the part, whose neighbours other threads write to
  int start = blocks_of(a.exact);  // unit of the first block of the body
  if (a.skip > 0 && last > start) {
    each_chunk(a, head, p, reads, [&](const Chunk& chunk) { set_least(a, chunk, head); });
  }

  for (int u = first; u < last && u < start; ++u) {
    const int row = u * kTile, left = a.exact - row;
    each_chunk(a, head, p, reads, [&](const Chunk& chunk) {
      attend_exact(a, chunk, head, row, left < kTile ? left : kTile);
    });
  }
  for (const Body* body = a.bodies; body < a.bodies + a.n_bodies; ++body) {
    const int blocks = body->blocks(head);
    const int stop = last - start < blocks ? last - start : blocks;
    const int begin = first > start ? first - start : 0;
    if (begin < stop) fetch(body->block(head, begin), body->format.words());
    const int run = a.rows() > kRowChunk ? kRun : stop - begin;
    for (int b = begin; b < stop; b += run) {
      each_chunk(a, head, p, reads, [&](const Chunk& chunk) {
        attend_blocks(chunk, *body, head, b, stop - b < run ? stop - b : run);
      });
    }
    start += blocks;
  }
  for (int r = 0; r < a.rows(); ++r) {
    p.body_sum[r] = sum(load(p.lanes + r * W));
    p.sum[r] = p.body_sum[r] + sum(load(p.lanes + (a.rows() + r) * W));
  }
  p.reads[0] = reads[0];
  p.reads[1] = reads[1];
}

// See Kernels::merge.
inline float merge(const AttentionArgs& a, const Partial* parts, int n, int r, float logit,
                   const float* mu, float* row) {
  float top = logit;
  for (const Partial* p = parts; p < parts + n; ++p) top = p->max[r] > top ? p->max[r] : top;
  vf all = exp2_negative(splat(logit - top)), body{};
  if (logit == kLowest) all = vf{};  // there is no such token
  std::memset(row, 0, sizeof(float) * a.v_dim);
  for (const Partial* p = parts; p < parts + n; ++p) {
    const vf factor = exp2_negative(splat(p->max[r] - top));
    all += factor * p->sum[r];
    body += factor * p->body_sum[r];
    const float* out = p->out + static_cast<int64_t>(r) * a.v_dim;
    for (int i = 0; i < a.v_dim; i += W) store(row + i, load(row + i) + factor * load(out + i));
  }
  for (int i = 0; i < a.v_dim; i += W) {  // centers count with the mass of the body only
    store(row + i, (load(row + i) + (mu ? body * load(mu + i) : vf{})) / all);
  }
  return top + __builtin_log2f(all[0]);
}

}  // namespace leankv::LEANKV_ISA
