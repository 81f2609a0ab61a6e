// Softmax of rows of scores, and its gradient. A row belongs to a warp, or to a block where there
// are few of them. With e the scores and g = dcontext . value + dweights:
//   alpha_j = exp(e_j - largest) / total
//   delta = sum alpha g' / sum alpha
//   s = alpha (g' - delta)
// where g' is g after dropout. The division by what is 1 up to rounding makes sum s = 0 hold as
// well as s allows, which gradients that nearly cancel need.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 6;  // at a time on a multiprocessor

// A query of a block: its sequence's span, narrowed to it. The span has no keys if there is none.
struct Row {
  Span span;
  int i;
};

// log2 of the rows of a block.
template <int kGroup>
constexpr int kRowShift = kGroup == kThreads ? 0 : 2;
static_assert(kThreads == kWarp << kRowShift<kWarp>);

template <int kGroup>
__device__ inline Row find_row(const Sequences& sequences) {
  const Tile found = find_query_tile(sequences, kRowShift<kGroup>, blockIdx.x);
  Row row{span_of(sequences, found.sequence), 0};
  const int64_t i = found.first + threadIdx.x / kGroup;
  row.i = static_cast<int>(smaller<int64_t>(i, row.span.query_count));
  return row;
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks) softmax_kernel(const SoftmaxCall call) {
  __shared__ float room[kGroup / kWarp];
  const Problem& problem = call.problem;
  const Row row = find_row<kGroup>(problem.sequences);
  const Span& span = row.span;
  if (row.i >= span.query_count) {
    return;
  }
  const int lane = threadIdx.x % kGroup;
  for (int64_t head = blockIdx.y; head < problem.heads; head += gridDim.y) {
    const auto at = [&](int64_t j) -> float& {
      return call.scores.data[score_offset(call.scores, span, head, row.i, j)];
    };
    float largest = -INFINITY;
#pragma unroll 2
    for (int64_t j = lane; j < span.key_count; j += kGroup) {
      largest = Maximum::of(largest, at(j));
    }
    largest = reduce<Maximum, kGroup>(largest, room);
    const float shift = softmax_shift(largest);
    float total = 0;
#pragma unroll 2
    for (int64_t j = lane; j < span.key_count; j += kGroup) {
      total += expf(at(j) - shift);
    }
    total = reduce<Sum, kGroup>(total, room);
    const float scale = 1 / total;
#pragma unroll 2
    for (int64_t j = lane; j < span.key_count; j += kGroup) {
      const float alpha =
          expf(at(j) - shift) * scale * dropout_factor(problem.dropout, span, head, row.i, j);
      at(j) = alpha;
      if (call.weights.rows.data != nullptr) {
        store(call.weights.rows, weight_offset(call.weights, span, head, row.i, j), alpha);
      }
    }
    if (lane == 0) {
      const int64_t offset = query_offset(call.stats, span, head, row.i);
      const bool empty = span.key_count == 0;
      store(call.stats, offset, empty ? 0.0f : largest);
      store(call.stats, offset + 1, empty ? 0.0f : total);
    }
  }
}

// A row of the gradient.
struct GradientRow {
  const SoftmaxGradientCall& call;
  const Span& span;
  int64_t head;
  int i;
  float shift;
  float scale;

  __device__ float& alpha(int64_t j) const {
    return call.scores.data[score_offset(call.scores, span, head, i, j)];
  }
  __device__ float& dalpha(int64_t j) const {
    return call.dalpha.data[score_offset(call.dalpha, span, head, i, j)];
  }
  __device__ float dweight(int64_t j) const {
    return load(call.dweights.rows, weight_offset(call.dweights, span, head, i, j));
  }
  __device__ float factor(int64_t j) const {
    return dropout_factor(call.problem.dropout, span, head, i, j);
  }
};

