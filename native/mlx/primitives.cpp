#include "primitives.h"

#include <array>

#include "mlx/ops.h"
#include "operation.h"

namespace leankv {
namespace {

using Rotations = std::pair<RotationArrays, RotationArrays>;

// The parts of a sequence that several operations share.
struct Parts {
  std::vector<Format> formats;
  bool centered = false, rotated = false, scaled = false;
  Rotation k_rotation, v_rotation;  // without the signs, which are inputs

  void add_bodies(Arrays& in, const std::vector<BodyArrays>& bodies,
                  const std::optional<CenterArrays>& centers) {
    for (const auto& body : bodies) {
      for (const auto& a : {body.pool, body.table, body.lengths}) in.push_back(a);
      formats.push_back(body.format);
    }
    centered = centers.has_value();
    if (centers) {
      in.push_back(centers->k);
      in.push_back(centers->v);
    }
  }

  void add_rotations(Arrays& in, const std::optional<Rotations>& rotations) {
    rotated = rotations.has_value();
    if (!rotations) return;
    const auto plain = [&](const RotationArrays& r) {
      in.push_back(r.signs);
      return Rotation{.dim = r.signs.shape(0), .block = r.block, .head_dim = r.head_dim};
    };
    k_rotation = plain(rotations->first);
    v_rotation = plain(rotations->second);
  }

  void add_scales(Arrays& in, const std::optional<mx::array>& scales) {
    scaled = scales.has_value();
    if (scales) in.push_back(*scales);
  }

  // Of keys and values; null without centers.
  std::array<const float*, 2> centers(Reader& reader) const {
    return {reader.dense<float>(centered), reader.dense<float>(centered)};
  }

  // Of keys and values.
  std::array<Rotation, 2> rotations(Reader& reader) const {
    std::array both{k_rotation, v_rotation};
    for (Rotation& rotation : both) rotation.signs = reader.dense<float>(rotated);
    return both;
  }

  std::vector<Body> bodies(Reader& reader) const {
    std::vector<Body> bodies;
    for (const auto& format : formats) bodies.push_back(reader.body(format));
    return bodies;
  }
};

class DecodeAttention : public Operation {
 public:
  DecodeAttention(mx::Stream s, std::vector<Parts> sequences, Parts ends, float scale, bool causal,
                  bool sink_logits, float skip)
      : Operation(s),
        sequences_(std::move(sequences)),
        ends_(std::move(ends)),
        scale_(scale),
        causal_(causal),
        logits_(sink_logits),
        skip_(skip) {}
  const char* name() const override { return "LeanKVDecodeAttention"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const int query_heads = in[0].shape(-3), length = in[0].shape(-2);
    const std::vector<Vectors> queries = reader.batch();
    std::vector<AttentionJob> jobs;
    std::vector<std::vector<Body>> bodies;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const int b = static_cast<int>(i), heads = reader.next().shape(0);
      const int exact = reader.next().shape(1), k_dim = reader.next().shape(2);
      const Vectors exact_k = reader.rows();
      const int v_dim = reader.next().shape(2);
      const Vectors exact_v = reader.rows();
      bodies.push_back(sequences_[i].bodies(reader));
      const auto [mu_k, mu_v] = sequences_[i].centers(reader);
      const float* scales = reader.dense<float>(sequences_[i].scaled);
      jobs.push_back({
          .args = {.heads = heads,
                   .group = query_heads / heads,
                   .length = length,
                   .k_dim = k_dim,
                   .v_dim = v_dim,
                   .exact_k = exact_k,
                   .exact_v = exact_v,
                   .exact = exact,
                   .causal = causal_,
                   .skip = bodies.back().empty() || exact == 0 ? 0 : skip_},
          .ends = {.queries = queries[i], .scale = scale_, .out = output_of(out[0], b)},
          .scales = scales,
          .mu_k = mu_k,
          .mu_v = mu_v,
          .lse = out[1].data<float>() + int64_t{b} * query_heads * length,
          .reads = out.size() > 2 ? out[2].data<int32_t>() + int64_t{b} * 2 * heads : nullptr,
      });
    }
    const auto [k_rotation, v_rotation] = ends_.rotations(reader);
    const float* logits = reader.dense<float>(logits_);
    for (AttentionJob& job : jobs) {
      job.ends.k_rotation = k_rotation;
      job.ends.v_rotation = v_rotation;
      job.ends.sink_logits = logits;
    }
    return [jobs = std::move(jobs), bodies = std::move(bodies)]() mutable {
      for (size_t i = 0; i < jobs.size(); ++i) {
        jobs[i].args.bodies = bodies[i].data();
        jobs[i].args.n_bodies = static_cast<int>(bodies[i].size());
      }
      run_attention(jobs);
    };
  }

