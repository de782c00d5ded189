// Attention of a few new tokens over one body and the exact rows; the bit layout is the comment on
// top of layout.metal.
//
// A threadgroup of NSG SIMD groups takes one split of one KV head for R of its query rows. A query
// row is a query head of the KV head and a new token: row = query head in group * L + token. The
// work is a list of items, T blocks or 32 exact rows each, that all SIMD groups of all splits take
// in turn. So every code is decoded once for R query rows.
//   q K^T: lane = slot; the queries lie in threadgroup memory as [channel][row], scaled for exp2.
//   p V:   lane = channel of each group; the probabilities as [slot][row].
// Exact centering: body scores get q.mu_k, and a SIMD group adds mu_v times its body mass before it
// goes on with exact rows.
// With SKIP a row does without the values of a block whose scores are all below `least`, that is
// below the log-sum-exp of the exact rows by the logarithm of a weight: no token in it weighs that
// much. Values that no row needs are not read. The sums stay those of all tokens.
// A split leaves what merge_splits.metal needs, part [H * rows, splits, Dv + 2]: the unnormalized
// output, the largest score (base 2), the sum.

template <int C, int R>
struct lkv_state {
  float most[R], sum[R];  // the sum is this lane's part
  float out[R][C];
};

// Threadgroup memory, declared in the body of the kernel.
struct lkv_shared {
  TG_PTR(float) queries;        // [Dk][R]
  TG_PTR(float) biases;         // [R]: q.mu_k
  TG_PTR(float) probabilities;  // [NSG][32][R]
  TG_PTR(float) table;          // levels, for LKV_TABLE
  TG_PTR(float) outs;           // [NSG][Dv]
  TG_PTR(float) mosts;          // [NSG]
  TG_PTR(float) sums;           // [NSG]
  TG_PTR(float) least;          // [R], with SKIP
};

// Blocks whose values a SIMD group read, and all that it took.
struct lkv_reads {
  int read, all;
};

// Scores of 32 channels of T blocks, whose key tiles of B bits start at `row`.
template <int B, int S, int R, int T>
DEVFN void lkv_tile_scores(const DEV uint* const THR* blocks, int row, uint lane,
                           TG_PTR(const float) queries, const THR lkv_levels& levels,
                           THR float (&scores)[T][R]) {
  constexpr int per_word = lkv_per_word(B);
  uint words[T][B];
  UNROLL for (int t = 0; t < T; t++) {
    UNROLL for (int j = 0; j < B; j++) words[t][j] = blocks[t][(row + j) * 32 + (int)lane];
  }
  UNROLL for (int i = 0; i < 32; i++) {
    float q[R];
    UNROLL for (int r = 0; r < R; r++) q[r] = queries[i * R + r];
    UNROLL for (int t = 0; t < T; t++) {
      const uint high = B == 3 ? words[t][B - 1] >> (4 * (i / per_word)) : 0u;
      const float k = lkv_value<B, S>(words[t][i / per_word], high, i % per_word, levels);
      UNROLL for (int r = 0; r < R; r++) scores[t][r] = metal::fma(k, q[r], scores[t][r]);
    }
  }
}

template <int KF, int KC, int S, int R, int T>
DEVFN void lkv_block_scores(const DEV uint* const THR* blocks, uint lane,
                            TG_PTR(const float) queries, const THR lkv_levels& levels,
                            THR float (&scores)[T][R]) {
  constexpr int kept = lkv_kept(KF, KC), same = lkv_uniform(KF, kept);
  UNROLL for (int t = 0; t < T; t++) {
    UNROLL for (int r = 0; r < R; r++) scores[t][r] = 0.0f;
  }
  int row = 0;
  UNROLL1 for (int c = 0; c < kept; c++) {
    TG_PTR(const float) q = queries + c * 32 * R;
    const int bits = same ? same : lkv_group_bits(KF, c);
    switch (bits) {
      case 2: lkv_tile_scores<2, S, R, T>(blocks, row, lane, q, levels, scores); break;
      case 3: lkv_tile_scores<3, S, R, T>(blocks, row, lane, q, levels, scores); break;
      case 4: lkv_tile_scores<4, S, R, T>(blocks, row, lane, q, levels, scores); break;
      case 8: lkv_tile_scores<8, S, R, T>(blocks, row, lane, q, levels, scores); break;
    }
    row += bits;
  }
}

