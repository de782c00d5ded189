// The Python module leankv_mlx._native; leankv_mlx/kernels/cpu.py and
// leankv_mlx/projections/native.py are its users.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "../dispatch.h"
#include "../run.h"
#include "../thread_pool.h"
#include "heads.h"
#include "mlx/version.h"
#include "primitives.h"
#include "projections.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace leankv {
namespace {

Side side_of(const std::vector<int>& bits) {
  if (bits.empty() || bits.size() > kMaxGroups) {
    throw std::invalid_argument("expected 1 to 8 channel groups.");
  }
  Side side;
  side.groups = static_cast<int>(bits.size());
  for (int c = 0; c < side.groups; ++c) {
    if (bits[c] != 0 && bits[c] != 2 && bits[c] != 3 && bits[c] != 4 && bits[c] != 8) {
      throw std::invalid_argument("expected bits of 0, 2, 3, 4 or 8.");
    }
    side.bits[c] = static_cast<uint8_t>(bits[c]);
  }
  return side;
}

Rounding rounding_of(const std::string& name) {
  if (name == "search") return Rounding::search;
  if (name == "rms") return Rounding::rms;
  throw std::invalid_argument("expected rounding search or rms.");
}

Gate gate_of(const std::optional<std::string>& name) {
  if (!name) return Gate::none;
  if (*name == "silu") return Gate::silu;
  if (*name == "gelu") return Gate::gelu;
  if (*name == "gelu_approx") return Gate::gelu_approx;
  throw std::invalid_argument("expected gate silu, gelu or gelu_approx.");
}

}  // namespace

NB_MODULE(_native, m) {
  kernels();  // an unknown LEANKV_CPU_ISA is an error of the import
  m.attr("mlx_version") = nb::make_tuple(MLX_VERSION_MAJOR, MLX_VERSION_MINOR, MLX_VERSION_PATCH);
  m.def("isas", &available_isas, "Instruction sets that run here, best first.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("select_isa", &select_isa, "name"_a, "Use an instruction set, '' for the best.");
  m.def("threads", &thread_count, "Threads in use.");
  m.def("use_one_thread", &use_one_thread, "on"_a, "Use one thread from now on, or all again.");
  m.def("multiply_add_rate", &multiply_add_rate, "n"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Multiply-adds per second of the threads in use, n on each, and nothing else to do.");

  nb::class_<Format>(m, "Format")
      .def(
          "__init__",
          [](Format* self, const std::vector<int>& k, const std::vector<int>& v) {
            new (self) Format{side_of(k), side_of(v)};
          },
          "k_bits"_a, "v_bits"_a);
  nb::class_<BodyArrays>(m, "Body").def(nb::init<mx::array, mx::array, mx::array, Format>(),
                                        "pool"_a, "table"_a, "lengths"_a, "format"_a);
  nb::class_<CenterArrays>(m, "Centers").def(nb::init<mx::array, mx::array>(), "k"_a, "v"_a);
  nb::class_<RotationArrays>(m, "Rotation")
      .def(nb::init<mx::array, int, int, std::optional<mx::array>>(), "signs"_a, "block"_a,
           "head_dim"_a, "order"_a.none());

  nb::class_<SequenceArrays>(m, "Sequence")
      .def(nb::init<std::vector<BodyArrays>, mx::array, mx::array, std::optional<CenterArrays>,
                    std::optional<mx::array>>(),
           "bodies"_a, "exact_k"_a, "exact_v"_a, "centers"_a.none(), "scales"_a.none());

  m.def("decode_attention", &decode_attention, "queries"_a, "sequences"_a, "scale"_a, "causal"_a,
        "sink_logits"_a.none(), "rotations"_a.none(), "skip"_a);
  m.def("prefill_attention", &prefill_attention, "queries"_a, "k"_a, "v"_a, "scale"_a, "causal"_a,
        "present"_a.none(), "sink_logits"_a.none(), "rotations"_a.none());
  m.def(
      "encode",
      [](const mx::array& k, const mx::array& v, const CenterArrays& centers, const Format& format,
         const std::string& rounding, const std::optional<mx::array>& shaping) {
        return encode(k, v, centers, format, rounding_of(rounding), shaping);
      },
      "k"_a, "v"_a, "centers"_a, "format"_a, "rounding"_a, "shaping"_a.none());
  m.def("repack", &repack, "body"_a, "index"_a);
  m.def("decode", &decode, "bodies"_a, "places"_a, "exact_k"_a, "exact_v"_a, "centers"_a.none(),
        "sinks"_a, "dtype"_a, "rotations"_a.none());
  m.def("append", &append, "exact_k"_a, "exact_v"_a, "k"_a, "v"_a, "scales"_a, "rotations"_a);

  nb::class_<WeightArrays>(m, "Weight")
      .def(nb::init<mx::array, mx::array, mx::array, int, int, int>(), "codes"_a, "scales"_a,
           "biases"_a, "outputs"_a, "bits"_a, "group"_a);
  m.def("relay", &relay, "codes"_a, "bits"_a);
  m.def("restore", &restore, "weight"_a);
  m.def("rows", &rows, "weight"_a, "ids"_a, "dtype"_a);
  m.def(
      "project",
      [](const mx::array& x, const std::vector<WeightArrays>& weights,
         const std::vector<std::optional<mx::array>>& biases,
         const std::optional<std::pair<mx::array, float>>& norm, std::optional<float> threshold,
         const std::optional<mx::array>& norms, const std::optional<mx::array>& residual,
         const std::optional<std::string>& gate) {
        return project(x, weights, biases,
                       {.norm = norm,
                        .threshold = threshold,
                        .norms = norms,
                        .residual = residual,
                        .gate = gate_of(gate)});
      },
      "x"_a, "weights"_a, "biases"_a, "norm"_a.none(), "threshold"_a.none(), "norms"_a.none(),
      "residual"_a.none(), "gate"_a.none());
  m.def("heads", &heads, "queries"_a, "keys"_a, "dim"_a, "freqs"_a, "scale"_a, "offsets"_a,
        "query_norm"_a.none(), "key_norm"_a.none());
}

}  // namespace leankv
