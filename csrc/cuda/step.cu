// One query a sequence, bound by memory: every key and value is read once, 16 bytes a load. A warp
// takes 4 keys at a time, its lanes the features; tanh is exact everywhere, as there is time for
// it. Long sequences are split over blocks, whose partial softmaxes are merged in order. Pooling,
// whose few queries are the same for all sequences, has its scores computed before (pool.cu).
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kKeys = 4;  // a warp's at a time

// The sums of the 4 keys from `first` on, in all lanes; those past `keys` are repeated. Scores of
// queries and keys, or inner products of dcontext and values.
template <bool kScores>
__device__ __forceinline__ void step_sums(const Rows& left, const Rows& right, const Rows& weight,
                                          int64_t dim, const Span& span, int64_t head, int first,
                                          int keys, float (&sums)[kKeys]) {
  const int64_t query = query_offset(left, span, head, 0);
  int64_t offsets[kKeys];
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    offsets[n] = key_offset(right, span, head, smaller(first + n, keys - 1));
    sums[n] = 0;
  }
#pragma unroll 1
  for (int64_t col = threadIdx.x % kWarp * kGranule; col < dim; col += kWarp * kGranule) {
    float a[kGranule];
    float w[kGranule];
    float b[kKeys][kGranule];
    load_granules(right, offsets, col, dim, b);
    load_granule(left, query, col, dim, a);
    if constexpr (kScores) {
      load_granule(weight, head * weight.head, col, dim, w);
    }
#pragma unroll
    for (int f = 0; f < kGranule; ++f) {
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        sums[n] = kScores ? fmaf(w[f], exact_tanh(a[f] + b[n][f]).tanh, sums[n])
                          : fmaf(a[f], b[n][f], sums[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    sums[n] = reduce_warp<Sum>(sums[n]);
  }
}

constexpr int kProductThreads = 128;
constexpr int kProductShift = 6;

__global__ void __launch_bounds__(kProductThreads, 4) step_product_kernel(const BackwardCall call) {
  __shared__ Place place;
  find_place(call.sequences, true, kProductShift, place);
  const Span& span = place.span;
  const int end = smaller(span.key_count, place.first + (1 << kProductShift));
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int64_t head = blockIdx.y; head < call.heads; head += gridDim.y) {
    for (int key = place.first + warp * kKeys; key < end; key += kProductThreads / kWarp * kKeys) {
      float sums[kKeys];
      step_sums<false>(call.dcontext, call.value, {}, call.value_dim, span, head, key, end, sums);
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        if (lane == n && key + n < end) {
          score_row(call.dscores, span, head, 0)[key + n] = sums[n];
        }
      }
    }
  }
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;  // values that a thread loads at a time

struct Shared {
  float scores[1 << kMostStepShift];
  float sums[kThreads][kGranule];
  float room[kWarps];
};

// A block's keys of one head, and a query.
struct KeyRange {
  const StepCall& call;
  const Span& span;
  int64_t head;
  int query;
  int first;
  int keys;
};

// The number of a partial result.
__device__ inline int64_t partial_row(const StepCall& call, const Span& span, int64_t tile,
                                      int64_t head, int query) {
  return (tile * span.query_count + query) * call.heads + head;
}

__device__ inline void compute_scores(const KeyRange& range, Shared& shared) {
  const StepCall& call = range.call;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int key = threadIdx.x / kWarp * kKeys; key < range.keys; key += kWarps * kKeys) {
    float sums[kKeys];
    step_sums<true>(call.query, call.key, call.score_weight, call.dim, range.span, range.head,
                    range.first + key, range.first + range.keys, sums);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      if (lane == n && key + n < range.keys) {
        shared.scores[key + n] = sums[n];
      }
    }
  }
}

// Puts the scores of the block's keys in place, and out where they are asked for.
template <bool kScored>
__device__ inline void find_scores(const KeyRange& range, Shared& shared) {
  const ScoreRow scores = score_row(range.call.scores, range.span, range.head, range.query);
  if constexpr (!kScored) {
    compute_scores(range, shared);
    __syncthreads();
  }
  if (kScored || range.call.scores.rows.data != nullptr) {
    for (int j = threadIdx.x; j < range.keys; j += kThreads) {
      if constexpr (kScored) {
        shared.scores[j] = scores[range.first + j];
      } else {
        scores[range.first + j] = shared.scores[j];
      }
    }
  }
  __syncthreads();
}

