// Products with quantized weights, and heads.
#include "../heads.h"
#include "sanitize.h"

namespace leankv {

// Products with two weights of a shape and whatever goes with them; relaid, restored, and row by
// row.
void products(int bits, int group, int rows, int outputs, int inputs, Type type, int turn) {
  const int width = type == Type::f32 ? 2 : 1;
  const auto halves = [&](size_t n) {  // numbers of any type, in exactly the memory they need
    std::vector<uint16_t> made(n * width);
    for (uint16_t& x : made) x = static_cast<uint16_t>(0x3000 + draw() % 0x0C00);
    return made;
  };
  Weight w{.type = type, .outputs = outputs, .inputs = inputs, .bits = bits, .group = group};
  const size_t sides = size_t(w.tiles()) * (inputs / group) * w.tile();
  std::vector<uint32_t> packed(size_t(outputs) * inputs * bits / 32), back(packed.size());
  for (uint32_t& word : packed) word = draw();
  std::vector<uint32_t> codes(size_t(w.tiles()) * inputs * kLanes);
  const auto scales = halves(sides), zeros = halves(sides);
  run_relay(w, packed.data(), codes.data());
  w.codes = codes.data();
  w.scales = scales.data();
  w.zeros = zeros.data();
  run_restore(w, back.data());
  check(back == packed, "restored codes changed");
  const std::vector<int32_t> ids{0, outputs - 1, -1, 1 << 30, outputs / 2};
  auto taken = halves(ids.size() * inputs);
  run_rows(w, ids.data(), static_cast<int>(ids.size()), output_of(taken, type, 0, inputs));

  const auto x = halves(size_t(rows) * inputs), bias = halves(outputs), norm = halves(inputs);
  const auto residual = halves(size_t(rows) * outputs);
  const auto norms = normal(inputs);
  std::vector<float> first(size_t(rows) * outputs), second(first.size());
  int32_t read = 0;
  const Gate gate = static_cast<Gate>(turn % 4);
  const Product given[] = {
      {.weight = w,
       .bias = rows_of(bias, type, 1, outputs),
       .out = output_of(first, Type::f32, rows, outputs)},
      {.weight = w, .out = output_of(second, Type::f32, rows, outputs)},
  };
  ProjectJob job{.x = rows_of(x, type, rows, inputs),
                 .rows = rows,
                 .inputs = inputs,
                 .eps = 1e-5f,
                 .sparse = turn % 3 > 0,
                 .threshold = turn % 3 == 1 ? 0.5f : 1e9f,
                 .norms = turn % 2 ? norms.data() : nullptr,
                 .products = given,
                 .n = 2,
                 .gate = gate,
                 .read = &read};
  if (turn % 2) job.norm = rows_of(norm, type, 1, inputs);
  if (gate != Gate::none) job.residual = rows_of(residual, type, rows, outputs);
  run_project(job);
  check(read <= rows * inputs, "more channels took part than there are");
  for (const float y : second) check(std::isfinite(y), "a product is not finite");
}

// The norm and the turn of heads, and of heads that have neither.
void heads_of(int batch, int length, int dim, int turned, bool normed) {
  const int counts[] = {3, 1};
  const auto freqs = normal(turned / 2), norm = normal(dim);
  HeadsJob job{.batch = batch,
               .length = length,
               .dim = dim,
               .freqs = freqs.data(),
               .turned = turned,
               .offsets = std::vector<int>(batch, 7)};
  std::vector<float> from[2], to[2];
  for (int i = 0; i < 2; ++i) {
    from[i] = normal(size_t(batch) * length * counts[i] * dim);
    to[i].assign(from[i].size(), NAN);
    job.sides[i] = {.from = from[i].data(),
                    .to = to[i].data(),
                    .heads = counts[i],
                    .norm = normed ? norm.data() : nullptr,
                    .eps = 1e-6f};
  }
  run_heads(job);
  for (const auto& side : to) {
    for (const float x : side) check(std::isfinite(x), "a channel of a head was not written");
  }
}

}  // namespace leankv
