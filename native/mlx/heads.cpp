#include "heads.h"

#include "../heads.h"
#include "operation.h"

namespace leankv {
namespace {

class Heads : public Operation {
 public:
  Heads(mx::Stream s, int dim, float scale, std::vector<int> offsets, const NormOption& query_norm,
        const NormOption& key_norm)
      : Operation(s), dim_(dim), scale_(scale), offsets_(std::move(offsets)) {
    if (query_norm) eps_[0] = query_norm->second;
    if (key_norm) eps_[1] = key_norm->second;
  }
  const char* name() const override { return "LeanKVHeads"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    HeadsJob job{.batch = in[0].shape(0),
                 .length = in[0].shape(1),
                 .dim = dim_,
                 .turned = 2 * in[2].shape(0),
                 .scale = scale_,
                 .offsets = offsets_};
    for (int i = 0; i < 2; ++i) {
      job.sides[i] = {.from = reader.dense<float>(),
                      .to = out[i].data<float>(),
                      .heads = in[i].shape(2) / dim_};
    }
    job.freqs = reader.dense<float>();
    for (int i = 0; i < 2; ++i) {
      job.sides[i].norm = reader.dense<float>(eps_[i].has_value());
      job.sides[i].eps = eps_[i].value_or(0);
    }
    return [job] { run_heads(job); };
  }

 private:
  int dim_;
  float scale_;
  std::vector<int> offsets_;
  std::optional<float> eps_[2];
};

}  // namespace

std::vector<mx::array> heads(const mx::array& queries, const mx::array& keys, int dim,
                             const mx::array& freqs, float scale, const std::vector<int>& offsets,
                             const NormOption& query_norm, const NormOption& key_norm) {
  Arrays in{queries, keys, freqs};
  if (query_norm) in.push_back(query_norm->first);
  if (key_norm) in.push_back(key_norm->first);
  std::vector<int> all(offsets);
  all.resize(queries.shape(0), offsets.front());
  std::vector<mx::Shape> shapes;
  for (const auto& x : {queries, keys}) {
    shapes.push_back({x.shape(0), x.shape(2) / dim, x.shape(1), dim});
  }
  return mx::array::make_arrays(
      shapes, {mx::float32, mx::float32},
      std::make_shared<Heads>(cpu_stream(), dim, scale, std::move(all), query_norm, key_norm), in);
}

}  // namespace leankv
