// What all primitives of this extension are.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "inputs.h"
#include "mlx/primitives.h"

namespace leankv {

using Arrays = std::vector<mx::array>;

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

// A primitive that allocates its outputs and runs in its stream what task() returns.
class Operation : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& a : inputs) encoder.set_input_array(a);
    for (auto& a : outputs) {
      provide(a);
      encoder.set_output_array(a);
    }
    Reader reader(inputs, stream());
    encoder.dispatch(task(inputs, reader, outputs));
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + " runs on the CPU only.");
  }

 protected:
  // Memory of an output.
  virtual void provide(mx::array& out) const { allocate(out); }

  // Plain numbers and pointers, which stay valid: MLX holds inputs, outputs and copies until the
  // stream is past them. It must not use `this`, which may be gone when it runs.
  virtual std::function<void()> task(const Arrays& in, Reader& reader, Arrays& out) const = 0;
};

}  // namespace leankv