// Adds p V of a block; `tiles` are its value tiles.
template <int VF, int VC, int S, int R>
DEVFN void lkv_block_values(const DEV uint* tiles, uint lane, TG_PTR(const float) probabilities,
                            const THR lkv_levels& levels, THR float (&out)[R][VC]) {
  constexpr int step = lkv_step(VF, VC);
  UNROLL1 for (int first = 0; first < 32; first += step) {
    uint words[VC], high[VC];  // of the slots first .. first + step - 1
    UNROLL for (int c = 0; c < VC; c++) {
      const int bits = lkv_group_bits(VF, c), per_word = lkv_per_word(bits);
      const DEV uint* tile = tiles + lkv_rows(VF, c) * 32 + (int)lane;
      const int shift = per_word == step ? 0 : lkv_field(bits) * (first % per_word);
      words[c] = bits ? tile[first / per_word * 32] >> shift : 0u;
      high[c] = bits == 3 ? tile[2 * 32] >> lkv_high_bit(first) : 0u;
    }
    UNROLL for (int i = 0; i < step; i++) {
      float p[R];
      UNROLL for (int r = 0; r < R; r++) p[r] = probabilities[(first + i) * R + r];
      UNROLL for (int c = 0; c < VC; c++) {
        if (lkv_group_bits(VF, c) == 0) continue;
        const float v = lkv_value_of<S>(lkv_group_bits(VF, c), words[c], high[c], i, levels);
        UNROLL for (int r = 0; r < R; r++) out[r][c] = metal::fma(v, p[r], out[r][c]);
      }
    }
  }
}

// One step of the online softmax: the scores of this lane's slot become probabilities relative to
// the largest score so far, times the slot's value scale. A select, not a product, leaves unused
// slots out: their scales may be NaN. Returns whether any row needs the values.
template <int C, int R, bool SKIP>
DEVFN bool lkv_softmax(const THR float (&scores)[R], const THR bool (&used)[R], float value_scale,
                       uint lane, TG_PTR(const float) least, TG_PTR(float) probabilities,
                       THR lkv_state<C, R>& state) {
  bool needed = !SKIP;
  UNROLL for (int r = 0; r < R; r++) {
    const float score = used[r] ? scores[r] : LKV_NEVER, top = simd_max(score);
    const float most = metal::max(state.most[r], top);
    const bool shown = !SKIP || top >= least[r];
    needed = needed || shown;
    const float shrink = metal::fast::exp2(state.most[r] - most);
    const float p = used[r] ? metal::fast::exp2(score - most) : 0.0f;
    state.most[r] = most;
    state.sum[r] = metal::fma(state.sum[r], shrink, p);
    UNROLL for (int c = 0; c < C; c++) state.out[r][c] *= shrink;
    probabilities[lane * R + r] = used[r] && shown ? p * value_scale : 0.0f;
  }
  return needed;
}

