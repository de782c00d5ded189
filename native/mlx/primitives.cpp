#include "primitives.h"

#include <array>
#include <functional>

#include "inputs.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace leankv {
namespace {

using Arrays = std::vector<mx::array>;
using Rotations = std::pair<RotationArrays, RotationArrays>;

mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

// A primitive that allocates its outputs and runs in its stream what task() returns.
class Operation : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& a : inputs) encoder.set_input_array(a);
    for (auto& a : outputs) {
      allocate(a);
      encoder.set_output_array(a);
    }
    Reader reader(inputs, stream());
    encoder.dispatch(task(inputs, reader, outputs));
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + " runs on the CPU only.");
  }

 protected:
  // Plain numbers and pointers, which stay valid: MLX holds inputs, outputs and copies until the
  // stream is past them. It must not use `this`, which may be gone when it runs.
  virtual std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const = 0;
};

// The parts of a sequence that several operations share.
struct Parts {
  std::vector<Format> formats;
  bool centered = false, rotated = false;
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
      return Rotation{nullptr, r.signs.shape(0), r.block, r.head_dim};
    };
    k_rotation = plain(rotations->first);
    v_rotation = plain(rotations->second);
  }

  void read_rotations(Reader& reader, Rotation& k, Rotation& v) const {
    k = k_rotation;
    v = v_rotation;
    reader.rotation(k, rotated);
    reader.rotation(v, rotated);
  }

  std::vector<Body> bodies(Reader& reader) const {
    std::vector<Body> bodies;
    for (const auto& format : formats) bodies.push_back(reader.body(format));
    return bodies;
  }
};

class DecodeAttention : public Operation {
 public:
  DecodeAttention(mx::Stream s, Parts parts, float scale, bool causal, bool sink_logits, float skip)
      : Operation(s),
        parts_(std::move(parts)),
        scale_(scale),
        causal_(causal),
        logits_(sink_logits),
        skip_(skip) {}
  const char* name() const override { return "LeanKVDecodeAttention"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    AttentionJob job;
    const mx::array& q = in[0];
    job.ends.queries = reader.rows();
    const mx::array& k = in[1];
    const mx::array& v = in[2];
    job.args.exact_k = reader.rows();
    job.args.exact_v = reader.rows();
    auto bodies = parts_.bodies(reader);
    if (parts_.centered) {
      job.mu_k = reader.dense<float>();
      job.mu_v = reader.dense<float>();
    }
    parts_.read_rotations(reader, job.ends.k_rotation, job.ends.v_rotation);
    if (logits_) job.ends.sink_logits = reader.dense<float>();
    job.args.heads = k.shape(0);
    job.args.group = q.shape(0) / k.shape(0);
    job.args.length = q.shape(1);
    job.args.k_dim = k.shape(2);
    job.args.v_dim = v.shape(2);
    job.args.exact = k.shape(1);
    job.args.causal = causal_;
    job.args.skip = skip_;
    job.ends.scale = scale_;
    job.ends.out = output_of(out[0]);
    job.lse = out[1].data<float>();
    if (out.size() > 2) job.reads = out[2].data<int32_t>();
    return [job, bodies = std::move(bodies)]() mutable {
      job.args.bodies = bodies.data();
      job.args.n_bodies = static_cast<int>(bodies.size());
      run_attention(job);
    };
  }

