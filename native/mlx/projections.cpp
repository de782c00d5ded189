#include "projections.h"

#include "mlx/ops.h"
#include "operation.h"

namespace leankv {
namespace {

int rows_of(const mx::array& x) { return static_cast<int>(x.size() / x.shape(-1)); }

// [.., n] as [1, R, n].
Vectors vectors(Reader& reader, const mx::array& a) {
  return {.data = reader.dense<char>(), .type = type_of(a), .row_stride = a.shape(-1)};
}

class Project : public Operation {
 public:
  struct Part {
    int outputs, bits, group;
    bool bias;
  };

  Project(mx::Stream s, std::vector<Part> parts, const ProjectOptions& options)
      : Operation(s),
        parts_(std::move(parts)),
        normed_(options.norm.has_value()),
        scaled_(options.norms.has_value()),
        added_(options.residual.has_value()),
        threshold_(options.threshold),
        eps_(normed_ ? options.norm->second : 0),
        gate_(options.gate) {}
  const char* name() const override { return "LeanKVProject"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    size_t at = 0;
    const auto next = [&] { return vectors(reader, in[at++]); };
    ProjectJob job{.x = next(), .rows = rows_of(in[0]), .inputs = in[0].shape(-1)};
    std::vector<Product> products;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      const Type type = type_of(in[at + 1]);
      Product product{.weight = {.codes = reader.dense<uint32_t>(),  // evaluated in order
                                 .scales = reader.dense<char>(),
                                 .zeros = reader.dense<char>(),
                                 .type = type,
                                 .outputs = part.outputs,
                                 .inputs = job.inputs,
                                 .bits = part.bits,
                                 .group = part.group}};
      at += 3;
      if (part.bias) product.bias = next();
      if (gate_ == Gate::none || i == 1) {
        mx::array& to = out[gate_ == Gate::none ? i : 0];
        product.out = {.data = to.data<char>(), .type = type_of(to), .row_stride = part.outputs};
      }
      products.push_back(product);
    }
    if (normed_) job.norm = next();
    job.eps = eps_;
    job.norms = reader.dense<float>(scaled_);
    at += scaled_;
    if (added_) job.residual = next();
    job.gate = gate_;
    job.sparse = threshold_.has_value();
    job.threshold = threshold_.value_or(0);
    if (job.sparse) job.read = out.back().data<int32_t>();
    return [job, products = std::move(products)]() mutable {
      job.products = products.data();
      job.n = static_cast<int>(products.size());
      run_project(job);
    };
  }

 private:
  std::vector<Part> parts_;
  bool normed_, scaled_, added_;
  std::optional<float> threshold_;
  float eps_;
  Gate gate_;
};

}  // namespace

std::vector<mx::array> project(const mx::array& x, const std::vector<WeightArrays>& weights,
                               const std::vector<std::optional<mx::array>>& biases,
                               const ProjectOptions& options) {
  Arrays in{x};
  std::vector<Project::Part> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    const WeightArrays& w = weights[i];
    for (const auto& a : {w.codes, w.scales, w.zeros}) in.push_back(a);
    if (biases[i]) in.push_back(*biases[i]);
    parts.push_back({w.outputs, w.bits, w.group, biases[i].has_value()});
  }
  if (options.norm) in.push_back(options.norm->first);
  if (options.norms) in.push_back(*options.norms);
  if (options.residual) in.push_back(*options.residual);
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  for (size_t i = options.gate == Gate::none ? 0 : 1; i < weights.size(); ++i) {
    shapes.push_back(x.shape());
    shapes.back().back() = weights[i].outputs;
    types.push_back(x.dtype());
  }
  if (options.threshold) {
    shapes.emplace_back();
    types.push_back(mx::int32);
  }
  return mx::array::make_arrays(
      shapes, types, std::make_shared<Project>(cpu_stream(), std::move(parts), options), in);
}

}  // namespace leankv
