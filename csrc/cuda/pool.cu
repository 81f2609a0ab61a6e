// Keys that are scored without a query. Their hidden rows h = tanh(k), or with a gate tanh(k)
// sigmoid(g), meet rows w_i of score weights, the branches, which stand for queries:
//   score_ij = w_i . h_j, and from s = alpha (dalpha - delta)
//   dh_j = sum_i s_ij w_i,  dkey = dh sigmoid(g) (1 - tanh(k)^2),
//   dgate = dh tanh(k) sigmoid(g) (1 - sigmoid(g)),  dscore_weight_i = sum_j s_ij h_j.
// Bound by memory: a warp takes 256 features of some keys at a time, 16 bytes a load. Hidden rows
// are computed anew in backward; what adds up over keys is added in a fixed order.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFeatures = kWarp * kGranule;  // a warp's at a time
constexpr int kKeys = 2;                     // a warp's at a time, where scores are computed
constexpr int kBranches = 4;                 // whose dscore_weight is summed at a time

// The keys of a sequence and head.
struct Bag {
  const ForwardCall& call;
  const Span& span;
  int64_t head;
};

// Multiplies by 0, or by the scale of what is kept: feature d takes word d % 4 of Philox with the
// counter (key position, d / 4, ~(2 head + factor), sequence), as on every backend.
__device__ inline void drop_features(const Dropout& dropout, int factor, const Bag& bag, int key,
                                     int64_t col, float (&factors)[kGranule]) {
  const auto threshold = static_cast<uint32_t>(ceil(dropout.threshold));
  const float scale = static_cast<float>(dropout.keep_scale);
  static_assert(kGranule % 4 == 0);
#pragma unroll
  for (int group = 0; group < kGranule / 4; ++group) {
    uint32_t c[4] = {
        static_cast<uint32_t>(bag.span.position(key)), static_cast<uint32_t>(col / 4 + group),
        ~static_cast<uint32_t>(2 * bag.head + factor), static_cast<uint32_t>(bag.span.number)};
    PhiloxKey round_key = dropout.philox_key();
#pragma unroll 1
    for (int round = 0; round < 10; ++round, round_key = next_key(round_key)) {
      philox_round(c[0], c[1], c[2], c[3], round_key);
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      factors[4 * group + word] *= (c[word] >> 8) >= threshold ? scale : 0.0f;
    }
  }
}

// What dropout multiplies a granule of the hidden row by.
__device__ __forceinline__ void feature_factors(const Bag& bag, int key, int64_t col,
                                                float (&factors)[kGranule]) {
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    factors[f] = 1;
  }
#pragma unroll
  for (int factor = 0; factor < 2; ++factor) {
    const Dropout& dropout = bag.call.feature_dropout[factor];
    if (dropout.active) {
      drop_features(dropout, factor, bag, key, col, factors);
    }
  }
}

__device__ __forceinline__ void load_branch(const Bag& bag, int64_t branch, int64_t col,
                                            float (&weights)[kGranule]) {
  const ForwardCall& call = bag.call;
  load_granule(call.query, query_offset(call.query, bag.span, bag.head, branch), col, call.dim,
               weights);
}