 private:
  std::vector<Parts> sequences_;
  Parts ends_;
  float scale_;
  bool causal_, logits_;
  float skip_;
};

class PrefillAttention : public Operation {
 public:
  PrefillAttention(mx::Stream s, Parts parts, float scale, bool causal, bool present,
                   bool sink_logits)
      : Operation(s),
        parts_(std::move(parts)),
        scale_(scale),
        causal_(causal),
        present_(present),
        logits_(sink_logits) {}
  const char* name() const override { return "LeanKVPrefillAttention"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const mx::array &q = in[0], &k = in[1], &v = in[2];
    const Vectors queries = reader.rows(), keys = reader.rows(), values = reader.rows();
    const auto [k_rotation, v_rotation] = parts_.rotations(reader);
    const PrefillJob job{
        .args = {.heads = k.shape(0),
                 .group = q.shape(0) / k.shape(0),
                 .length = q.shape(1),
                 .tokens = k.shape(1),
                 .k_dim = k.shape(2),
                 .v_dim = v.shape(2),
                 .k = keys,
                 .v = values,
                 .present = reader.dense<bool>(present_),
                 .causal = causal_},
        .ends = {.queries = queries,
                 .k_rotation = k_rotation,
                 .v_rotation = v_rotation,
                 .sink_logits = reader.dense<float>(logits_),
                 .scale = scale_,
                 .out = output_of(out[0])},
    };
    return [job] { run_prefill(job); };
  }

 private:
  Parts parts_;
  float scale_;
  bool causal_, present_, logits_;
};

class Encode : public Operation {
 public:
  Encode(mx::Stream s, Format format, Rounding rounding)
      : Operation(s), format_(format), rounding_(rounding) {}
  const char* name() const override { return "LeanKVEncode"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    const EncodeArgs args{.k = reader.rows(),  // braces are evaluated in order
                          .v = reader.rows(),
                          .mu_k = reader.dense<float>(),
                          .mu_v = reader.dense<float>(),
                          .tokens = in[0].shape(1),
                          .format = format_,
                          .rounding = rounding_,
                          .blocks = out[0].data<uint32_t>()};
    return [args, heads = in[0].shape(0)] { run_encode(args, heads); };
  }

 private:
  Format format_;
  Rounding rounding_;
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
  Decode(mx::Stream s, Parts parts, int sinks)
      : Operation(s), parts_(std::move(parts)), sinks_(sinks) {}
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
        .exact_k = exact_k,
        .exact_v = exact_v,
        .exact = in[0].shape(1),
        .sinks = sinks_,
        .k_dim = in[0].shape(2),
        .v_dim = in[1].shape(2),
    };
    return [job, bodies = std::move(bodies)]() mutable {
      job.bodies = bodies.data();
      job.n_bodies = static_cast<int>(bodies.size());
      run_decode(job);
    };
  }

 private:
  Parts parts_;
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

mx::array as_float(const mx::array& a) { return mx::astype(a, mx::float32, cpu_stream()); }

}  // namespace

