// Gradients from partial sums that blocks of the gradient kernel left, in a fixed order.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 256;

// dquery of one query from its partial sums, in the order of the keys.
__global__ void __launch_bounds__(kThreads) merge_dquery_kernel(const GradientCall call) {
  const Problem& problem = call.problem;
  const Rows& sums = call.dquery_sums;
  __shared__ Place place;
  find_place(problem.sequences, false, 0, place);
  const Span& span = place.span;
  if (place.is_empty(false) || span.key_count == 0) {
    return;
  }
  for (int64_t head = blockIdx.y; head < problem.heads; head += gridDim.y) {
    for (int64_t col = threadIdx.x; col < problem.dim; col += kThreads) {
      float sum = 0;
      for (int64_t split = 0; (split << call.key_shift) < span.key_count; ++split) {
        sum += load(sums, split * sums.batch + (span.flat_row + place.first) * sums.row +
                              head * sums.head + col);
      }
      const float weight = load(problem.score_weight, head * problem.score_weight.head + col);
      store(call.dquery, query_offset(call.dquery, span, head, place.first) + col,
            -4 * weight * sum);
    }
  }
}

struct MergeWeightCall {
  const float* partial;
  int64_t tiles;
  int shares;
  int64_t heads;
  int64_t dim;
  Rows dscore_weight;
};

// A block sums 32 features' partial sums in double: a feature a lane, and each warp an interleaved
// share of the tiles. The shares are then added in the warps' order.
__global__ void __launch_bounds__(kThreads) merge_dweight_kernel(const MergeWeightCall call) {
  __shared__ double shares[kThreads / kWarp][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int share = threadIdx.x / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t columns = call.heads * call.dim;
  double sum = 0;
  if (column < columns) {
    for (int64_t tile = share; tile < call.tiles; tile += call.shares) {
      sum += static_cast<double>(call.partial[tile * columns + column]);
    }
  }
  shares[share][lane] = sum;
  __syncthreads();
  if (share == 0 && column < columns) {
    for (int n = 1; n < call.shares; ++n) {
      sum += shares[n][lane];
    }
    const int64_t head = column / call.dim;
    store(call.dscore_weight, head * call.dscore_weight.head + column % call.dim,
          static_cast<float>(sum));
  }
}

}  // namespace

void launch_merge_dquery(const GradientCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.problem.sequences;
  launch("gradient of queries", merge_dquery_kernel, tile_count(sequences, false, 0),
         call.problem.heads, 1, kThreads, call, stream);
}

void launch_merge_dweight(const float* partial, int64_t tiles, int64_t heads, int64_t dim,
                          const Rows& dscore_weight, cudaStream_t stream) {
  const int shares = static_cast<int>(std::clamp<int64_t>(tiles, 1, kThreads / kWarp));
  launch("gradient of score weights", merge_dweight_kernel, (heads * dim + kWarp - 1) / kWarp, 1, 1,
         shares * kWarp, MergeWeightCall{partial, tiles, shares, heads, dim, dscore_weight},
         stream);
}

}  // namespace attn_ext::cuda
