// Gradients from partial sums that blocks of the gradient kernels left, in a fixed order.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostShares = kThreads / kWarp;

// dquery of one query from its partial sums, in the order of the keys.
__global__ void __launch_bounds__(kThreads) merge_dquery_kernel(const BackwardCall call) {
  const Rows& sums = call.dquery_sums;
  __shared__ Place place;
  find_place(call.sequences, false, 0, place);
  const Span& span = place.span;
  if (place.count == 0 || span.key_count == 0) {
    return;
  }
  for (int64_t head = blockIdx.y; head < call.heads; head += gridDim.y) {
    for (int64_t col = threadIdx.x; col < call.dim; col += kThreads) {
      float sum = 0;
      for (int64_t split = 0; (split << call.key_shift) < span.key_count; ++split) {
        sum += load(sums, split * sums.batch + (span.flat_row + place.first) * sums.row +
                              head * sums.head + col);
      }
      const float weight = load(call.score_weight, head * call.score_weight.head + col);
      store(call.dquery, query_offset(call.dquery, span, head, place.first) + col,
            -4 * weight * sum);
    }
  }
}

// A block sums 32 features' partial sums in double: a feature a lane, and each warp an interleaved
// share of the blocks that left them. The shares are then added in the warps' order.
__global__ void __launch_bounds__(kThreads) merge_dweight_kernel(const BackwardCall call) {
  __shared__ double shares[kMostShares][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int share = threadIdx.x / kWarp;
  const int64_t count = smaller<int64_t>(call.partial_rows, kMostShares);
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t columns = call.heads * call.branches * call.dim;
  double sum = 0;
  if (column < columns) {
    for (int64_t row = share; row < call.partial_rows; row += count) {
      sum += static_cast<double>(call.partial_dweight[row * columns + column]);
    }
  }
  shares[share][lane] = sum;
  __syncthreads();
  if (share == 0 && column < columns) {
    for (int n = 1; n < count; ++n) {
      sum += shares[n][lane];
    }
    const int64_t weight = column / call.dim;
    store(call.dscore_weight, weight * call.dscore_weight.head + column % call.dim,
          static_cast<float>(sum));
  }
}

}  // namespace

void launch_merge_dquery(const BackwardCall& call, cudaStream_t stream) {
  launch("gradient of queries", merge_dquery_kernel, tile_count(call.sequences, false, 0),
         call.heads, 1, kThreads, call, stream);
}

void launch_merge_dweight(const BackwardCall& call, cudaStream_t stream) {
  const int64_t columns = call.heads * call.branches * call.dim;
  const int64_t shares = std::clamp<int64_t>(call.partial_rows, 1, kMostShares);
  launch("gradient of score weights", merge_dweight_kernel, (columns + kWarp - 1) / kWarp, 1, 1,
         static_cast<int>(shares) * kWarp, call, stream);
}

}  // namespace attn_ext::cuda
