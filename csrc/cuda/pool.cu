// Gradients of keys that are scored without a query. Their hidden rows h (hidden.cuh) meet rows w_i
// of score weights, the branches, which stand for queries: score_ij = w_i . h_j, and from
// s = alpha (dalpha - delta)
//   dh_j = sum_i s_ij w_i,  dkey = dh sigmoid(g) (1 - tanh(k)^2),
//   dgate = dh tanh(k) sigmoid(g) (1 - sigmoid(g)),  dscore_weight_i = sum_j s_ij h_j.
// Bound by memory: a warp takes 256 features of some keys at a time, 16 bytes a load. Hidden rows
// are computed anew; what adds up over keys is added in a fixed order.
#include "hidden.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFeatures = kWarp * kGranule;  // a warp's at a time
constexpr int kBranches = 4;                 // whose dscore_weight is summed at a time

// Stores a granule of a row of dkey or dgate.
__device__ __forceinline__ void write_row(const Bag& bag, const Rows& rows, int key, int64_t col,
                                          const float (&dhidden)[kGranule],
                                          const float (&derivative)[kGranule]) {
  if (rows.data == nullptr) {
    return;
  }
  float values[kGranule];
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    values[f] = dhidden[f] * derivative[f];
  }
  store_granule(rows, key_offset(rows, bag.span, bag.head, key), col, bag.call.dim, values);
}

// A key's share of the sums of the branches from `branch` on, and with the first branches dkey and
// dgate.
__device__ __forceinline__ void add_key(const BackwardCall& call, const Bag& bag, int key,
                                        int64_t col, int branch,
                                        float (&dweights)[kBranches][kGranule]) {
  float keys[kGranule];
  float gates[kGranule];
  load_granule(call.key, key_offset(call.key, bag.span, bag.head, key), col, call.dim, keys);
  if (call.gate.data != nullptr) {
    load_granule(call.gate, key_offset(call.gate, bag.span, bag.head, key), col, call.dim, gates);
  }
  const HiddenGranule granule = hidden_of(bag, key, col, keys, gates);
  const float* s = &score_row(call.dscores, bag.span, bag.head, 0)[key];
#pragma unroll
  for (int n = 0; n < kBranches; ++n) {
    const float own =
        branch + n < bag.span.query_count ? s[(branch + n) * call.dscores.rows.row] : 0;
#pragma unroll
    for (int f = 0; f < kGranule; ++f) {
      dweights[n][f] = fmaf(own, granule.hidden[f], dweights[n][f]);
    }
  }
  if (branch > 0 || (call.dkey.data == nullptr && call.dgate.data == nullptr)) {
    return;
  }
  float dhidden[kGranule] = {};
  for (int n = 0; n < bag.span.query_count; ++n) {
    float weights[kGranule];
    load_granule(call.query, query_offset(call.query, bag.span, bag.head, n), col, call.dim,
                 weights);
    const float own = s[n * call.dscores.rows.row];
#pragma unroll
    for (int f = 0; f < kGranule; ++f) {
      dhidden[f] = fmaf(own, weights[f], dhidden[f]);
    }
  }
  write_row(bag, call.dkey, key, col, dhidden, granule.dkey);
  write_row(bag, call.dgate, key, col, dhidden, granule.dgate);
}

__global__ void __launch_bounds__(kThreads, 4) pool_gradient_kernel(const BackwardCall call) {
  __shared__ float shares[kWarps][kBranches][kFeatures];
  __shared__ Place place;
  find_place(call.sequences, true, kPoolShift, place);
  const Span& span = place.span;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int64_t head = blockIdx.z; head < call.heads; head += gridDim.z) {
    const Bag bag{call, span, head};
    for (int64_t begin = int64_t{blockIdx.y} * kFeatures; begin < call.dim;
         begin += int64_t{gridDim.y} * kFeatures) {
      for (int branch = 0; branch < span.query_count; branch += kBranches) {
        float dweights[kBranches][kGranule] = {};
#pragma unroll 1
        for (int n = warp; n < place.count; n += kWarps) {
          add_key(call, bag, place.first + n, begin + lane * kGranule, branch, dweights);
        }
        if (call.partial_dweight == nullptr) {
          break;  // what remains are sums that nobody wants
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kBranches * kGranule; ++n) {
          shares[warp][n / kGranule][lane * kGranule + n % kGranule] =
              dweights[n / kGranule][n % kGranule];
        }
        __syncthreads();
        for (int n = threadIdx.x; n < kBranches * kFeatures; n += kThreads) {
          const int row = branch + n / kFeatures;
          const int64_t col = begin + n % kFeatures;
          if (row < span.query_count && col < call.dim) {
            float sum = 0;
#pragma unroll
            for (int share = 0; share < kWarps; ++share) {
              sum += shares[share][n / kFeatures][n % kFeatures];
            }
            const int64_t partial =
                (int64_t{blockIdx.x} * call.heads + head) * span.query_count + row;
            call.partial_dweight[partial * call.dim + col] = sum;
          }
        }
      }
    }
  }
}

}  // namespace

void launch_pool_gradient(const BackwardCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  launch("gradients of keys", pool_gradient_kernel, tile_count(sequences, true, kPoolShift),
         (call.dim + kFeatures - 1) / kFeatures, call.heads, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
