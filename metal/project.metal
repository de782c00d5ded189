// A few rows by quantized weights (leankv_mlx/projections): x [rows, K] -> [rows, N] of each, and
// what stands around that in a layer: a norm of the inputs, biases, a gate, a residual.
//
// The layout is that of projections/weight.py: codes [T][K][16] words with F = 32 / B codes each,
// scales and zeros [T][K / GROUP][16 F], output f * 16 + l of a tile in field f of word l. A weight
// is code * scale + zero. Only lkv_code, lkv_first_words, lkv_load_words, lkv_side and lkv_place
// know it.
//
// A threadgroup of NSG SIMD groups makes one strip: L of a tile's 16 words, so L * F outputs, for R
// rows. Its SIMD groups take groups of channels in turn and add up at the end, so threadgroups
// share nothing. A SIMD group reads 32 channels at a time:
//   inputs: lane = channel. With KEEP the channels that a row keeps come first in a list, and the
//           codes of the others are not read. Every threadgroup finds that out for itself.
//   codes:  L / V lanes = a channel of the list; a lane has V words side by side, V * F outputs.
// A code counts as the float 0.5 + code / 2^(B + 1): its bits behind the exponent of 0.5. The sum
// of the inputs, which the zeros need anyway, takes the 0.5 back at the end of a group.

#define LKV_ALL 0
#define LKV_BY_SIZE 1
#define LKV_BY_NORM 2
#define LKV_SILU 1
#define LKV_GELU_TANH 2
#define LKV_WORDS 16

// Threadgroup memory, declared in the body of the kernel. An element is an output of a row.
struct lkv_project_shared {
  TG_PTR(float) inputs;   // [NSG][32][R]: of the list, at lkv_list_place
  TG_PTR(int) channels;   // [NSG][32]: the list, with KEEP
  TG_PTR(float) outs;     // [NSG][R * F * L]
  TG_PTR(float) squares;  // [NSG][R], with NORM
  TG_PTR(float) kept;     // [NSG], with KEEP
};

template <class S, class P>
struct lkv_weight {
  const DEV uint* codes;
  const DEV S* scales;
  const DEV S* zeros;
  int outputs;
  bool biased;
  const DEV P* bias;
};

template <class S, class P>
DEVFN lkv_weight<S, P> lkv_weight_of(const DEV uint* codes, const DEV S* scales,
                                     const DEV S* zeros, int outputs, bool biased,
                                     const DEV P* bias) {
  lkv_weight<S, P> weight;
  weight.codes = codes;
  weight.scales = scales;
  weight.zeros = zeros;
  weight.outputs = outputs;
  weight.biased = biased;
  weight.bias = bias;
  return weight;
}

// R rows of inputs from `row` on, what they are multiplied by, and what they have to pass.
template <class T, class W, int R>
struct lkv_inputs {
  const DEV T* x;  // [rows, channels]
  int rows, row, channels;
  const DEV W* norm;         // [channels], with NORM
  float inverse[R];          // 1 / the root mean square of a row, with NORM
  const DEV float* columns;  // [channels], with LKV_BY_NORM
  float threshold;           // with KEEP
};

template <int R, class T, class W>
DEVFN lkv_inputs<T, W, R> lkv_inputs_of(const DEV T* x, int rows, int row, int channels,
                                        const DEV W* norm, const DEV float* columns,
                                        float threshold) {
  lkv_inputs<T, W, R> given;
  given.x = x;
  given.rows = rows;
  given.row = row;
  given.channels = channels;
  given.norm = norm;
  given.columns = columns;
  given.threshold = threshold;
  UNROLL for (int r = 0; r < R; r++) given.inverse[r] = 1.0f;
  return given;
}

// Code f of a word as 0.5 + code / 2^(B + 1). QUADS: four codes share a mask, and one instruction
// puts a byte of them into the float (NVIDIA).
template <int B, bool QUADS>
DEVFN float lkv_code(uint word, int f) {
  constexpr int per_byte = QUADS && (B == 2 || B == 4) ? 8 / B : 1;
  constexpr int top = per_byte > 1 ? 7 : 23;  // the bit that a code has to end below
  const int shift = B * (per_byte > 1 ? f % per_byte : f) - (top - B);
  const uint mask = ((1u << B) - 1u) << (top - B);
  const uint moved = shift < 0 ? word << (shift < 0 ? -shift : 0) : word >> (shift < 0 ? 0 : shift);
  if (per_byte > 1) return lkv_half_magic(moved & (mask * 0x01010101u), f / per_byte);
  return lkv_float_of_bits((moved & mask) | 0x3F000000u);
}