 private:
  Parts parts_;
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
    PrefillJob job;
    const mx::array& q = in[0];
    job.ends.queries = reader.rows();
    const mx::array& k = in[1];
    const mx::array& v = in[2];
    job.args.k = reader.rows();
    job.args.v = reader.rows();
    parts_.read_rotations(reader, job.ends.k_rotation, job.ends.v_rotation);
    if (present_) job.args.present = reader.dense<bool>();
    if (logits_) job.ends.sink_logits = reader.dense<float>();
    job.args.heads = k.shape(0);
    job.args.group = q.shape(0) / k.shape(0);
    job.args.length = q.shape(1);
    job.args.tokens = k.shape(1);
    job.args.k_dim = k.shape(2);
    job.args.v_dim = v.shape(2);
    job.args.causal = causal_;
    job.ends.scale = scale_;
    job.ends.out = output_of(out[0]);
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
    EncodeArgs args;
    args.k = reader.rows();
    args.v = reader.rows();
    args.mu_k = reader.dense<float>();
    args.mu_v = reader.dense<float>();
    args.tokens = in[0].shape(1);
    args.format = format_;
    args.rounding = rounding_;
    args.blocks = out[0].data<uint32_t>();
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
    RepackArgs args;
    args.body = reader.body(format_);
    args.index = reader.dense<int32_t>();
    args.kept = in[3].shape(1);
    args.blocks = out[0].data<uint32_t>();
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
    DecodeJob job;
    job.exact_k = reader.rows();
    job.exact_v = reader.rows();
    auto bodies = parts_.bodies(reader);
    if (parts_.centered) {
      job.args.mu_k = reader.dense<float>();
      job.args.mu_v = reader.dense<float>();
    }
    parts_.read_rotations(reader, job.args.k_rotation, job.args.v_rotation);
    job.args.k = output_of(out[0]);
    job.args.v = output_of(out[1]);
    job.heads = in[0].shape(0);
    job.exact = in[0].shape(1);
    job.sinks = sinks_;
    job.k_dim = in[0].shape(2);
    job.v_dim = in[1].shape(2);
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
  Append(mx::Stream s, Parts parts) : Operation(s), parts_(std::move(parts)) {}
  const char* name() const override { return "LeanKVAppend"; }

 protected:
  std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const override {
    struct OneSide {
      Vectors exact, rows;
      Rotation rotation;
      Output out;
    };
    std::array<OneSide, 2> sides;
    for (auto& side : sides) side.exact = reader.rows();
    for (auto& side : sides) side.rows = reader.rows();
    parts_.read_rotations(reader, sides[0].rotation, sides[1].rotation);
    for (int i = 0; i < 2; ++i) sides[i].out = output_of(out[i]);
    return [sides, n_exact = in[0].shape(1), n_rows = in[2].shape(1), heads = in[0].shape(0)] {
      for (const OneSide& side : sides) {
        run_append(side.exact, n_exact, side.rows, n_rows, side.rotation, heads, side.out);
      }
    };
  }

 private:
  Parts parts_;
};

mx::array as_float(const mx::array& a) { return mx::astype(a, mx::float32, cpu_stream()); }

}  // namespace

std::vector<mx::array> decode_attention(const mx::array& queries,
                                        const std::vector<BodyArrays>& bodies,
                                        const mx::array& exact_k, const mx::array& exact_v,
                                        const std::optional<CenterArrays>& centers, float scale,
                                        bool causal, const std::optional<mx::array>& sink_logits,
                                        const std::optional<Rotations>& rotations, float skip) {
  Arrays in{queries, exact_k, exact_v};
  Parts parts;
  parts.add_bodies(in, bodies, centers);
  parts.add_rotations(in, rotations);
  if (sink_logits) in.push_back(as_float(*sink_logits));
  const int out_dim = rotations ? rotations->second.head_dim : exact_v.shape(2);
  const auto op = std::make_shared<DecodeAttention>(cpu_stream(), std::move(parts), scale, causal,
                                                    sink_logits.has_value(), skip);
  std::vector<mx::Shape> shapes{{queries.shape(0), queries.shape(1), out_dim},
                                {queries.shape(0), queries.shape(1)}};
  std::vector<mx::Dtype> types{rotations ? queries.dtype() : mx::float32, mx::float32};
  if (skip > 0) {
    shapes.push_back({exact_k.shape(0), 2});
    types.push_back(mx::int32);
  }
  return mx::array::make_arrays(shapes, types, op, in);
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

std::vector<mx::array> append(const mx::array& exact_k, const mx::array& exact_v,
                              const mx::array& k, const mx::array& v, const Rotations& rotations) {
  Arrays in{exact_k, exact_v, k, v};
  Parts parts;
  parts.add_rotations(in, rotations);
  const int heads = exact_k.shape(0), tokens = exact_k.shape(1) + k.shape(1);
  return mx::array::make_arrays(
      {{heads, tokens, exact_k.shape(2)}, {heads, tokens, exact_v.shape(2)}},
      {exact_k.dtype(), exact_v.dtype()}, std::make_shared<Append>(cpu_stream(), std::move(parts)),
      in);
}

}  // namespace leankv
