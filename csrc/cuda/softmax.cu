// The gradient of the softmax of rows of scores. A row belongs to some lanes of a warp, or to a
// block where there are few of them. With e the scores and g = dcontext . value + dweights:
//   alpha_j = exp(e_j - largest) / total
//   delta = sum alpha g' / sum alpha
//   s = alpha (g' - delta)
// where g' is g after dropout. The division by what is 1 up to rounding makes sum s = 0 hold as
// well as s allows, which gradients that nearly cancel need.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 6;    // at a time on a multiprocessor
constexpr int kRowLanes = 8;  // that a row belongs to, unless rows are few

// log2 of the rows of a block.
template <int kGroup>
constexpr int kRowShift = kGroup == kThreads ? 0 : 4;
static_assert(kThreads == kRowLanes << kRowShift<kRowLanes>);

// A row of the gradient.
struct GradientRow {
  const BackwardCall& call;
  const Span& span;
  int64_t head;
  int i;
  int keys;
  float base;
  float scale;
  ScoreRow scores = score_row(call.scores, span, head, i);
  ScoreRow alpha = score_row(call.alpha, span, head, i);
  ScoreRow dalpha = score_row(call.dscores, span, head, i);

  __device__ float dweight(int64_t j) const {
    return load(call.dweights.rows, score_offsets(call.dweights, span, head, i)[j]);
  }
  __device__ float factor(int64_t j) const {
    return dropout_factor(call.dropout, span, head, i, j);
  }
};

// sum alpha value / sum alpha over the keys, of terms alpha and value.
template <int kGroup, class Terms>
__device__ __forceinline__ float mean(int keys, float (&room)[kRoom<kGroup>], const Terms& terms) {
  float weighted = 0;
  float total = 0;
#pragma unroll 2
  for (int j = threadIdx.x % kGroup; j < keys; j += kGroup) {
    const float2 term = terms(j);
    weighted += term.x * term.y;
    total += term.x;
  }
  weighted = reduce<Sum, kGroup>(weighted, room);
  total = reduce<Sum, kGroup>(total, room);
  return weighted / total;
}

// alpha of every key, g' in place of g, and delta.
template <int kGroup>
__device__ inline float row_delta(const GradientRow& row, float (&room)[kRoom<kGroup>]) {
  const BackwardCall& call = row.call;
  return mean<kGroup>(row.keys, room, [&](int j) {
    const float alpha = expf(row.scores[j] - row.base) * row.scale;
    float dalpha = call.has_dalpha ? row.dalpha[j] : 0.0f;
    if (call.dweights.rows.data != nullptr) {
      dalpha += row.dweight(j);
    }
    const float factor = row.factor(j);
    dalpha = factor > 0 ? dalpha * factor : 0.0f;
    row.alpha[j] = alpha;
    row.dalpha[j] = dalpha;
    return make_float2(alpha, dalpha);
  });
}

// The sum of s over a row is 0. Where one weight is nearly 1 all of s is small differences, and
// their roundings would add up: what the sum is instead, over sum alpha, is taken from delta too,
// unless delta is so much larger that not even double precision would show it.
template <int kGroup>
__device__ inline float row_rest(const GradientRow& row, float delta,
                                 float (&room)[kRoom<kGroup>]) {
  const float rest = mean<kGroup>(
      row.keys, room, [&](int j) { return make_float2(row.alpha[j], row.dalpha[j] - delta); });
  const float visible = 0x1p-50f * fabsf(delta);
  return isfinite(rest) && fabsf(rest) > visible ? rest : 0.0f;
}

template <int kGroup>
__device__ inline void run_row(const BackwardCall& call, const Span& span, int64_t head, int i,
                               int keys, float (&room)[kRoom<kGroup>]) {
  const int lane = threadIdx.x % kGroup;
  if (call.raw_scores) {
    const GradientRow row{call, span, head, i, keys, 0, 0};
    for (int j = lane; j < keys; j += kGroup) {
      row.dalpha[j] = row.dweight(j);
    }
    return;
  }
  const int64_t stats = query_offset(call.stats, span, head, i);
  const GradientRow row{call,
                        span,
                        head,
                        i,
                        keys,
                        softmax_base(load(call.stats, stats)),
                        1 / load(call.stats, stats + 1)};
  const float delta = row_delta<kGroup>(row, room);
  const float rest = row_rest<kGroup>(row, delta, room);
#pragma unroll 2
  for (int j = lane; j < keys; j += kGroup) {
    const float alpha = row.alpha[j];
    row.dalpha[j] = alpha * ((row.dalpha[j] - delta) - rest);
    row.alpha[j] = alpha * row.factor(j);
  }
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks)
    softmax_gradient_kernel(const BackwardCall call) {
  __shared__ float room[kRoom<kGroup>];
  __shared__ Place place;
  find_place(call.sequences, false, kRowShift<kGroup>, place);
  const Span& span = place.span;
  if (place.count == 0 || span.key_count == 0) {
    return;
  }
  // Threads without a row go along with those that have one.
  const int i = place.first + threadIdx.x / kGroup;
  const int keys = i < span.query_count ? span.key_count : 0;
  for (int64_t head = blockIdx.y; head < call.heads; head += gridDim.y) {
    run_row<kGroup>(call, span, head, smaller(i, span.query_count - 1), keys, room);
  }
}

}  // namespace

void launch_softmax_gradient(const BackwardCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  const int shift = call.few_queries ? kRowShift<kThreads> : kRowShift<kRowLanes>;
  launch("softmax gradient",
         call.few_queries ? softmax_gradient_kernel<kThreads> : softmax_gradient_kernel<kRowLanes>,
         tile_count(sequences, false, shift), call.heads, 1, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
