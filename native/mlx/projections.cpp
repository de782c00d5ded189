#include "projections.h"

#include <sys/mman.h>

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

// Weights that only have a shape, or their arrays.
Weight weight_of(const mx::array& codes, int outputs, int bits, int group) {
  return {.codes = codes.data<uint32_t>(),
          .outputs = outputs,
          .inputs = codes.shape(1),
          .bits = bits,
          .group = group};
}

// Makes large pages of what a small weight lies on, where the system can: it shares them with what
// lies beside it, so they can only be made once that is there. The last of the neighbors succeeds,
// and those before it change nothing. Larger weights have pages of their own, see `provide`.
void collapse(const void* memory, size_t size) {
#ifdef __linux__
  constexpr int collapse = 25;  // MADV_COLLAPSE, since Linux 6.1; unknown to older headers
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (size >= page) return;
  const auto at = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t p = at & -page; p < at + size; p += page) {
    madvise(reinterpret_cast<void*>(p), page, collapse);
  }
#else
  static_cast<void>(memory), static_cast<void>(size);
#endif
}

class Relay : public Operation {
 public:
  Relay(mx::Stream s, int bits) : Operation(s), bits_(bits) {}
  const char* name() const override { return "LeanKVRelay"; }

 protected:
  // Cache lines, and large pages where it has some: a channel that is not read must not share a
  // line with one that is, and weights are read once a step, from memory.
  void provide(mx::array& out) const override {
    constexpr size_t line = 64, page = size_t{2} << 20;
    mx::allocator::Data data = mx::allocator::malloc(out.nbytes() + line);
    auto* memory = static_cast<char*>(data.buffer().raw_ptr());
    const auto up = [](auto* p, size_t to) {
      return (reinterpret_cast<uintptr_t>(p) + to - 1) & -to;
    };
#ifdef MADV_HUGEPAGE
    const uintptr_t first = up(memory, page), end = up(memory + out.nbytes(), page) - page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
    const int64_t offset = up(memory, line) - reinterpret_cast<uintptr_t>(memory);
    out.set_data(std::move(data), out.size(), out.strides(),
                 {.contiguous = true, .row_contiguous = true, .col_contiguous = false}, offset);
  }

  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const char* packed = reader.dense<char>();
    const Weight weight = weight_of(out[0], in[0].shape(0), bits_, kStretch);
    return [weight, packed, codes = out[0].data<uint32_t>(), size = out[0].nbytes()] {
      run_relay(weight, packed, codes);
      collapse(codes, size);
    };
  }

 private:
  int bits_;
};

class Restore : public Operation {
 public:
  Restore(mx::Stream s, int bits) : Operation(s), bits_(bits) {}
  const char* name() const override { return "LeanKVRestore"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    Weight weight = weight_of(in[0], out[0].shape(0), bits_, kStretch);
    weight.codes = reader.dense<uint32_t>();
    return [weight, packed = out[0].data<char>()] { run_restore(weight, packed); };
  }

 private:
  int bits_;
};

class Rows : public Operation {
 public:
  Rows(mx::Stream s, int outputs, int bits, int group)
      : Operation(s), outputs_(outputs), bits_(bits), group_(group) {}
  const char* name() const override { return "LeanKVRows"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    Weight weight = weight_of(in[0], outputs_, bits_, group_);
    weight.codes = reader.dense<uint32_t>();
    weight.scales = reader.dense<char>();
    weight.zeros = reader.dense<char>();
    weight.type = type_of(in[1]);
    const auto* ids = reader.dense<int32_t>();
    const Output to{
        .data = out[0].data<char>(), .type = type_of(out[0]), .row_stride = weight.inputs};
    return [weight, ids, n = static_cast<int>(in[3].size()), to] { run_rows(weight, ids, n, to); };
  }

 private:
  int outputs_, bits_, group_;
};

}  // namespace

mx::array relay(const mx::array& codes, int bits) {
  const Weight shape{.outputs = codes.shape(0), .inputs = codes.shape(1) * 32 / bits, .bits = bits};
  return mx::array({shape.tiles(), shape.inputs, kLanes}, mx::uint32,
                   std::make_shared<Relay>(cpu_stream(), bits), {codes});
}

mx::array restore(const WeightArrays& weight) {
  return mx::array({weight.outputs, weight.codes.shape(1) * weight.bits / 32}, mx::uint32,
                   std::make_shared<Restore>(cpu_stream(), weight.bits), {weight.codes});
}

mx::array rows(const WeightArrays& weight, const mx::array& ids, mx::Dtype dtype) {
  mx::Shape shape = ids.shape();
  shape.push_back(weight.codes.shape(1));
  return mx::array(
      std::move(shape), dtype,
      std::make_shared<Rows>(cpu_stream(), weight.outputs, weight.bits, weight.group),
      {weight.codes, weight.scales, weight.zeros, mx::astype(ids, mx::int32, cpu_stream())});
}

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
