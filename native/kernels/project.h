// Products with quantized weights: codes are masked where they lie in their word, converted and
// multiplied, and what that makes them too large is taken off their sums once for a group.
//
// Included once by a translation unit of each instruction set, behind its simd_*.h.
#pragma once

#include "tile.h"
#include "rows.h"
#include "prefill.h"

namespace leankv::LEANKV_ISA {

// Rows that share one conversion of a code.
constexpr int kTogetherRows = kRowChunk < 4 ? kRowChunk : 4;

template <int B>
constexpr int kFields = 32 / B;

// The fields above these are taken from the word moved down: products stay small, and no code
// reaches the sign.
template <int B>
constexpr int kLowFields = (kFields<B> + 1) / 2;

template <int B>
LEANKV_INLINE constexpr int place_of(int field) {
  return B * (field % kLowFields<B>);
}

// Code `F` times 2^place_of(F) of each lane.
template <int B, int F>
LEANKV_INLINE vf field_of(vu words) {
  constexpr uint32_t mask = ((1u << B) - 1) << place_of<B>(F);
  if constexpr (F >= kLowFields<B>) words >>= B * kLowFields<B>;
  return __builtin_convertvector((vi)(words & mask), vf);
}

// The channels of a group that take part.
struct GroupOf {
  const uint32_t* codes;  // of the tile
  const int32_t* ids;
  const float* values;  // [n, rows], from the first row in question on
  int n, rows;
  const float* sums;  // [n / 32 of the group, rows], likewise
  int stretches;
  const char *scales, *zeros;
  Type type;
};

// Scales of W outputs from `at` on; those of a field come back to the size of its codes.
template <Type T, int B, int F>
LEANKV_INLINE vf scale_of(const char* scales, int at) {
  return read_vector<T>(scales, at) * (1.0f / (1 << place_of<B>(F)));
}

// out [R, P] += R rows by fields [First, First + N) of the lanes from `lane` on.
template <int B, int R, int First, int N>
LEANKV_INLINE void add_fields(const GroupOf& g, int lane, float* out) {
  vf sums[N][R] = {};
  const float* value = g.values;
  for (int i = 0; i < g.n; ++i, value += g.rows) {
    const vu words = load<vu>(g.codes + int64_t{g.ids[i]} * kLanes + lane);
    // To L2: there is more room for what is on its way there.
    if (First == 0 && lane == 0) {
      __builtin_prefetch(g.codes + int64_t{g.ids[i + kAhead]} * kLanes, 0, 2);
    }
    vf x[R];
    unroll<R>([&](auto r) LEANKV_LAMBDA { x[r] = splat(value[r]); });
    unroll<N>([&](auto j) LEANKV_LAMBDA {
      const vf code = field_of<B, First + j>(words);
      unroll<R>([&](auto r) LEANKV_LAMBDA { add_product(sums[j][r], code, x[r]); });
    });
  }
  with_type(g.type, [&](auto tag) LEANKV_LAMBDA {
    constexpr Type T = decltype(tag)::value;
    float all[R];
    unroll<R>([&](auto r) LEANKV_LAMBDA {
      all[r] = g.sums[r];
      for (int s = 1; s < g.stretches; ++s) all[r] += g.sums[s * g.rows + r];
    });
    unroll<N>([&](auto j) LEANKV_LAMBDA {
      const int at = (First + j) * kLanes + lane;
      const vf scale = scale_of<T, B, First + j>(g.scales, at);
      const vf zero = read_vector<T>(g.zeros, at);
      unroll<R>([&](auto r) LEANKV_LAMBDA {
        float* to = out + r * kFields<B> * kLanes + at;
        store(to, load(to) + (sums[j][r] * scale + zero * splat(all[r])));
      });
    });
  });
}

template <int B, int R>
inline void add_group(const GroupOf& g, float* out) {
  constexpr int N = kAccumulators / R < kFields<B> ? kAccumulators / R : kFields<B>;
  for (int lane = 0; lane < kLanes; lane += W) {
    unroll<kFields<B> / N>([&](auto turn)
                               LEANKV_LAMBDA { add_fields<B, R, turn * N, N>(g, lane, out); });
    constexpr int rest = kFields<B> % N;
    if constexpr (rest > 0) add_fields<B, R, kFields<B> - rest, rest>(g, lane, out);
  }
}

template <int B>
inline void multiply_tile(const Weight& w, const Channels& c, int tile, int first, int last,
                          float* out) {
  std::memset(out, 0, sizeof(float) * c.rows * kFields<B> * kLanes);
  for (int k = first; k < last; k += w.group) {
    const int stretch = k / kStretch, stretches = w.group / kStretch;
    const int from = c.starts[stretch], n = c.starts[stretch + stretches] - from;
    if (n == 0) continue;
    for (int row = 0; row < c.rows; row += kTogetherRows) {
      const GroupOf group{.codes = w.tile_codes(tile),
                          .ids = c.ids + from,
                          .values = c.values + int64_t{from} * c.rows + row,
                          .n = n,
                          .rows = c.rows,
                          .sums = c.sums + stretch * c.rows + row,
                          .stretches = stretches,
                          .scales = w.side(w.scales, tile, k / w.group),
                          .zeros = w.side(w.zeros, tile, k / w.group),
                          .type = w.type};
      float* to = out + row * kFields<B> * kLanes;
      switch (c.rows - row) {
        case 1: add_group<B, 1>(group, to); break;
#ifndef LEANKV_SANITIZED
        case 2: add_group<B, 2>(group, to); break;
        case 3: add_group<B, 3>(group, to); break;
#endif
        default: add_group<B, kTogetherRows>(group, to);
      }
    }
  }
}

// f(Index<bits>).
template <class F>
LEANKV_INLINE void with_bits(int bits, F&& f) {
  switch (bits) {
    case 2: return f(Index<2>{});
    case 3: return f(Index<3>{});
    case 4: return f(Index<4>{});
    case 5: return f(Index<5>{});
    case 6: return f(Index<6>{});
    default: return f(Index<8>{});
  }
}

// See Kernels::multiply.
void multiply(const Weight& w, const Channels& c, int tile, int first, int last, float* out) {
  with_bits(w.bits, [&](auto bits) { multiply_tile<bits>(w, c, tile, first, last, out); });
}

// See Kernels::unpack.
void unpack(const Weight& w, int tile, int first, int n, float* panels) {
  with_bits(w.bits, [&](auto bits) {
    constexpr int B = bits, P = kFields<B> * kLanes;
    with_type(w.type, [&](auto tag) {
      constexpr Type T = decltype(tag)::value;
      for (int k = first; k < first + n; k += w.group) {
        const char* scales = w.side(w.scales, tile, k / w.group);
        const char* zeros = w.side(w.zeros, tile, k / w.group);
        const uint32_t* words = w.tile_codes(tile) + int64_t{k} * kLanes;
        unroll<kFields<B>>([&](auto f) LEANKV_LAMBDA {
          for (int lane = 0; lane < kLanes; lane += W) {
            const int column = f * kLanes + lane, panel = column / kRowLanes;
            const vf scale = scale_of<T, B, f>(scales, column);
            const vf zero = read_vector<T>(zeros, column);
            float* to = panels + (int64_t{panel} * n + k - first) * kRowLanes + column % kRowLanes;
            for (int i = 0; i < w.group; ++i, to += kRowLanes) {
              store(to, field_of<B, f>(load<vu>(words + i * kLanes + lane)) * scale + zero);
            }
          }
        });
      }
    });
    for (int column = P; column % kRowLanes; column += W) {  // outputs that the tile does not have
      float* to = panels + int64_t{column / kRowLanes} * n * kRowLanes + column % kRowLanes;
      for (int i = 0; i < n; ++i, to += kRowLanes) store(to, vf{});
    }
  });
}

// See Kernels::multiply_block.
void multiply_block(const float* rows, const float* panel, int n, bool add, float* out) {
  if (add) {
    outer_products<kColumns, 1>(rows, panel, n, out, [&](int j, int v) LEANKV_LAMBDA {
      return load(out + j * kRowLanes + v * W);
    });
  } else {
    outer_products<kColumns, 1>(rows, panel, n, out, [](int, int) LEANKV_LAMBDA { return vf{}; });
  }
}

// See Kernels::norm.
void norm(float* row, const float* weight, float eps, int dim) {
  vf squares[4] = {};
  for (int i = 0; i < dim; i += kStretch) {
    for (int j = 0; j < kStretch; j += W) {
      const vf x = load(row + i + j);
      squares[j / W % 4] += x * x;
    }
  }
  const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / dim;
  const float factor = 1.0f / __builtin_sqrtf(mean + eps);
  for (int i = 0; i < dim; i += W) store(row + i, load(row + i) * factor * load(weight + i));
}

LEANKV_INLINE vf sigmoid(vf x) {
  const vf small = exp2_negative((x > 0.0f ? -x : x) * kLog2E), whole = 1.0f / (1.0f + small);
  return x > 0.0f ? whole : small * whole;
}

// The normal distribution's share below x, to 1e-7: Abramowitz and Stegun, 7.1.26.
LEANKV_INLINE vf normal_share(vf x) {
  const vf size = (x > 0.0f ? x : -x) * 0.70710678f;
  const vf t = 1.0f / (size * 0.3275911f + 1.0f);
  vf p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf tail = p * t * exp2_negative(size * size * -kLog2E) * 0.5f;
  return x > 0.0f ? 1.0f - tail : tail;
}

LEANKV_INLINE vf gated(Gate gate, vf x) {
  switch (gate) {
    case Gate::none: return x;
    case Gate::silu: return x * sigmoid(x);
    case Gate::gelu: return x * normal_share(x);
    case Gate::gelu_approx: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  }
  __builtin_unreachable();
}

// See Kernels::finish.
void finish(const Finish& f, const Products& p) {
  with_type(f.out.type, [&](auto out_tag) {
    with_type(f.residual.data ? f.residual.type : f.out.type, [&](auto residual_tag) {
      constexpr Type Out = decltype(out_tag)::value;
      for (int r = 0; r < p.rows; ++r) {
        const float* from = p.from + r * p.row_stride;
        for (int i = 0; i < p.columns; i += W) {
          const int at = p.column + i, n = p.columns - i < W ? p.columns - i : W;
          vf x = load(from + i);
          for (int part = 1; part < p.parts; ++part) x += load(from + part * p.part_stride + i);
          const auto given = [&](const void* row, auto type, int64_t index) LEANKV_LAMBDA {
            return read_some<decltype(type)::value>(static_cast<const char*>(row), index, n);
          };
          if (f.bias) x += given(f.bias, TypeTag<Type::f32>{}, at);
          x = gated(f.gate, x);
          if (f.factors.data) x *= given(f.factors.row(0, p.row + r), TypeTag<Type::f32>{}, at);
          if (f.residual.data) x += given(f.residual.row(0, p.row + r), residual_tag, at);
          write_some<Out>(f.out.row(0, p.row + r), at, n, x);
        }
      }
    });
  });
}

}  // namespace leankv::LEANKV_ISA
