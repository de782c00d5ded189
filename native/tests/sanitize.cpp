// Runs every kernel of every instruction set that this processor executes, for a sanitizer to
// watch: built by CMake with -DLEANKV_SANITIZE=..., run by tests/kernels/test_sanitizers.py.
// Buffers have exactly the size that is promised, so that AddressSanitizer sees every read beyond.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "../thread_pool.h"
#include "sanitize.h"

using namespace leankv;

namespace {

// Encodes, decodes and attends to one body with these shapes.
void round_trip(int k_dim, int v_dim, int group, int length, int tokens, int exact, Type type) {
  const int heads = 2, blocks = blocks_of(tokens);
  const auto k = normal(heads * tokens * k_dim), v = normal(heads * tokens * v_dim);
  const auto mu_k = normal(heads * k_dim), mu_v = normal(heads * v_dim);
  const Format format{.k = side(k_dim, group), .v = side(v_dim, length)};
  std::vector<uint32_t> pool(size_t(heads) * blocks * format.words());
  EncodeArgs encode{.k = rows_of(k, Type::f32, tokens, k_dim),
                    .v = rows_of(v, Type::f32, tokens, v_dim),
                    .mu_k = mu_k.data(),
                    .mu_v = mu_v.data(),
                    .tokens = tokens,
                    .format = format,
                    .blocks = pool.data()};
  const auto shaping = normal(heads * k_dim * k_dim);
  for (const Rounding rounding : {Rounding::rms, Rounding::search}) {
    encode.rounding = rounding;
    for (const float* shaped : {shaping.data(), static_cast<const float*>(nullptr)}) {
      encode.shaping = shaped;
      run_encode(encode, heads);
    }
  }

  std::vector<int32_t> table(heads * blocks), lengths{tokens, tokens / 2};
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const Body body{.pool = pool.data(),
                  .table = table.data(),
                  .lengths = lengths.data(),
                  .width = blocks,
                  .format = format};
  // All slots backwards, twice: what was there. Then some, with slots that do not exist.
  std::vector<int32_t> backwards(heads * blocks * kTile);
  for (int h = 0, i = 0; h < heads; ++h) {
    for (int slot = blocks * kTile - 1; slot >= 0; --slot) backwards[i++] = slot;
  }
  std::vector<uint32_t> turned(pool.size()), back(pool.size());
  const auto repack = [&](const Body& from, const std::vector<int32_t>& index, int kept,
                          std::vector<uint32_t>& to) {
    run_repack({.body = from, .index = index.data(), .kept = kept, .blocks = to.data()}, heads);
  };
  repack(body, backwards, blocks * kTile, turned);
  Body other = body;
  other.pool = turned.data();
  repack(other, backwards, blocks * kTile, back);
  check(back == pool, "repacked codes changed");
  const std::vector<int32_t> odd{-1, 3, blocks * kTile, 1 << 30, 0, -(1 << 30)};
  std::vector<uint32_t> kept(size_t(heads) * format.words());
  repack(body, odd, 3, kept);

  std::vector<uint16_t> exact_k(heads * exact * k_dim * 2), exact_v(heads * exact * v_dim * 2);
  const int all = exact + kTile * blocks;
  std::vector<float> out_k(heads * all * k_dim), out_v(heads * all * v_dim);
  const Place place{0, {}};
  const DecodeJob decode{
      .args = {.k = output_of(out_k, Type::f32, all, k_dim),
               .v = output_of(out_v, Type::f32, all, v_dim),
               .mu_k = mu_k.data(),
               .mu_v = mu_v.data(),
               .k_rotation = {},
               .v_rotation = {}},
      .bodies = &body,
      .places = &place,
      .n_bodies = 1,
      .heads = heads,
      .slots = kTile * blocks,
      .exact_k = rows_of(exact_k, type, exact, k_dim),
      .exact_v = rows_of(exact_v, type, exact, v_dim),
      .exact = exact,
      .sinks = exact < 4 ? exact : 4,
      .k_dim = k_dim,
      .v_dim = v_dim,
  };
  run_decode(decode);
  for (const float x : out_k) check(std::isfinite(x), "a decoded key is not finite");

  const int query_heads = heads * group;
  const auto queries = normal(query_heads * length * k_dim), signs = normal(kMaxDim);
  std::vector<uint16_t> half(queries.size());  // numbers of any 16-bit type
  for (uint16_t& x : half)
    x = static_cast<uint16_t>((draw() & 1) << 15 | (0x3000 + draw() % 0x0C00));
  std::vector<float> out(query_heads * length * v_dim), lse(query_heads * length);
  std::vector<int32_t> reads(2 * heads);
  const AttentionJob job{
      .args = {.heads = heads,
               .group = group,
               .length = length,
               .k_dim = k_dim,
               .v_dim = v_dim,
               .bodies = &body,
               .n_bodies = 1,
               .exact_k = decode.exact_k,
               .exact_v = decode.exact_v,
               .exact = exact,
               .causal = exact >= length,
               .skip = exact ? 0.1f : 0.0f},
      .ends = {.queries = type == Type::f32 ? rows_of(queries, type, length, k_dim)
                                            : rows_of(half, type, length, k_dim),
               .k_rotation = rotation(signs, k_dim),
               .v_rotation = rotation(signs, v_dim),
               .sink_logits = signs.data(),
               .scale = 0.1f,
               .out = output_of(out, Type::f32, length, v_dim)},
      .mu_k = mu_k.data(),
      .mu_v = mu_v.data(),
      .lse = lse.data(),
      .reads = reads.data(),
  };
  run_attention({job});
  for (const float x : out) check(std::isfinite(x), "an output is not finite");
  for (int h = 0; h < heads; ++h) {
    const int turns = (group * length + kRowChunk - 1) / kRowChunk;
    check(reads[2 * h + 1] == turns * body.blocks(h), "a block was not counted");
  }

  const int longer = exact + tokens;
  std::vector<float> appended(heads * longer * k_dim);
  run_append({{.exact = decode.exact_k,
               .rows = encode.k,
               .n_exact = exact,
               .n_rows = tokens,
               .heads = heads,
               .rotation = job.ends.k_rotation,
               .out = output_of(appended, type, longer, k_dim)}});
}

// Appends to and attends to several sequences at once: one without a body, one with two, each with
// as many rows as it has. Each gets what it gets alone.
void several_sequences(int dim, int group, int length, int blocks, Type type) {
  constexpr int n = 3, heads = 2;
  const int width = type == Type::f32 ? 2 : 1, query_heads = heads * group;
  const Format format{.k = side(dim, group), .v = side(dim, length)};
  std::vector<uint32_t> pool(size_t(heads) * blocks * format.words());
  for (uint32_t& word : pool) word = draw() & 0x3BFF3BFFu;  // as scales they are finite
  std::vector<int32_t> table(heads * blocks);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const std::vector<int32_t> lengths{blocks * kTile, blocks * kTile - 5}, none{0, 7};
  const auto signs = normal(dim), scales = normal(heads * dim), mu = normal(heads * dim);
  const std::vector<uint16_t> queries(size_t(n) * query_heads * length * dim * width, 0x3400);
  const std::vector<uint16_t> rows(size_t(n) * heads * length * dim * width, 0x3400);
  std::vector<std::vector<Body>> bodies(n);
  for (const auto* used : {&lengths, &none}) {
    bodies[1].push_back({pool.data(), table.data(), used->data(), blocks, format});
  }
  bodies[2] = {bodies[1][0]};

  std::vector<std::vector<uint16_t>> before, exact_k, exact_v;
  std::vector<AppendJob> appended;
  for (int i = 0; i < n; ++i) {
    const int old = 41 * i, all = old + length;
    before.emplace_back(size_t(heads) * old * dim * width, 0x3000);
    exact_k.emplace_back(size_t(heads) * all * dim * width);
    exact_v.emplace_back(exact_k.back().size());
    for (std::vector<uint16_t>* to : {&exact_k[i], &exact_v[i]}) {
      Vectors given = rows_of(rows, type, length, dim);
      given.data = given.row(i * heads, 0);
      appended.push_back({.exact = rows_of(before[i], type, old, dim),
                          .rows = given,
                          .n_exact = old,
                          .n_rows = length,
                          .heads = heads,
                          .scales = i == 1 ? nullptr : scales.data(),
                          .rotation = rotation(signs, dim),
                          .out = output_of(*to, type, all, dim)});
    }
  }
  run_append(appended);

  const size_t size = size_t(query_heads) * length;  // outputs of a sequence
  std::vector<float> out(n * size * dim), lse(n * size), alone(size * dim), alone_lse(size);
  std::vector<AttentionJob> jobs;
  for (int i = 0; i < n; ++i) {
    const int all = 41 * i + length;
    Vectors given = rows_of(queries, type, length, dim);
    given.data = given.row(i * query_heads, 0);
    Output to = output_of(out, Type::f32, length, dim);
    to.data = to.row(i * query_heads, 0);
    jobs.push_back({.args = {.heads = heads,
                             .group = group,
                             .length = length,
                             .k_dim = dim,
                             .v_dim = dim,
                             .bodies = bodies[i].data(),
                             .n_bodies = static_cast<int>(bodies[i].size()),
                             .exact_k = rows_of(exact_k[i], type, all, dim),
                             .exact_v = rows_of(exact_v[i], type, all, dim),
                             .exact = all,
                             .causal = true},
                    .ends = {.queries = given,
                             .k_rotation = rotation(signs, dim),
                             .v_rotation = rotation(signs, dim),
                             .scale = 0.01f,
                             .out = to},
                    .scales = i == 1 ? nullptr : scales.data(),
                    .mu_k = i == 0 ? nullptr : mu.data(),
                    .mu_v = i == 0 ? nullptr : mu.data(),
                    .lse = lse.data() + i * size});
  }
  run_attention(jobs);
  for (int i = 0; i < n; ++i) {
    AttentionJob job = jobs[i];
    job.ends.out = output_of(alone, Type::f32, length, dim);
    job.lse = alone_lse.data();
    run_attention({job});
    const bool same = std::equal(alone.begin(), alone.end(), out.begin() + i * size * dim) &&
                      std::equal(alone_lse.begin(), alone_lse.end(), lse.begin() + i * size);
    check(same, "a sequence among others gets other bits than alone");
  }
}

// Attends to rows of which the first head misses every third.
void many_queries(int k_dim, int v_dim, int group, int length, int tokens, Type type) {
  const int heads = 2, query_heads = heads * group, width = type == Type::f32 ? 2 : 1;
  const auto queries = normal(query_heads * length * k_dim), signs = normal(kMaxDim);
  std::vector<uint16_t> k(heads * tokens * k_dim * width), v(heads * tokens * v_dim * width);
  std::vector<float> out(query_heads * length * v_dim), logits = normal(query_heads);
  const std::unique_ptr<bool[]> present(new bool[heads * tokens]);
  for (int t = 0; t < heads * tokens; ++t) present[t] = t >= tokens - length || t % 3;
  const PrefillJob job{
      .args = {.heads = heads,
               .group = group,
               .length = length,
               .tokens = tokens,
               .k_dim = k_dim,
               .v_dim = v_dim,
               .k = rows_of(k, type, tokens, k_dim),
               .v = rows_of(v, type, tokens, v_dim),
               .present = group % 2 ? present.get() : nullptr,
               .causal = length % 2 == 1},
      .ends = {.queries = rows_of(queries, Type::f32, length, k_dim),
               .k_rotation = rotation(signs, k_dim),
               .v_rotation = rotation(signs, v_dim),
               .sink_logits = group > 2 ? logits.data() : nullptr,
               .scale = 0.1f,
               .out = output_of(out, Type::f32, length, v_dim)},
  };
  run_prefill(job);
  for (const float x : out) check(std::isfinite(x), "an output of a prefill is not finite");
}

void all_shapes() {
  int turn = 0;
  for (const int k_dim : {32, 64, 96, 128, 256}) {
    for (const int group : {1, 2, 3, 5, 8}) {
      const int length = 1 + turn % kMaxNew;
      const Type type = std::vector{Type::f32, Type::f16, Type::bf16}[turn % 3];
      round_trip(k_dim, turn % 2 ? k_dim : 160, group, length, 1 + turn * 7 % 90, turn * 13 % 104,
                 type);
      many_queries(k_dim, turn % 2 ? k_dim : 160, group, 9 + turn * 5 % 70, 80 + turn * 11 % 90,
                   type);
      ++turn;
    }
  }
  round_trip(128, 128, 4, 1, 4000, 70, Type::bf16);  // enough for several threads
  several_sequences(64, 3, 1, 150, Type::f16);       // likewise
  several_sequences(96, 1, 8, 2, Type::f32);
  masked_heads(128, 128, 1, 150, Type::f16);  // for several threads
  masked_heads(96, 80, 8, 3, Type::bf16);
  masked_heads(256, 250, 3, 2, Type::f32);
  for (const int dim : {32, 80, 256}) {
    for (const int turned : {0, 2, dim / 2, dim}) heads_of(1 + turned % 3, 70, dim, turned, turned);
  }
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const int rows : {1, 2, 3, 8, 9, 37, 600}) {
      const int group = std::vector{32, 64, 128}[turn % 3];
      const Type type = std::vector{Type::f32, Type::f16, Type::bf16}[turn / 3 % 3];
      const int outputs = rows > 100 ? 70 : 1 + turn * 37 % 600;
      products(bits, group, rows, outputs, group * (1 + turn % 9), type, turn);
      ++turn;
    }
  }
}

// A forked child must get along without the parent's workers.
void fork_once() {
  const pid_t child = fork();
  if (child == 0) {
    round_trip(64, 64, 4, 1, 4000, 8, Type::f32);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked child failed");
}

}  // namespace

int main(int, char** arguments) {
  for (const auto& name : available_isas()) {
    select_isa(name);
    all_shapes();
    std::printf("%s: fine with %d threads\n", name.c_str(), thread_count());
  }
  // Loops of two threads at once, as of two MLX streams.
  const auto loops = [] {
    for (int i = 0; i < 200; ++i) {
      std::vector<int> hits(50);
      parallel_for(50, [&](int k) { ++hits[k]; });
      for (const int n : hits) check(n == 1, "a task did not run once");
    }
  };
  std::thread other(loops);
  loops();
  other.join();
  if (!arguments[1]) fork_once();  // not under ThreadSanitizer, which does not follow a fork
}