template <int V>
struct lkv_words {
  uint word[V];
};

// The words of channel 0 of a tile from `word` on; those of the next channel follow at LKV_WORDS.
DEVFN const DEV uint* lkv_first_words(const DEV uint* codes, int channels, int tile, int word) {
  return codes + ((size_t)tile * channels * LKV_WORDS + word);
}

template <int V>
DEVFN lkv_words<V> lkv_load_words(const DEV uint* first, int channel) {
  const DEV uint* at = first + (uint)channel * LKV_WORDS;
  lkv_words<V> words;
  if (V == 2) {
    lkv_load_pair(at, words.word[0], words.word[V - 1]);
  } else {
    words.word[0] = at[0];
  }
  return words;
}

// Where the scale of the first code of a word lies: those of the others follow at LKV_WORDS, those
// of the next word at 1.
template <int B, int GROUP>
DEVFN size_t lkv_side(int channels, int tile, int group, int word) {
  return ((size_t)tile * (channels / GROUP) + group) * (LKV_WORDS * (32 / B)) + word;
}

// Strips of a weight.
template <int B, int L>
DEVFN int lkv_strips(int outputs) {
  constexpr int per_tile = LKV_WORDS * (32 / B);
  return (outputs + per_tile - 1) / per_tile * (LKV_WORDS / L);
}

// 1 / the root mean square of every row.
template <int NSG, class T, class W, int R>
DEVFN void lkv_normalize(float eps, uint lane, uint simd_group, TG_PTR(float) squares,
                         THR lkv_inputs<T, W, R>& given) {
  UNROLL for (int r = 0; r < R; r++) {
    const int row = given.row + r < given.rows ? given.row + r : given.row;
    const DEV T* x = given.x + (size_t)row * given.channels;
    float sum = 0.0f;
    UNROLL1 for (int c = (int)(simd_group * 32 + lane); c < given.channels; c += NSG * 32) {
      sum = metal::fma((float)x[c], (float)x[c], sum);
    }
    sum = simd_sum(sum);
    if (lane == 0) squares[(int)simd_group * R + r] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int r = 0; r < R; r++) {
    float sum = 0.0f;
    for (int g = 0; g < NSG; g++) sum += squares[g * R + r];
    given.inverse[r] = 1.0f / metal::sqrt(sum / (float)given.channels + eps);
  }
}

// Entry `at` of a list of 32, where a step takes `at_once`: the entries of a lane lie side by side.
CONSTFN int lkv_list_place(int at, int at_once) {
  return at % at_once * (32 / at_once) + at / at_once;
}

// The list of the 32 channels from `first` on: first those that a row keeps, with their inputs, 0
// for rows that do not keep them. Returns how many; `kept` counts inputs of this lane's channel.
template <bool NORM, int KEEP, int AT_ONCE, class T, class W, int R>
DEVFN int lkv_list(const THR lkv_inputs<T, W, R>& given, int first, uint lane,
                   TG_PTR(float) inputs, TG_PTR(int) list, THR int& kept) {
  const int channel = first + (int)lane;
  float x[R];
  bool needed = false;
  UNROLL for (int r = 0; r < R; r++) {
    const int row = given.row + r;
    x[r] = row < given.rows ? (float)given.x[(size_t)row * given.channels + channel] : 0.0f;
    if (NORM) x[r] *= given.inverse[r] * (float)given.norm[channel];
    if (KEEP == LKV_ALL) continue;
    const float column = KEEP == LKV_BY_NORM ? given.columns[channel] : 1.0f;
    const bool keep = !(metal::fabs(x[r]) * column <= given.threshold);  // NaN takes part
    x[r] = keep ? x[r] : 0.0f;
    kept += keep ? 1 : 0;
    needed = needed || keep;
  }
  int count = 32, at = (int)lane;
  if (KEEP != LKV_ALL) {
    const int before = lkv_rank(needed, lane, count);
    at = needed ? before : count + (int)lane - before;
  }
  const int place = lkv_list_place(at, AT_ONCE);
  if (KEEP != LKV_ALL) list[place] = channel;
  UNROLL for (int r = 0; r < R; r++) inputs[place * R + r] = x[r];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  return count;
}