// The softmax of the block's scores: exponentials, after dropout, take their place.
__device__ inline SoftmaxPart exponentiate_scores(const KeyRange& range, Shared& shared) {
  float largest = -INFINITY;
  for (int j = threadIdx.x; j < range.keys; j += kThreads) {
    largest = Maximum::of(largest, shared.scores[j]);
  }
  largest = reduce<Maximum, kThreads>(largest, shared.room);
  const float base = softmax_base(largest);
  float total = 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < range.keys; j += kThreads) {
    const float exponential = expf(shared.scores[j] - base);
    total += exponential;
    shared.scores[j] = exponential * dropout_factor(range.call.dropout, range.span, range.head,
                                                    range.query, range.first + j);
  }
  total = reduce<Sum, kThreads>(total, shared.room);
  return {largest, total};
}

// sum_j scores_j value_j for the 8 columns from `col` on. Threads with the same columns share the
// keys, and the first of them gets the sum.
__device__ inline void weigh_values(const KeyRange& range, int64_t col, int share, int shares,
                                    Shared& shared, float (&sums)[kGranule]) {
  const Rows& value = range.call.value;
  const int64_t dim = range.call.value_dim;
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    sums[f] = 0;
  }
  if (col < dim && share < shares) {
#pragma unroll 1
    for (int first = share; first < range.keys; first += kUnroll * shares) {
      int64_t offsets[kUnroll];
#pragma unroll
      for (int n = 0; n < kUnroll; ++n) {
        const int j = smaller(first + n * shares, range.keys - 1);
        offsets[n] = key_offset(value, range.span, range.head, range.first + j);
      }
      float values[kUnroll][kGranule];
      load_granules(value, offsets, col, dim, values);
#pragma unroll
      for (int n = 0; n < kUnroll; ++n) {
        const int j = first + n * shares;
        const float weight = j < range.keys ? shared.scores[j] : 0.0f;
#pragma unroll
        for (int f = 0; f < kGranule; ++f) {
          // Not even the last value, which is loaded again, may turn nothing into NaN.
          sums[f] = j < range.keys ? fmaf(weight, values[n][f], sums[f]) : sums[f];
        }
      }
    }
  }
  if (shares == 1) {
    return;
  }
  const int columns = static_cast<int>((dim + kGranule - 1) / kGranule);
  __syncthreads();
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    shared.sums[threadIdx.x][f] = sums[f];
  }
  __syncthreads();
  if (share == 0) {
    for (int n = 1; n < shares; ++n) {
#pragma unroll
      for (int f = 0; f < kGranule; ++f) {
        sums[f] += shared.sums[n * columns + threadIdx.x][f];
      }
    }
  }
}

__device__ inline void write_values(const KeyRange& range, int64_t col, float scale,
                                    const float (&sums)[kGranule]) {
  const StepCall& call = range.call;
  const int64_t dim = call.value_dim;
  const int64_t context = query_offset(call.context, range.span, range.head, range.query);
  const int64_t partial = partial_row(call, range.span, blockIdx.x, range.head, range.query) * dim;
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    if (col + f < dim && call.merges) {
      call.partial_sums[partial + col + f] = sums[f];
    } else if (col + f < dim) {
      store(call.context, context + col + f, sums[f] * scale);
    }
  }
}

__device__ inline void write_stats(const KeyRange& range, const SoftmaxPart& softmax) {
  const StepCall& call = range.call;
  if (call.merges) {
    call.partial_stats[partial_row(call, range.span, blockIdx.x, range.head, range.query)] =
        softmax;
    return;
  }
  const int64_t stats = query_offset(call.stats, range.span, range.head, range.query);
  store(call.stats, stats, softmax.largest);
  store(call.stats, stats + 1, softmax.total);
}

