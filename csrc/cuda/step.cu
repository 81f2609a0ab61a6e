// One query a sequence, or the few of pooling, bound by memory: every key and value is read once,
// 16 bytes a load. A warp takes some keys at a time, its lanes the features; tanh is exact
// everywhere, as there is time for it. Long sequences are split over blocks, whose partial
// softmaxes are merged in order.
#include "hidden.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;  // values that a thread loads at a time

struct Shared {
  float scores[1 << kMostStepShift];
  float sums[kThreads][kGranule];
  float room[kWarps];
};

template <bool kPools>
constexpr int kKeys = kPools ? 2 : 4;  // a warp's at a time

// Offsets of the keys from `first` on; those past the last are repeated.
template <int kKeys>
__device__ __forceinline__ void find_rows(const Rows& rows, const Bag& bag, int first, int last,
                                          int64_t (&offsets)[kKeys]) {
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    offsets[n] = key_offset(rows, bag.span, bag.head, smaller(first + n, last));
  }
}

// Makes of keys tanh(q + k), or in pooling hidden rows; without a query they stay as they are.
template <bool kPools, int kKeys>
__device__ __forceinline__ void make_rows(const Bag& bag, int64_t query, int first, int last,
                                          int64_t col, float (&rows)[kKeys][kGranule]) {
  const ForwardCall& call = bag.call;
  if constexpr (kPools) {
    float gates[kKeys][kGranule];
    if (call.gate.data != nullptr) {
      int64_t offsets[kKeys];
      find_rows(call.gate, bag, first, last, offsets);
      load_granules(call.gate, offsets, col, call.dim, gates);
    }
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const HiddenGranule made = hidden_of(bag, smaller(first + n, last), col, rows[n], gates[n]);
#pragma unroll
      for (int f = 0; f < kGranule; ++f) {
        rows[n][f] = made.hidden[f];
      }
    }
  } else if (call.query.data != nullptr) {
    float own[kGranule];
    load_granule(call.query, query, col, call.dim, own);
#pragma unroll
    for (int n = 0; n < kKeys * kGranule; ++n) {
      float& value = rows[n / kGranule][n % kGranule];
      value = exact_tanh(own[n % kGranule] + value).tanh;
    }
  }
}

// Adds a granule's share of the sums of each key with the row of weights at `offset`.
template <int kKeys>
__device__ __forceinline__ void add_products(const Rows& weight_rows, int64_t offset, int64_t col,
                                             int64_t dim, const float (&rows)[kKeys][kGranule],
                                             float (&sums)[kKeys]) {
  float weights[kGranule];
  load_granule(weight_rows, offset, col, dim, weights);
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      sums[n] = fmaf(weights[f], rows[n][f], sums[n]);
    }
  }
}

// Sums over all lanes, of key n for lane n.
template <int kKeys>
__device__ __forceinline__ float own_sum(const float (&sums)[kKeys]) {
  float own = 0;
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    const float sum = reduce_warp<Sum>(sums[n]);
    own = static_cast<int>(threadIdx.x) % kWarp == n ? sum : own;
  }
  return own;
}

// The scores of the keys from `first` on, for lane n of key n in `target`; those of the branches of
// pooling lie `stride` apart.
template <bool kPools>
__device__ __forceinline__ void score_keys(const Bag& bag, int first, int last, float* target,
                                           int64_t stride) {
  const ForwardCall& call = bag.call;
  const int64_t query = query_offset(call.query, bag.span, bag.head, 0);
  const Rows& weight_rows = kPools ? call.query : call.score_weight;
  const RowOffsets weights = query_offsets(weight_rows, bag.span, bag.head);
  int64_t offsets[kKeys<kPools>];
  find_rows(call.key, bag, first, last, offsets);
  float sums[kKeys<kPools>] = {};
  // Of no features there are scores, too: 0.
#pragma unroll 1
  for (int64_t begin = 0; begin == 0 || begin < call.dim; begin += kWarp * kGranule) {
    const int64_t col = begin + threadIdx.x % kWarp * kGranule;
    float rows[kKeys<kPools>][kGranule];
    load_granules(call.key, offsets, col, call.dim, rows);
    make_rows<kPools>(bag, query, first, last, col, rows);
    if constexpr (!kPools) {
      add_products(weight_rows, weights.first, col, call.dim, rows, sums);
    }
    for (int branch = 0; kPools && branch < bag.span.query_count; ++branch) {
      float products[kKeys<kPools>] = {};
      add_products(weight_rows, weights[branch], col, call.dim, rows, products);
      const float own = own_sum(products);
      if (target != nullptr) {
        float& score = target[branch * stride];
        score = begin == 0 ? own : score + own;
      }
    }
  }
  if constexpr (!kPools) {
    const float own = own_sum(sums);
    if (target != nullptr) {
      *target = own;
    }
  }
}

