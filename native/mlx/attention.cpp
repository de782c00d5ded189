// Attention, of a few new tokens over what is stored and of many over a working copy.
#include "mlx/ops.h"
#include "parts.h"

namespace leankv {
namespace {

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

}  // namespace leankv