// T blocks of a body, block `first` and the following.
template <int KF, int VF, int KC, int VC, int S, int R, int T, bool SKIP, class IP>
DEVFN void lkv_attend_blocks(const DEV uint* pool, IP ids, int first, int length, uint lane,
                             const THR lkv_shared& shared, TG_PTR(float) probabilities,
                             const THR lkv_levels& levels, THR lkv_state<VC, R>& state,
                             THR lkv_reads& reads) {
  constexpr int k_words = 32 * lkv_rows(KF, KC), v_words = 32 * lkv_rows(VF, VC);
  const DEV uint* blocks[T];
  float scores[T][R];
  UNROLL for (int t = 0; t < T; t++) {
    const int block = (first + t) * 32 < length ? first + t : first;
    blocks[t] = pool + (size_t)ids[block] * (size_t)(k_words + v_words + 32);
  }
  lkv_block_scores<KF, KC, S, R, T>(blocks, lane, shared.queries, levels, scores);
  UNROLL for (int t = 0; t < T; t++) {
    const bool inside = (first + t) * 32 + (int)lane < length;
    const uint scales = blocks[t][k_words + v_words + (int)lane];
    const float k_scale = lkv_float_of_half_bits(scales & 0xffffu);
    bool used[R];
    UNROLL for (int r = 0; r < R; r++) {
      used[r] = inside;
      scores[t][r] = metal::fma(scores[t][r], k_scale, shared.biases[r]);
    }
    const bool needed =
        lkv_softmax<VC, R, SKIP>(scores[t], used, lkv_float_of_half_bits(scales >> 16), lane,
                                 shared.least, probabilities, state);
    if (SKIP) {
      reads.all += (first + t) * 32 < length ? 1 : 0;
      if (!needed) continue;
      reads.read++;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    lkv_block_values<VF, VC, S, R>(blocks[t] + k_words, lane, probabilities, levels, state.out);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Scores of the exact rows `first` to first + 31 of k [E, Dk], a row for each lane. With `causal`
// the last L rows are the new tokens, which see none behind themselves.
template <int KC, int R, class KT>
DEVFN void lkv_row_scores(const DEV KT* k, int first, int rows, int query_row, int tokens,
                          bool causal, uint lane, const THR lkv_shared& shared,
                          THR float (&scores)[R], THR bool (&used)[R]) {
  const int slot = first + (int)lane;
  const DEV KT* key = k + (size_t)(slot < rows ? slot : first) * (KC * 32);
  UNROLL for (int r = 0; r < R; r++) {
    const int behind = causal ? tokens - 1 - (query_row + r) % tokens : 0;
    scores[r] = 0.0f;
    used[r] = slot < rows - behind;
  }
  UNROLL1 for (int c = 0; c < KC * 32; c += 8) {
    float x[8];  // loads that do not wait for each other
    UNROLL for (int i = 0; i < 8; i++) x[i] = (float)key[c + i];
    UNROLL for (int i = 0; i < 8; i++) {
      UNROLL for (int r = 0; r < R; r++) {
        scores[r] = metal::fma(x[i], shared.queries[(c + i) * R + r], scores[r]);
      }
    }
  }
}

// The exact rows `first` to first + 31 of k and v [E, Dv].
template <int KC, int VC, int R, class KT, class VT>
DEVFN void lkv_attend_rows(const DEV KT* k, const DEV VT* v, int first, int rows, int query_row,
                           int tokens, bool causal, uint lane, const THR lkv_shared& shared,
                           TG_PTR(float) probabilities, THR lkv_state<VC, R>& state) {
  float scores[R];
  bool used[R];
  lkv_row_scores<KC, R>(k, first, rows, query_row, tokens, causal, lane, shared, scores, used);
  lkv_softmax<VC, R, false>(scores, used, 1.0f, lane, shared.least, probabilities, state);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const int count = rows - first < 32 ? rows - first : 32;
  UNROLL1 for (int i = 0; i < count; i++) {
    const DEV VT* value = v + (size_t)(first + i) * (VC * 32);
    UNROLL for (int c = 0; c < VC; c++) {
      const float x = (float)value[c * 32 + (int)lane];
      UNROLL for (int r = 0; r < R; r++) {
        state.out[r][c] = metal::fma(x, probabilities[i * R + r], state.out[r][c]);
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// What a block must score for a row, from all exact rows: the SIMD groups take 32 of them in turn.
// Query rows behind the last one need nothing.
template <int KC, int R, int NSG, class KT>
DEVFN void lkv_set_least(const DEV KT* k, int exact, int query_row, int query_rows, int tokens,
                         bool causal, float log_skip, uint lane, uint simd_group,
                         const THR lkv_shared& shared) {
  float most[R], sum[R];
  UNROLL for (int r = 0; r < R; r++) {
    most[r] = LKV_NEVER;
    sum[r] = 0.0f;
  }
  for (int first = (int)simd_group * 32; first < exact; first += 32 * NSG) {
    float scores[R];
    bool used[R];
    lkv_row_scores<KC, R>(k, first, exact, query_row, tokens, causal, lane, shared, scores, used);
    UNROLL for (int r = 0; r < R; r++) {
      const float score = used[r] ? scores[r] : LKV_NEVER;
      const float top = metal::max(most[r], simd_max(score));
      const float p = used[r] ? metal::fast::exp2(score - top) : 0.0f;
      sum[r] = metal::fma(sum[r], metal::fast::exp2(most[r] - top), p);
      most[r] = top;
    }
  }
  // The place of the probabilities, which are not there yet.
  TG_PTR(float) mine = shared.probabilities + simd_group * (32 * R);
  UNROLL for (int r = 0; r < R; r++) {
    const float total = simd_sum(sum[r]);
    if (lane == 0) {
      mine[2 * r] = most[r];
      mine[2 * r + 1] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int r = (int)lane;
  if (simd_group == 0 && r < R) {
    float top = LKV_NEVER, total = 0.0f;
    for (int i = 0; i < NSG; i++) {
      top = metal::max(top, shared.probabilities[i * (32 * R) + 2 * r]);
    }
    for (int i = 0; i < NSG; i++) {
      TG_PTR(const float) other = shared.probabilities + i * (32 * R) + 2 * r;
      total = metal::fma(metal::fast::exp2(other[0] - top), other[1], total);
    }
    const float least = total > 0.0f ? top + metal::log2(total) + log_skip : LKV_NEVER;
    shared.least[r] = query_row + r < query_rows ? least : -LKV_NEVER;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The R query rows from `query_row` on, rotated and scaled, to threadgroup memory; rows behind the
// last one are zeros.
template <int KC, int BLOCK, int R, int NSG, class QP>
DEVFN void lkv_load_queries(QP q, int head_dim, int query_row, int query_rows,
                            const DEV float* signs, const DEV float* mu_k, float scale, bool body,
                            uint lane, uint simd_group, const THR lkv_shared& shared) {
  for (int r = (int)simd_group; r < R; r += NSG) {
    const bool there = query_row + r < query_rows;
    float x[KC];
    lkv_load_rotated<KC, BLOCK>(q + (size_t)(query_row + (there ? r : 0)) * head_dim, head_dim,
                                signs, lane, x);
    float bias = 0.0f;
    UNROLL for (int c = 0; c < KC; c++) {
      x[c] = there ? x[c] * scale : 0.0f;
      if (body) bias = metal::fma(x[c], mu_k[c * 32 + (int)lane], bias);
      shared.queries[(c * 32 + (int)lane) * R + r] = x[c];
    }
    bias = simd_sum(bias);
    if (lane == 0) shared.biases[r] = bias;
  }
}

// The SIMD groups of a threadgroup together, one query row at a time, which needs little
// threadgroup memory; `part` is that of the first query row.
template <int VC, int R, int NSG>
DEVFN void lkv_store_part(THR lkv_state<VC, R>& state, int rows_left, int splits, uint lane,
                          uint simd_group, const THR lkv_shared& shared, DEV float* part) {
  const int dim = VC * 32;
  UNROLL for (int r = 0; r < R; r++) {
    const float sum = simd_sum(state.sum[r]);
    if (lane == 0) {
      shared.mosts[simd_group] = state.most[r];
      shared.sums[simd_group] = sum;
    }
    UNROLL for (int c = 0; c < VC; c++) {
      shared.outs[(int)simd_group * dim + c * 32 + (int)lane] = state.out[r][c];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float most = LKV_NEVER;
    for (int k = 0; k < NSG; k++) most = metal::max(most, shared.mosts[k]);
    if (r < rows_left) {
      DEV float* target = part + (size_t)r * splits * (dim + 2);
      for (int i = (int)(simd_group * 32u + lane); i < dim; i += 32 * NSG) {
        float x = 0.0f;
        for (int k = 0; k < NSG; k++) {
          x = metal::fma(metal::fast::exp2(shared.mosts[k] - most), shared.outs[k * dim + i], x);
        }
        target[i] = x;
      }
      if (simd_group == 0 && lane == 0) {
        float total = 0.0f;
        for (int k = 0; k < NSG; k++) {
          total = metal::fma(metal::fast::exp2(shared.mosts[k] - most), shared.sums[k], total);
        }
        target[dim] = most;
        target[dim + 1] = total;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// One threadgroup. BODY, EXACT: whether this launch has a body, and exact rows. SKIP: with exact
// rows at hand, whether or not they are attended to here; log_skip is log2 of the weight.
//   q [H * query_rows, head_dim], pool [blocks, words], mu_k [H, Dk], mu_v [H, Dv], signs [Dk]
//   of the head: ids of its blocks, length, k [exact, Dk], v [exact, Dv]
template <int KF, int VF, int KC, int VC, int BLOCK, int S, int R, int T, int NSG, bool BODY,
          bool EXACT, bool SKIP, class QP, class IP, class KT, class VT>
DEVFN lkv_reads lkv_decode_attention(QP q, int query_rows, int tokens, int head_dim,
                                     const DEV float* signs, float scale, const DEV uint* pool,
                                     IP ids, int length, const DEV float* mu_k,
                                     const DEV float* mu_v, const DEV KT* k, const DEV VT* v,
                                     int exact, bool causal, float log_skip, DEV float* part,
                                     uint tile, uint head, uint split, uint splits, uint lane,
                                     uint simd_group, const THR lkv_shared& shared) {
  const int query_row = (int)tile * R;
  lkv_load_queries<KC, BLOCK, R, NSG>(q + (size_t)head * query_rows * head_dim, head_dim, query_row,
                                      query_rows, signs, mu_k + head * (KC * 32), scale, BODY, lane,
                                      simd_group, shared);
  if (S == LKV_TABLE) lkv_fill_table(shared.table, simd_group * 32u + lane, 32u * NSG);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (SKIP) {
    lkv_set_least<KC, R, NSG>(k, exact, query_row, query_rows, tokens, causal, log_skip, lane,
                              simd_group, shared);
  }
  lkv_reads reads;
  reads.read = 0;
  reads.all = 0;
  const lkv_levels levels = lkv_levels_of_lane(lane, shared.table);
  TG_PTR(float) probabilities = shared.probabilities + simd_group * (32 * R);
  lkv_state<VC, R> state;
  UNROLL for (int r = 0; r < R; r++) {
    state.most[r] = LKV_NEVER;
    state.sum[r] = 0.0f;
    UNROLL for (int c = 0; c < VC; c++) state.out[r][c] = 0.0f;
  }
  const int items = (length + 32 * T - 1) / (32 * T);
  const int workers = (int)splits * NSG;
  int item = (int)split * NSG + (int)simd_group;
  if (BODY) {
    for (; item < items; item += workers) {
      lkv_attend_blocks<KF, VF, KC, VC, S, R, T, SKIP>(pool, ids, item * T, length, lane, shared,
                                                       probabilities, levels, state, reads);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const float mass = simd_sum(state.sum[r]);
      UNROLL for (int c = 0; c < VC; c++) {
        const float mu = mu_v[head * (VC * 32) + (uint)(c * 32) + lane];
        state.out[r][c] = metal::fma(mass, mu, state.out[r][c]);
      }
    }
  }
  if (EXACT) {
    for (; (item - items) * 32 < exact; item += workers) {
      lkv_attend_rows<KC, VC, R>(k, v, (item - items) * 32, exact, query_row, tokens, causal, lane,
                                 shared, probabilities, state);
    }
  }
  const size_t first = ((size_t)head * query_rows + query_row) * splits + split;
  lkv_store_part<VC, R, NSG>(state, query_rows - query_row, (int)splits, lane, simd_group, shared,
                             part + first * (VC * 32 + 2));
  return reads;
}