// Adds the products of the first `count` channels of the list. All words are asked for before the
// first is used.
template <int B, bool QUADS, int L, int V, int KEEP, int R>
DEVFN void lkv_add_list(const DEV uint* codes, int first, int count, uint lane,
                        TG_PTR(const float) inputs, TG_PTR(const int) list,
                        THR float (&products)[R][V * (32 / B)], THR float (&sums)[R]) {
  constexpr int lanes = L / V, at_once = 32 / lanes, F = 32 / B;
  const int mine = (int)lane / lanes;
  lkv_words<V> words[lanes];
  UNROLL for (int i = 0; i < lanes; i++) {
    const int at = i * at_once + mine;
    const int channel = KEEP == LKV_ALL ? first + at : list[lkv_list_place(at, at_once)];
    UNROLL for (int v = 0; v < V; v++) words[i].word[v] = 0u;
    if (at < count) words[i] = lkv_load_words<V>(codes, channel);
  }
  UNROLL for (int i = 0; i < lanes; i++) {
    if (i * at_once >= count) break;
    float x[R];
    UNROLL for (int r = 0; r < R; r++) {
      x[r] = inputs[lkv_list_place(i * at_once + mine, at_once) * R + r];
      sums[r] += x[r];
    }
    UNROLL for (int o = 0; o < V * F; o++) {
      const float code = lkv_code<B, QUADS>(words[i].word[o / F], o % F);
      UNROLL for (int r = 0; r < R; r++) products[r][o] = metal::fma(x[r], code, products[r][o]);
    }
  }
}

// Products of a group become outputs.
template <int B, class S, class P, int R, int O>
DEVFN void lkv_end_group(const THR lkv_weight<S, P>& weight, size_t side,
                         THR float (&products)[R][O], THR float (&sums)[R],
                         THR float (&outs)[R][O]) {
  constexpr int F = 32 / B;
  UNROLL for (int o = 0; o < O; o++) {
    const size_t at = side + o % F * LKV_WORDS + o / F;
    const float scale = (float)weight.scales[at], zero = (float)weight.zeros[at];
    UNROLL for (int r = 0; r < R; r++) {
      const float by_codes =
          metal::fma(products[r][o], (float)(2 << B), sums[r] * -(float)(1 << B));
      outs[r][o] = metal::fma(scale, by_codes, metal::fma(zero, sums[r], outs[r][o]));
      products[r][o] = 0.0f;
    }
  }
  UNROLL for (int r = 0; r < R; r++) sums[r] = 0.0f;
}