std::vector<mx::array> decode_attention(const mx::array& queries,
                                        const std::vector<SequenceArrays>& sequences, float scale,
                                        bool causal, const std::optional<mx::array>& sink_logits,
                                        const std::optional<Rotations>& rotations, float skip) {
  Arrays in{queries};
  std::vector<Parts> parts;
  for (const SequenceArrays& sequence : sequences) {
    in.push_back(sequence.exact_k);
    in.push_back(sequence.exact_v);
    parts.emplace_back().add_bodies(in, sequence.bodies, sequence.centers);
    parts.back().add_scales(in, sequence.scales);
  }
  Parts ends;
  ends.add_rotations(in, rotations);
  if (sink_logits) in.push_back(as_float(*sink_logits));
  const SequenceArrays& first = sequences.front();
  mx::Shape shape = queries.shape(), rows(shape.begin(), shape.end() - 1);
  shape.back() = rotations ? rotations->second.head_dim : first.exact_v.shape(2);
  std::vector<mx::Shape> shapes{shape, rows};
  std::vector<mx::Dtype> types{rotations ? queries.dtype() : mx::float32, mx::float32};
  if (skip > 0) {
    shapes.push_back({static_cast<int>(sequences.size()) * first.exact_k.shape(0), 2});
    types.push_back(mx::int32);
  }
  const auto op = std::make_shared<DecodeAttention>(cpu_stream(), std::move(parts), std::move(ends),
                                                    scale, causal, sink_logits.has_value(), skip);
  return mx::array::make_arrays(std::move(shapes), types, op, in);
}

mx::array prefill_attention(const mx::array& queries, const mx::array& k, const mx::array& v,
                            float scale, bool causal, const std::optional<mx::array>& present,
                            const std::optional<mx::array>& sink_logits,
                            const std::optional<Rotations>& rotations) {
  Arrays in{queries, k, v};
  Parts parts;
  parts.add_rotations(in, rotations);
  if (present) in.push_back(*present);
  if (sink_logits) in.push_back(as_float(*sink_logits));
  const int out_dim = rotations ? rotations->second.head_dim : v.shape(2);
  return mx::array({queries.shape(0), queries.shape(1), out_dim}, queries.dtype(),
                   std::make_shared<PrefillAttention>(cpu_stream(), std::move(parts), scale, causal,
                                                      present.has_value(), sink_logits.has_value()),
                   std::move(in));
}

mx::array encode(const mx::array& k, const mx::array& v, const CenterArrays& centers,
                 const Format& format, Rounding rounding) {
  return mx::array({k.shape(0), blocks_of(k.shape(1)), format.words()}, mx::uint32,
                   std::make_shared<Encode>(cpu_stream(), format, rounding),
                   {k, v, centers.k, centers.v});
}

mx::array repack(const BodyArrays& body, const mx::array& index) {
  return mx::array(
      {index.shape(0), blocks_of(index.shape(1)), body.format.words()}, mx::uint32,
      std::make_shared<Repack>(cpu_stream(), body.format),
      {body.pool, body.table, body.lengths, mx::astype(index, mx::int32, cpu_stream())});
}

std::vector<mx::array> decode(const std::vector<BodyArrays>& bodies, const mx::array& exact_k,
                              const mx::array& exact_v, const std::optional<CenterArrays>& centers,
                              int sinks, mx::Dtype dtype,
                              const std::optional<Rotations>& rotations) {
  Arrays in{exact_k, exact_v};
  Parts parts;
  parts.add_bodies(in, bodies, centers);
  parts.add_rotations(in, rotations);
  int tokens = exact_k.shape(1);
  for (const auto& body : bodies) tokens += kTile * body.table.shape(1);
  const int k_dim = rotations ? rotations->first.head_dim : exact_k.shape(2);
  const int v_dim = rotations ? rotations->second.head_dim : exact_v.shape(2);
  const int heads = exact_k.shape(0);
  return mx::array::make_arrays({{heads, tokens, k_dim}, {heads, tokens, v_dim}}, {dtype, dtype},
                                std::make_shared<Decode>(cpu_stream(), std::move(parts), sinks),
                                in);
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
