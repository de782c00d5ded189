// The splits of one query row together, and back to the model's space. A split's part is what
// decode_attention.metal leaves: [rows, splits, Dv + 2], the unnormalized output, the largest score
// (base 2), the sum. Bodies of several formats are several parts. One SIMD group has one query row;
// channel c * 32 + lane is out[c] of a lane.

template <int VC>
struct lkv_merged {
  float most, sum;
  float out[VC];
};

template <int VC>
DEVFN void lkv_merge_start(THR lkv_merged<VC>& merged) {
  merged.most = LKV_NEVER;
  merged.sum = 0.0f;
  UNROLL for (int c = 0; c < VC; c++) merged.out[c] = 0.0f;
}

template <int VC>
DEVFN void lkv_merge_rescale(float most, THR lkv_merged<VC>& merged) {
  const float shrink = metal::fast::exp2(merged.most - most);
  merged.most = most;
  merged.sum *= shrink;
  UNROLL for (int c = 0; c < VC; c++) merged.out[c] *= shrink;
}

template <int VC>
DEVFN void lkv_merge_part(const DEV float* part, int splits, int row, uint lane,
                          THR lkv_merged<VC>& merged) {
  const int dim = VC * 32, stride = dim + 2;
  const DEV float* mine = part + (size_t)row * splits * stride;
  float most = merged.most;
  for (int s = (int)lane; s < splits; s += 32) most = metal::max(most, mine[s * stride + dim]);
  lkv_merge_rescale<VC>(simd_max(most), merged);
  float sum = 0.0f;
  for (int s = (int)lane; s < splits; s += 32) {
    const float weight = metal::fast::exp2(mine[s * stride + dim] - merged.most);
    sum = metal::fma(weight, mine[s * stride + dim + 1], sum);
  }
  merged.sum += simd_sum(sum);
  for (int s = 0; s < splits; s++) {
    const float weight = metal::fast::exp2(mine[s * stride + dim] - merged.most);
    UNROLL for (int c = 0; c < VC; c++) {
      merged.out[c] = metal::fma(weight, mine[s * stride + c * 32 + (int)lane], merged.out[c]);
    }
  }
}

// A learned logit: takes part in the sum without a value.
template <int VC>
DEVFN void lkv_merge_logit(float logit, THR lkv_merged<VC>& merged) {
  const float score = logit * 1.44269504f;
  lkv_merge_rescale<VC>(metal::max(merged.most, score), merged);
  merged.sum += metal::fast::exp2(score - merged.most);
}

// out [rows, head_dim] and the natural log-sum-exp [rows].
template <int VC, int BLOCK, class T>
DEVFN void lkv_merge_store(THR lkv_merged<VC>& merged, const DEV float* signs, int head_dim,
                           int row, uint lane, DEV T* out, DEV float* lse) {
  const float inverse = merged.sum > 0.0f ? 1.0f / merged.sum : 0.0f;
  UNROLL for (int c = 0; c < VC; c++) merged.out[c] *= inverse;
  lkv_store_unrotated<VC, BLOCK>(merged.out, signs, head_dim, lane, out + (size_t)row * head_dim);
  if (lane == 0) lse[row] = (merged.most + metal::log2(merged.sum)) * 0.69314718f;
}
