// Encoding, decoding, repacking and appending.
#include <algorithm>

#include "mlx/ops.h"
#include "parts.h"

namespace leankv {
namespace {

class Encode : public Operation {
 public:
  Encode(mx::Stream s, Format format, Rounding rounding, bool shaped)
      : Operation(s), format_(format), rounding_(rounding), shaped_(shaped) {}
  const char* name() const override { return "LeanKVEncode"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const EncodeArgs args{.k = reader.rows(),  // braces are evaluated in order
                          .v = reader.rows(),
                          .mu_k = reader.dense<float>(),
                          .mu_v = reader.dense<float>(),
                          .shaping = reader.dense<float>(shaped_),
                          .tokens = in[0].shape(1),
                          .format = format_,
                          .rounding = rounding_,
                          .blocks = out[0].data<uint32_t>()};
    return [args, heads = in[0].shape(0)] { run_encode(args, heads); };
  }

 private:
  Format format_;
  Rounding rounding_;
  bool shaped_;
};

class Repack : public Operation {
 public:
  Repack(mx::Stream s, Format format) : Operation(s), format_(format) {}
  const char* name() const override { return "LeanKVRepack"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const RepackArgs args{.body = reader.body(format_),
                          .index = reader.dense<int32_t>(),
                          .kept = in[3].shape(1),
                          .blocks = out[0].data<uint32_t>()};
    return [args, heads = in[3].shape(0)] { run_repack(args, heads); };
  }

 private:
  Format format_;
};

class Decode : public Operation {
 public:
  Decode(mx::Stream s, Parts parts, std::vector<Place> places, int sinks)
      : Operation(s), parts_(std::move(parts)), places_(std::move(places)), sinks_(sinks) {}
  const char* name() const override { return "LeanKVDecode"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const Vectors exact_k = reader.rows(), exact_v = reader.rows();
    auto bodies = parts_.bodies(reader);
    const auto [mu_k, mu_v] = parts_.centers(reader);
    const auto [k_rotation, v_rotation] = parts_.rotations(reader);
    DecodeJob job{
        .args = {.k = output_of(out[0]),
                 .v = output_of(out[1]),
                 .mu_k = mu_k,
                 .mu_v = mu_v,
                 .k_rotation = k_rotation,
                 .v_rotation = v_rotation},
        .heads = in[0].shape(0),
        .slots = out[0].shape(1) - in[0].shape(1),
        .exact_k = exact_k,
        .exact_v = exact_v,
        .exact = in[0].shape(1),
        .sinks = sinks_,
        .k_dim = in[0].shape(2),
        .v_dim = in[1].shape(2),
    };
    return [job, bodies = std::move(bodies), places = places_]() mutable {
      job.bodies = bodies.data();
      job.places = places.data();
      job.n_bodies = static_cast<int>(bodies.size());
      run_decode(job);
    };
  }

 private:
  Parts parts_;
  std::vector<Place> places_;
  int sinks_;
};

class Append : public Operation {
 public:
  Append(mx::Stream s, std::vector<bool> scaled, Parts parts)
      : Operation(s), scaled_(std::move(scaled)), parts_(std::move(parts)) {}
  const char* name() const override { return "LeanKVAppend"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const size_t n = out.size() / 2;  // sequences
    std::vector<AppendJob> jobs;
    for (size_t i = 0; i < out.size(); ++i) {
      const int heads = reader.next().shape(0), exact = reader.next().shape(1);
      jobs.push_back({.exact = reader.rows(),
                      .n_exact = exact,
                      .n_rows = out[i].shape(1) - exact,
                      .heads = heads,
                      .out = output_of(out[i])});
    }
    const std::array rows{reader.batch(), reader.batch()};
    for (size_t i = 0; i < n; ++i) jobs[i].scales = reader.dense<float>(scaled_[i]);
    const auto rotations = parts_.rotations(reader);
    for (size_t i = 0; i < out.size(); ++i) {
      jobs[i].rows = rows[i / n][i % n];
      jobs[i].rotation = rotations[i / n];
    }
    return [jobs = std::move(jobs)] { run_append(jobs); };
  }

 private:
  std::vector<bool> scaled_;
  Parts parts_;
};

}  // namespace

mx::array encode(const mx::array& k, const mx::array& v, const CenterArrays& centers,
                 const Format& format, Rounding rounding, const std::optional<mx::array>& shaping) {
  std::vector<mx::array> inputs{k, v, centers.k, centers.v};
  if (shaping) inputs.push_back(*shaping);
  return mx::array({k.shape(0), blocks_of(k.shape(1)), format.words()}, mx::uint32,
                   std::make_shared<Encode>(cpu_stream(), format, rounding, shaping.has_value()),
                   inputs);
}

mx::array repack(const BodyArrays& body, const mx::array& index) {
  return mx::array(
      {index.shape(0), blocks_of(index.shape(1)), body.format.words()}, mx::uint32,
      std::make_shared<Repack>(cpu_stream(), body.format),
      {body.pool, body.table, body.lengths, mx::astype(index, mx::int32, cpu_stream())});
}

std::vector<mx::array> decode(const std::vector<BodyArrays>& bodies,
                              const std::vector<Place>& places, const mx::array& exact_k,
                              const mx::array& exact_v, const std::optional<CenterArrays>& centers,
                              int sinks, mx::Dtype dtype,
                              const std::optional<Rotations>& rotations) {
  Arrays in{exact_k, exact_v};
  Parts parts;
  parts.add_bodies(in, bodies, centers);
  parts.add_rotations(in, rotations);
  int slots = 0;
  for (size_t i = 0; i < bodies.size(); ++i) {
    slots = std::max(slots, places[i].first + kTile * bodies[i].table.shape(1));
  }
  const int tokens = exact_k.shape(1) + slots;
  const int k_dim = rotations ? rotations->first.head_dim : exact_k.shape(2);
  const int v_dim = rotations ? rotations->second.head_dim : exact_v.shape(2);
  const int heads = exact_k.shape(0);
  return mx::array::make_arrays(
      {{heads, tokens, k_dim}, {heads, tokens, v_dim}}, {dtype, dtype},
      std::make_shared<Decode>(cpu_stream(), std::move(parts), places, sinks), in);
}

std::vector<mx::array> append(const std::vector<mx::array>& exact_k,
                              const std::vector<mx::array>& exact_v, const mx::array& k,
                              const mx::array& v,
                              const std::vector<std::optional<mx::array>>& scales,
                              const Rotations& rotations) {
  Arrays in(exact_k);
  in.insert(in.end(), exact_v.begin(), exact_v.end());
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  for (const mx::array& exact : in) {
    shapes.push_back({exact.shape(0), exact.shape(1) + k.shape(-2), exact.shape(2)});
    types.push_back(exact.dtype());
  }
  in.push_back(k);
  in.push_back(v);
  std::vector<bool> scaled;
  for (const auto& of_sequence : scales) {
    scaled.push_back(of_sequence.has_value());
    if (of_sequence) in.push_back(*of_sequence);
  }
  Parts parts;
  parts.add_rotations(in, rotations);
  return mx::array::make_arrays(
      std::move(shapes), types,
      std::make_shared<Append>(cpu_stream(), std::move(scaled), std::move(parts)), in);
}

}  // namespace leankv
