// Heads that keep other key channels than their neighbours.
#include "sanitize.h"

namespace leankv {

// Heads of which the first keeps all key channels in another order, the second a group, the third
// none and with them no token: appended to, attended to, and all their rows read.
void masked_heads(int dim, int head_dim, int length, int blocks, Type type) {
  constexpr int heads = 3, group = 2, query_heads = heads * group, old = 37;
  const int width = type == Type::f32 ? 2 : 1, exact = old + length;
  std::vector<int32_t> order(heads * head_dim);
  for (size_t i = 0; i < order.size(); ++i)
    order[i] = head_dim - 1 - static_cast<int>(i) % head_dim;
  const auto signs = normal(dim), scales = normal(heads * head_dim), mu = normal(heads * dim);
  Rotation by_group = rotation(signs, dim), turn = rotation(signs, dim);
  by_group.block = kTile;
  by_group.head_dim = turn.head_dim = head_dim;
  by_group.order = order.data();

  std::vector<Body> bodies;
  std::vector<std::vector<uint32_t>> pools;
  std::vector<int32_t> table(heads * blocks, 0);  // of heads without blocks as well
  for (int i = 0; i < blocks; ++i) table[i] = table[blocks + i] = i;
  const std::vector<int32_t> lengths[2] = {{blocks * kTile - 5, 0, 0}, {0, blocks * kTile, 0}};
  for (int h = 0; h < 2; ++h) {
    Format format{.k = {.groups = dim / kTile}, .v = side(dim, h)};
    for (int c = 0; c < (h ? 1 : dim / kTile); ++c) format.k.bits[c] = 3;
    pools.emplace_back(size_t(blocks) * format.words());
    for (uint32_t& word : pools[h]) word = draw() & 0x3BFF3BFFu;  // as scales they are finite
    bodies.push_back({pools[h].data(), table.data(), lengths[h].data(), blocks, format});
  }

  const std::vector<uint16_t> before(size_t(heads) * old * dim * width, 0x3000);
  const std::vector<uint16_t> rows(size_t(heads) * length * head_dim * width, 0x3400);
  std::vector<uint16_t> exact_k(size_t(heads) * exact * dim * width), exact_v(exact_k.size());
  std::vector<AppendJob> appended;
  for (auto* to : {&exact_k, &exact_v}) {
    const bool keys = to == &exact_k;
    appended.push_back({.exact = rows_of(before, type, old, dim),
                        .rows = rows_of(rows, type, length, head_dim),
                        .n_exact = old,
                        .n_rows = length,
                        .heads = heads,
                        .scales = keys ? scales.data() : nullptr,
                        .rotation = keys ? by_group : turn,
                        .out = output_of(*to, type, exact, dim)});
  }
  run_append(appended);

  const std::vector<uint16_t> queries(size_t(query_heads) * length * head_dim * width, 0x3400);
  std::vector<float> out(query_heads * length * head_dim), lse(query_heads * length);
  run_attention({{.args = {.heads = heads,
                           .group = group,
                           .length = length,
                           .k_dim = dim,
                           .v_dim = dim,
                           .bodies = bodies.data(),
                           .n_bodies = 2,
                           .exact_k = rows_of(exact_k, type, exact, dim),
                           .exact_v = rows_of(exact_v, type, exact, dim),
                           .exact = exact,
                           .causal = true},
                  .ends = {.queries = rows_of(queries, type, length, head_dim),
                           .k_rotation = by_group,
                           .v_rotation = turn,
                           .scale = 0.01f,
                           .out = output_of(out, Type::f32, length, head_dim)},
                  .scales = scales.data(),
                  .mu_k = mu.data(),
                  .mu_v = mu.data(),
                  .lse = lse.data()}});
  for (const float x : out) check(std::isfinite(x), "an output of masked heads is not finite");

  const int slots = kTile * blocks, all = exact + slots;
  const std::vector<Place> places{{0, {0}}, {0, {1}}};  // side by side
  std::vector<float> all_k(heads * all * dim, NAN), all_v(all_k);
  run_decode({.args = {.k = output_of(all_k, Type::f32, all, dim),
                       .v = output_of(all_v, Type::f32, all, dim),
                       .mu_k = mu.data(),
                       .mu_v = mu.data(),
                       .k_rotation = {},
                       .v_rotation = {}},
              .bodies = bodies.data(),
              .places = places.data(),
              .n_bodies = 2,
              .heads = heads,
              .slots = slots,
              .exact_k = rows_of(exact_k, type, exact, dim),
              .exact_v = rows_of(exact_v, type, exact, dim),
              .exact = exact,
              .sinks = 4,
              .k_dim = dim,
              .v_dim = dim});
  for (const auto* found : {&all_k, &all_v}) {
    for (const float x : *found) check(std::isfinite(x), "a row of masked heads was not written");
  }
}

}  // namespace leankv