// A block's keys of one head, and a query.
struct KeyRange : Bag {
  int query;
  int first;
  int keys;
};

// The number of a partial result.
__device__ inline int64_t partial_row(const ForwardCall& call, const Span& span, int64_t tile,
                                      int64_t head, int query) {
  return (tile * span.query_count + query) * call.heads + head;
}

// Scores of the block's keys: of one query in place, of several in memory.
template <bool kPools>
__device__ inline void compute_scores(const KeyRange& range, Shared& shared) {
  const ScoreRow scores = score_row(range.call.scores, range.span, range.head, 0);
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int key = threadIdx.x / kWarp * kKeys<kPools>; key < range.keys;
       key += kWarps * kKeys<kPools>) {
    float* target = nullptr;
    if (lane < kKeys<kPools> && key + lane < range.keys) {
      target = range.span.query_count > 1 ? &scores[range.first + key + lane]
                                          : &shared.scores[key + lane];
    }
    score_keys<kPools>(range, range.first + key, range.first + range.keys - 1, target,
                       range.call.scores.rows.row);
  }
}

// Puts a query's scores in place, or where only there they are, out.
__device__ inline void move_scores(const KeyRange& range, Shared& shared) {
  const ScoreRow scores = score_row(range.call.scores, range.span, range.head, range.query);
  for (int j = threadIdx.x; j < range.keys; j += kThreads) {
    if (range.span.query_count > 1) {
      shared.scores[j] = scores[range.first + j];
    } else {
      scores[range.first + j] = shared.scores[j];
    }
  }
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
  const ForwardCall& call = range.call;
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
  const ForwardCall& call = range.call;
  if (call.merges) {
    call.partial_stats[partial_row(call, range.span, blockIdx.x, range.head, range.query)] =
        softmax;
    return;
  }
  const int64_t stats = query_offset(call.stats, range.span, range.head, range.query);
  store(call.stats, stats, softmax.largest);
  store(call.stats, stats + 1, softmax.total);
}

// Softmax and context of a query from its scores, or the block's part of them.
__device__ inline void attend(const KeyRange& range, Shared& shared) {
  const ForwardCall& call = range.call;
  const SoftmaxPart softmax = exponentiate_scores(range, shared);
  const float scale = 1 / softmax.total;
  if (threadIdx.x == 0) {
    write_stats(range, softmax);
  }
  if (call.weights.rows.data != nullptr && !call.merges) {
    for (int j = threadIdx.x; j < range.keys; j += kThreads) {
      store(call.weights.rows,
            score_offsets(call.weights, range.span, range.head, range.query)[range.first + j],
            shared.scores[j] * scale);
    }
  }
  const int columns = larger(static_cast<int>((call.value_dim + kGranule - 1) / kGranule), 1);
  const int shares = larger(kThreads / columns, 1);
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

template <bool kPools>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const ForwardCall call) {
  __shared__ __align__(16) Shared shared;
  __shared__ Place place;
  find_place(call.sequences, true, call.key_shift, place);
  const Span& span = place.span;
  if (place.count == 0) {
    return;
  }
  // A head's queries are one block's, so that values come from the L2 cache for all but the first.
  for (int64_t head = blockIdx.y; head < call.heads; head += gridDim.y) {
    __syncthreads();
    compute_scores<kPools>({{call, span, head}, 0, place.first, place.count}, shared);
    for (int query = 0; query < span.query_count; ++query) {
      const KeyRange range{{call, span, head}, query, place.first, place.count};
      __syncthreads();
      move_scores(range, shared);
      if (call.stats.data != nullptr) {
        __syncthreads();
        attend(range, shared);
      }
    }
  }
}

// Joins the partial softmaxes of a sequence in the order of their keys.
__global__ void __launch_bounds__(kThreads) step_merge_kernel(const ForwardCall call) {
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
      store(call.weights.rows, score_offsets(call.weights, span, head, query)[j],
            softmax_scale(score, whole.largest) * scale *
                dropout_factor(call.dropout, span, head, query, j));
    }
  }
}

}  // namespace

void launch_step(const ForwardCall& call, cudaStream_t stream) {
  launch("step", call.keys_alone ? step_kernel<true> : step_kernel<false>,
         tile_count(call.sequences, true, call.key_shift), call.heads, 1, kThreads, call, stream);
}

void launch_step_merge(const ForwardCall& call, cudaStream_t stream) {
  launch("merge of a step", step_merge_kernel, call.sequences.count,
         call.heads * call.sequences.query.longest, 1, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