// What the SIMD groups have of a strip, added up: thread t gets the elements t, t + 32 NSG, ...
template <int LANES, int NSG, int R, int O, int E>
DEVFN void lkv_add_up(THR float (&outs)[R][O], uint lane, uint simd_group, TG_PTR(float) shared,
                      THR float (&elements)[E]) {
  constexpr int all = R * O * LANES;
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int o = 0; o < O; o++) {
      UNROLL for (int other = LANES; other < 32; other *= 2) {
        outs[r][o] += simd_shuffle_xor(outs[r][o], (ushort)other);
      }
      if ((int)lane < LANES) {
        shared[(int)simd_group * all + (r * O + o) * LANES + (int)lane] = outs[r][o];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int e = 0; e < E; e++) {
    const int element = (int)(simd_group * 32 + lane) + e * NSG * 32;
    elements[e] = 0.0f;
    for (int g = 0; g < NSG && element < all; g++) elements[e] += shared[g * all + element];
  }
  // Another strip may follow.
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Where element e of a thread belongs: its row among the R, and its output.
template <int B, int L, int V, int NSG>
DEVFN void lkv_place(int e, int strip, uint lane, uint simd_group, THR int& row, THR int& output) {
  constexpr int F = 32 / B, lanes = L / V;
  const int element = (int)(simd_group * 32 + lane) + e * NSG * 32;
  const int o = element / lanes % (V * F), tile = strip / (LKV_WORDS / L);
  const int word = strip % (LKV_WORDS / L) * L + element % lanes * V + o / F;
  row = element / (L * F);
  output = (tile * F + o % F) * LKV_WORDS + word;
}

// A strip of one weight. Returns how many inputs of the rows this SIMD group's channels kept.
template <int B, bool QUADS, int GROUP, int L, int V, int NSG, bool NORM, int KEEP, class T,
          class W, class S, class P, int R, int E>
DEVFN float lkv_strip(const THR lkv_inputs<T, W, R>& given, const THR lkv_weight<S, P>& weight,
                      int strip, uint lane, uint simd_group, const THR lkv_project_shared& shared,
                      THR float (&elements)[E]) {
  constexpr int strips = LKV_WORDS / L, lanes = L / V, O = V * (32 / B);
  const int tile = strip / strips, word = strip % strips * L + (int)lane % lanes * V;
  const DEV uint* codes = lkv_first_words(weight.codes, given.channels, tile, word);
  TG_PTR(float) inputs = shared.inputs + (int)simd_group * 32 * R;
  TG_PTR(int) list = shared.channels + (KEEP == LKV_ALL ? 0 : (int)simd_group * 32);
  float products[R][O], outs[R][O], sums[R];
  UNROLL for (int r = 0; r < R; r++) {
    sums[r] = 0.0f;
    UNROLL for (int o = 0; o < O; o++) products[r][o] = outs[r][o] = 0.0f;
  }
  int kept = 0;
  UNROLL1 for (int first = (int)simd_group * GROUP; first < given.channels;) {
    const int count =
        lkv_list<NORM, KEEP, 32 / lanes>(given, first, lane, inputs, list, kept);
    lkv_add_list<B, QUADS, L, V, KEEP>(codes, first, count, lane, inputs, list, products, sums);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    first += 32;
    if (first % GROUP == 0) {
      const size_t side = lkv_side<B, GROUP>(given.channels, tile, first / GROUP - 1, word);
      lkv_end_group<B>(weight, side, products, sums, outs);
      first += (NSG - 1) * GROUP;
    }
  }
  lkv_add_up<lanes, NSG>(outs, lane, simd_group, shared.outs, elements);
  UNROLL for (int e = 0; e < E; e++) {
    int row, output;
    lkv_place<B, L, V, NSG>(e, strip, lane, simd_group, row, output);
    if (weight.biased && output < weight.outputs) elements[e] += (float)weight.bias[output];
  }
  return KEEP == LKV_ALL ? 0.0f : simd_sum((float)kept);
}

// The inputs that all SIMD groups kept, for the first thread.
template <int NSG>
DEVFN int lkv_all_kept(float mine, uint lane, uint simd_group, TG_PTR(float) kept) {
  if (lane == 0) kept[simd_group] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = 0.0f;
  for (int g = 0; g < NSG && simd_group == 0 && lane == 0; g++) all += kept[g];
  return (int)all;
}

// x * sigmoid(x); GELU's approximation by tanh is x * sigmoid of another number.
template <int GATE>
DEVFN float lkv_gate(float x) {
  const float inner = GATE == LKV_SILU ? x : 1.5957691f * metal::fma(0.044715f * x * x, x, x);
  return x / (1.0f + metal::fast::exp2(metal::min(-1.44269504f * inner, 126.0f)));
}

// The elements of a strip that are outputs, with the residual; both [rows, outputs].
template <int B, int L, int V, int R, int NSG, bool RESIDUAL, class T, class D, int E>
DEVFN void lkv_store_strip(const THR float (&elements)[E], int first_row, int rows, int strip,
                           int outputs, const DEV D* residual, uint lane, uint simd_group,
                           DEV T* out) {
  UNROLL for (int e = 0; e < E; e++) {
    int row, output;
    lkv_place<B, L, V, NSG>(e, strip, lane, simd_group, row, output);
    if (row >= R || first_row + row >= rows || output >= outputs) continue;
    const size_t at = (size_t)(first_row + row) * outputs + output;
    out[at] = (T)(elements[e] + (RESIDUAL ? (float)residual[at] : 0.0f));
  }
}

// The weights in a word as numbers; dense [K, N].
template <int B, bool QUADS, int GROUP, class S, class P, class T>
DEVFN void lkv_unpack_word(const THR lkv_weight<S, P>& weight, int channels, int tile, int channel,
                           int word, DEV T* dense) {
  const DEV uint* first = lkv_first_words(weight.codes, channels, tile, word);
  const uint codes = lkv_load_words<1>(first, channel).word[0];
  const size_t side = lkv_side<B, GROUP>(channels, tile, channel / GROUP, word);
  UNROLL for (int f = 0; f < 32 / B; f++) {
    const int output = (tile * (32 / B) + f) * LKV_WORDS + word;
    const float code = (lkv_code<B, QUADS>(codes, f) - 0.5f) * (float)(2 << B);
    const float scale = (float)weight.scales[side + f * LKV_WORDS];
    const float zero = (float)weight.zeros[side + f * LKV_WORDS];
    if (output >= weight.outputs) continue;
    dense[(size_t)channel * weight.outputs + output] = (T)metal::fma(code, scale, zero);
  }
}