// Adds the products of the features from `col` on to the scores of the keys from `key` on.
__device__ inline void add_products(const Bag& bag, const Scores& out, int key, int end,
                                    int64_t col, bool first,
                                    const float (&hidden)[kKeys][kGranule]) {
  const int lane = threadIdx.x % kWarp;
  const bool writes = lane < kKeys && key + lane < end;
  float* target = nullptr;
  if (writes) {
    target = &score_row(out, bag.span, bag.head, 0)[key + lane];
  }
  for (int branch = 0; branch < bag.span.query_count; ++branch) {
    float weights[kGranule];
    load_branch(bag, branch, col, weights);
    float own = 0;  // lane n gets the sum of key n
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      float sum = 0;
#pragma unroll
      for (int f = 0; f < kGranule; ++f) {
        sum = fmaf(weights[f], hidden[n][f], sum);
      }
      sum = reduce_warp<Sum>(sum);
      own = lane == n ? sum : own;
    }
    if (writes) {
      float& score = target[branch * out.rows.row];
      score = first ? own : score + own;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) pool_scores_kernel(const ForwardCall call) {
  __shared__ Place place;
  find_place(call.sequences, true, kPoolShift, place);
  const Span& span = place.span;
  const int end = smaller(span.key_count, place.first + (1 << kPoolShift));
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int64_t head = blockIdx.y; head < call.heads; head += gridDim.y) {
    const Bag bag{call, span, head};
#pragma unroll 1
    for (int key = place.first + warp * kKeys; key < end; key += kWarps * kKeys) {
      int64_t keys[kKeys];
      int64_t gates[kKeys];
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {  // those past the end are repeated
        keys[n] = key_offset(call.key, span, head, smaller(key + n, end - 1));
        gates[n] = key_offset(call.gate, span, head, smaller(key + n, end - 1));
      }
      // Of no features there are scores, too: 0.
      for (int64_t begin = 0; begin == 0 || begin < call.dim; begin += kFeatures) {
        const int64_t col = begin + lane * kGranule;
        float hidden[kKeys][kGranule];
        load_granules(call.key, keys, col, call.dim, hidden);
        float gate[kKeys][kGranule];
        if (call.gate.data != nullptr) {
          load_granules(call.gate, gates, col, call.dim, gate);
        }
#pragma unroll
        for (int n = 0; n < kKeys; ++n) {
          float factors[kGranule];
          feature_factors(bag, smaller(key + n, end - 1), col, factors);
#pragma unroll
          for (int f = 0; f < kGranule; ++f) {
            float value = exact_tanh(hidden[n][f]).tanh;
            if (call.gate.data != nullptr) {
              value *= exact_sigmoid(gate[n][f]).sigmoid;
            }
            hidden[n][f] = value * factors[f];
          }
        }
        add_products(bag, call.scores, key, end, col, begin == 0, hidden);
      }
    }
  }
}

// A granule of a hidden row, and its derivatives in key and gate.
struct HiddenGranule {
  float hidden[kGranule];
  float dkey[kGranule];
  float dgate[kGranule];
};

__device__ __forceinline__ void load_hidden(const Bag& bag, int key, int64_t col,
                                            HiddenGranule& granule) {
  const ForwardCall& call = bag.call;
  const bool gated = call.gate.data != nullptr;
  load_granule(call.key, key_offset(call.key, bag.span, bag.head, key), col, call.dim,
               granule.dkey);
  if (gated) {
    load_granule(call.gate, key_offset(call.gate, bag.span, bag.head, key), col, call.dim,
                 granule.dgate);
  }
  float factors[kGranule];
  feature_factors(bag, key, col, factors);
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    const TanhSlope parts = exact_tanh(granule.dkey[f]);
    const SigmoidSlope gate = gated ? exact_sigmoid(granule.dgate[f]) : SigmoidSlope{1, 0};
    const float slope = 4 * parts.slope;
    granule.hidden[f] = parts.tanh * gate.sigmoid * factors[f];
    granule.dkey[f] =
        slope < static_cast<float>(kVanishingSlope) ? 0.0f : slope * gate.sigmoid * factors[f];
    granule.dgate[f] = parts.tanh * gate.slope * factors[f];
  }
}

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
  HiddenGranule granule;
  load_hidden(bag, key, col, granule);
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
    load_branch(bag, n, col, weights);
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
  const int end = smaller(span.key_count, place.first + (1 << kPoolShift));
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int64_t head = blockIdx.z; head < call.heads; head += gridDim.z) {
    const Bag bag{call, span, head};
    for (int64_t begin = int64_t{blockIdx.y} * kFeatures; begin < call.dim;
         begin += int64_t{gridDim.y} * kFeatures) {
      for (int branch = 0; branch < span.query_count; branch += kBranches) {
        float dweights[kBranches][kGranule] = {};
#pragma unroll 1
        for (int key = place.first + warp; key < end; key += kWarps) {
          add_key(call, bag, key, begin + lane * kGranule, branch, dweights);
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

void launch_pool_scores(const ForwardCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  launch("scores of keys", pool_scores_kernel, tile_count(sequences, true, kPoolShift), call.heads,
         1, kThreads, call, stream);
}

void launch_pool_gradient(const BackwardCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  launch("gradients of keys", pool_gradient_kernel, tile_count(sequences, true, kPoolShift),
         (call.dim + kFeatures - 1) / kFeatures, call.heads, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