template <bool kScored>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const StepCall call) {
  __shared__ __align__(16) Shared shared;
  __shared__ Place place;
  find_place(call.sequences, true, call.key_shift, place);
  const Span& span = place.span;
  if (place.is_empty(true)) {
    return;
  }
  const int first = place.first;
  const int keys = static_cast<int>(smaller<int64_t>(1 << call.key_shift, span.key_count - first));
  const int columns = larger(static_cast<int>((call.value_dim + kGranule - 1) / kGranule), 1);
  const int shares = larger(kThreads / columns, 1);
  const int queries = kScored ? span.query_count : 1;
  // A head's queries are one block's, so that values come from the L2 cache for all but the first.
  for (int64_t row = blockIdx.y; row < call.heads * queries; row += gridDim.y) {
    const int64_t head = kScored ? row % call.heads : row;
    const int query = kScored ? static_cast<int>(row / call.heads) : 0;
    const KeyRange range{call, span, head, query, first, keys};
    __syncthreads();
    find_scores<kScored>(range, shared);
    if (call.stats.data == nullptr) {
      continue;
    }
    const SoftmaxPart softmax = exponentiate_scores(range, shared);
    const float scale = 1 / softmax.total;
    if (threadIdx.x == 0) {
      write_stats(range, softmax);
    }
    if (call.weights.rows.data != nullptr && !call.merges) {
      for (int j = threadIdx.x; j < keys; j += kThreads) {
        store(call.weights.rows, weight_offset(call.weights, span, head, query, first + j),
              shared.scores[j] * scale);
      }
    }
    const int share = shares > 1 ? threadIdx.x / columns : 0;
    const int column = shares > 1 ? threadIdx.x % columns : threadIdx.x;
    for (int start = 0; start < columns; start += kThreads) {
      const int64_t col = int64_t{start + column} * kGranule;
      float sums[kGranule];
      weigh_values(range, col, share, shares, shared, sums);
      if (share == 0) {
        write_values(range, col, scale, sums);
      }
    }
  }
}

// Joins the partial softmaxes of a sequence in the order of their keys.
__global__ void __launch_bounds__(kThreads) step_merge_kernel(const StepCall call) {
  const int64_t n = blockIdx.x;
  const Span span = span_of(call.sequences, n);
  if (span.key_count == 0) {
    return;
  }
  const Sequences& sequences = call.sequences;
  const int64_t begin = first_tile(sequences, true, n, call.key_shift);
  const int64_t keys = int64_t{1} << call.key_shift;
  const int64_t end = begin + ((span.key_count + keys - 1) >> call.key_shift);
  for (int64_t row = blockIdx.y; row < call.heads * span.query_count; row += gridDim.y) {
    const int64_t head = row % call.heads;
    const int query = static_cast<int>(row / call.heads);
    SoftmaxPart whole{-INFINITY, 0};
    for (int64_t tile = begin; tile < end; ++tile) {
      whole = merge_softmax(whole, call.partial_stats[partial_row(call, span, tile, head, query)]);
    }
    const float scale = 1 / whole.total;
    if (threadIdx.x == 0) {
      const int64_t stats = query_offset(call.stats, span, head, query);
      store(call.stats, stats, whole.largest);
      store(call.stats, stats + 1, whole.total);
    }
    for (int64_t col = threadIdx.x; col < call.value_dim; col += kThreads) {
      float sum = 0;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t number = partial_row(call, span, tile, head, query);
        sum = fmaf(softmax_scale(call.partial_stats[number].largest, whole.largest),
                   call.partial_sums[number * call.value_dim + col], sum);
      }
      store(call.context, query_offset(call.context, span, head, query) + col, sum * scale);
    }
    if (call.weights.rows.data == nullptr) {
      continue;
    }
    for (int64_t j = threadIdx.x; j < span.key_count; j += kThreads) {
      const float score = score_row(call.scores, span, head, query)[j];
      store(call.weights.rows, weight_offset(call.weights, span, head, query, j),
            softmax_scale(score, whole.largest) * scale *
                dropout_factor(call.dropout, span, head, query, j));
    }
  }
}

}  // namespace

void launch_step_product(const BackwardCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  launch("inner products of a step", step_product_kernel,
         tile_count(sequences, true, kProductShift), call.heads, 1, kProductThreads, call, stream);
}

void launch_step(const StepCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.sequences;
  launch("step", call.keys_alone ? step_kernel<true> : step_kernel<false>,
         tile_count(sequences, true, call.key_shift), call.heads, 1, kThreads, call, stream);
}

void launch_step_merge(const StepCall& call, cudaStream_t stream) {
  launch("merge of a step", step_merge_kernel, call.sequences.count,
         call.heads * call.sequences.query.longest, 1, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