// alpha of every key, g' in place of g, and delta.
template <int kGroup>
__device__ inline float row_delta(const GradientRow& row, float (&room)[kGroup / kWarp]) {
  const SoftmaxGradientCall& call = row.call;
  float weighted = 0;
  float total = 0;
#pragma unroll 2
  for (int64_t j = threadIdx.x % kGroup; j < row.span.key_count; j += kGroup) {
    const float alpha = expf(row.alpha(j) - row.shift) * row.scale;
    float dalpha = call.has_dalpha ? row.dalpha(j) : 0.0f;
    if (call.dweights.rows.data != nullptr) {
      dalpha += row.dweight(j);
    }
    const float factor = row.factor(j);
    dalpha = factor > 0 ? dalpha * factor : 0.0f;
    row.alpha(j) = alpha;
    row.dalpha(j) = dalpha;
    weighted += alpha * dalpha;
    total += alpha;
  }
  weighted = reduce<Sum, kGroup>(weighted, room);
  total = reduce<Sum, kGroup>(total, room);
  return weighted / total;
}

// What rounding left of sum s, as a shift of delta: nearly all of s where one weight is nearly 1.
// Less than double precision could tell from 0 is left as it is.
template <int kGroup>
__device__ inline float row_rest(const GradientRow& row, float delta,
                                 float (&room)[kGroup / kWarp]) {
  float weighted = 0;
  float total = 0;
#pragma unroll 2
  for (int64_t j = threadIdx.x % kGroup; j < row.span.key_count; j += kGroup) {
    weighted += row.alpha(j) * (row.dalpha(j) - delta);
    total += row.alpha(j);
  }
  weighted = reduce<Sum, kGroup>(weighted, room);
  total = reduce<Sum, kGroup>(total, room);
  const float rest = weighted / total;
  const float visible = 0x1p-50f * fabsf(delta);
  return isfinite(rest) && fabsf(rest) > visible ? rest : 0.0f;
}

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks)
    softmax_gradient_kernel(const SoftmaxGradientCall call) {
  __shared__ float room[kGroup / kWarp];
  const Row found = find_row<kGroup>(call.problem.sequences);
  const Span& span = found.span;
  if (found.i >= span.query_count || span.key_count == 0) {
    return;
  }
  for (int64_t head = blockIdx.y; head < call.problem.heads; head += gridDim.y) {
    if (call.problem.raw_scores) {
      const GradientRow row{call, span, head, found.i, 0, 0};
      for (int64_t j = threadIdx.x % kGroup; j < span.key_count; j += kGroup) {
        row.dalpha(j) = row.dweight(j);
      }
      continue;
    }
    const int64_t stats = query_offset(call.stats, span, head, found.i);
    const GradientRow row{call,
                          span,
                          head,
                          found.i,
                          softmax_shift(load(call.stats, stats)),
                          1 / load(call.stats, stats + 1)};
    const float delta = row_delta<kGroup>(row, room);
    const float rest = row_rest<kGroup>(row, delta, room);
#pragma unroll 2
    for (int64_t j = threadIdx.x % kGroup; j < span.key_count; j += kGroup) {
      const float alpha = row.alpha(j);
      row.dalpha(j) = alpha * ((row.dalpha(j) - delta) - rest);
      row.alpha(j) = alpha * row.factor(j);
    }
  }
}

template <int kGroup, class Call>
void launch_rows(const char* name, void (*kernel)(Call), const Call& call, cudaStream_t stream) {
  const Sequences& sequences = call.problem.sequences;
  const int64_t tiles =
      tile_bound(sequences.last_row - sequences.first_row, sequences.count, kRowShift<kGroup>);
  launch(name, kernel, tiles, call.problem.heads, 1, kThreads, call, stream);
}

}  // namespace

void launch_softmax(const SoftmaxCall& call, cudaStream_t stream) {
  launch_rows<kWarp>("softmax", softmax_kernel<kWarp>, call, stream);
}

void launch_softmax_gradient(const SoftmaxGradientCall& call, cudaStream_t stream) {
  if (call.few_rows) {
    launch_rows<kThreads>("softmax gradient", softmax_gradient_kernel<kThreads>, call, stream);
  } else {
    launch_rows<kWarp>("softmax gradient", softmax_gradient_kernel<kWarp>, call, stream);
  }
}

}  // namespace cuda
}  // namespace attn_ext
