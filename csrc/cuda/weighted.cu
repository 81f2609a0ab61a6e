// Weighted sums of rows on tensor cores: context_i = sum_j alpha_ij value_j, whose alpha is the
// softmax of scores, and dvalue_j = sum_i alpha_ij dcontext_i. A block makes 32 rows, each of its
// warps 64 columns of them.
#include "kernels.h"
#include "launch.cuh"
#include "product.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowShift = 5;
constexpr int kRows = 1 << kRowShift;  // of the output
constexpr int kStep = 16;              // rows that a product sums, and half of the output's
constexpr int kInner = 128;            // rows whose alpha is in place at a time
constexpr int kCols = 8 * kGranule;    // a warp's: 8 lanes have a granule each
constexpr int kLd = kInner / 2 + 4;    // words; so that 8 rows' 16 bytes lie in different banks
static_assert(kRows == 2 * kStep && kInner % kStep == 0);

// out_i = sum_j alpha_ij rows_j, or by key out_j = sum_i alpha_ij rows_i.
struct WeightedCall : ForwardCall {
  Scores alpha;  // by query: the scores
  Rows rows;
  Rows out;
  Rows sums;  // by key: float32, where out gathers over waves
};

template <int kAlphaTerms>
struct Shared {
  RowOffsets rows;  // of what is summed
  RowOffsets out;
  unsigned alpha[kAlphaTerms][kRows][kLd];
  float base[kRows];  // of the softmax
  float scale[kRows];
};

// What a block makes: rows [first, first + count) of the output, sums over `inner` rows.
struct OutputTile {
  const WeightedCall& call;
  const Span& span;
  int64_t head;
  int first;
  int count;
  int inner;
};

// Largest score and sum of exponentials of the block's queries.
template <int kAlphaTerms>
__device__ inline void softmax(const OutputTile& tile, Shared<kAlphaTerms>& shared) {
  constexpr int kLanes = 8;  // that a row belongs to
  const WeightedCall& call = tile.call;
  const int lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int first = 0; first < tile.count; first += kThreads / kLanes) {
    const int row = first + threadIdx.x / kLanes;
    const bool exists = row < tile.count;
    const int keys = exists ? tile.inner : 0;
    const ScoreRow scores = score_row(call.alpha, tile.span, tile.head, tile.first + row);
    float largest = -INFINITY;
    for (int j = lane; j < keys; j += kLanes) {
      largest = Maximum::of(largest, scores[j]);
    }
    largest = reduce_warp<Maximum, kLanes>(largest);
    const float base = softmax_base(largest);
    float total = 0;
    for (int j = lane; j < keys; j += kLanes) {
      total += expf(scores[j] - base);
    }
    total = reduce_warp<Sum, kLanes>(total);
    if (lane == 0 && exists) {
      shared.base[row] = base;
      shared.scale[row] = 1 / total;
    }
    if (lane == 0 && exists && blockIdx.y == 0) {
      const int64_t offset = query_offset(call.stats, tile.span, tile.head, tile.first + row);
      store(call.stats, offset, largest);
      store(call.stats, offset + 1, total);
    }
  }
}

// alpha of a query and key j, after dropout; the first blocks of the query also return it.
template <int kAlphaTerms>
__device__ inline float softmax_weight(const OutputTile& tile, int row, int j,
                                       const Shared<kAlphaTerms>& shared) {
  const WeightedCall& call = tile.call;
  const int i = tile.first + row;
  const float score = score_row(call.alpha, tile.span, tile.head, i)[j];
  const float alpha = expf(score - shared.base[row]) * shared.scale[row] *
                      dropout_factor(call.dropout, tile.span, tile.head, i, j);
  if (call.weights.rows.data != nullptr && blockIdx.y == 0) {
    store(call.weights.rows, score_offsets(call.weights, tile.span, tile.head, i)[j], alpha);
  }
  return alpha;
}

// Puts alpha of the rows that are summed next in place, 0 elsewhere.
template <bool kByKey, int kAlphaTerms>
__device__ __forceinline__ void fill(const OutputTile& tile, int begin,
                                     Shared<kAlphaTerms>& shared) {
  const WeightedCall& call = tile.call;
  // Neighbours read neighbouring keys.
  constexpr int kTogether = kByKey ? kRows : kThreads / (kStep / 2);
  const int first_row = kByKey ? threadIdx.x % kRows : threadIdx.x / (kStep / 2);
  const int first_pair = kByKey ? threadIdx.x / kRows : threadIdx.x % (kStep / 2);
  const int pairs = (smaller(kInner, tile.inner - begin) + kStep - 1) / kStep * (kStep / 2);
  for (int row = first_row; row < kRows; row += kTogether) {
#pragma unroll 1
    for (int pair = first_pair; pair < pairs; pair += kThreads / kTogether) {
      float alpha[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int inner = begin + 2 * pair + half;
        if (row < tile.count && inner < tile.inner) {
          alpha[half] = kByKey
                            ? score_row(call.alpha, tile.span, tile.head, inner)[tile.first + row]
                            : softmax_weight(tile, row, inner, shared);
        }
      }
      unsigned words[kAlphaTerms][1];
      split(alpha[0], alpha[1], words, 0);
#pragma unroll
      for (int p = 0; p < kAlphaTerms; ++p) {
        shared.alpha[p][row][pair] = words[p][0];
      }
    }
  }
}

using Totals = float[kRows / kStep][kGranule][4];

// Adds what 16 rows from `begin` on give: of column n of granule t, totals[.][t] have column n of
// the product.
template <bool kByKey, int kTerms>
__device__ __forceinline__ void add_rows(const OutputTile& tile, int begin, int step, int64_t col,
                                         const Shared<kComputedTerms<kTerms>>& shared,
                                         Totals& totals) {
  constexpr int kAlphaTerms = kComputedTerms<kTerms>;
  const WeightedCall& call = tile.call;
  const int r = threadIdx.x % kWarp / 4;
  const int c = threadIdx.x % 4;
  float rows[4][kGranule];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int inner = begin + step + 2 * c + n / 2 * 8 + n % 2;
    if (inner < tile.inner) {
      load_granule(call.rows, shared.rows[inner], col, call.value_dim, rows[n]);
    } else {
#pragma unroll
      for (int t = 0; t < kGranule; ++t) {
        rows[n][t] = 0;
      }
    }
  }
  unsigned a[kRows / kStep][kAlphaTerms][4];
#pragma unroll
  for (int n = 0; n < kRows / kStep * kAlphaTerms * 4; ++n) {
    const int half = n / (kAlphaTerms * 4);
    const int p = n / 4 % kAlphaTerms;
    a[half][p][n % 4] = shared.alpha[p][half * kStep + r + n % 2 * 8][step / 2 + c + n % 4 / 2 * 4];
  }
#pragma unroll
  for (int t = 0; t < kGranule; ++t) {
    unsigned b[kTerms][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      split(rows[2 * n][t], rows[2 * n + 1][t], b, n);
    }
#pragma unroll
    for (int half = 0; half < kRows / kStep; ++half) {
      if (half * kStep < tile.count) {
        multiply_terms(a[half], b, totals[half][t]);
      }
    }
  }
}

// Stores the sums. Those by key add to what earlier waves of queries left, and wait for later ones.
template <bool kByKey>
__device__ inline void write(const OutputTile& tile, const RowOffsets& out, int64_t first_col,
                             const Totals& totals) {
  const WeightedCall& call = tile.call;
  const int64_t dim = call.value_dim;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const int row = n * 8 + threadIdx.x % kWarp / 4;
    if (row >= tile.count) {
      break;
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t col = first_col + (threadIdx.x % 4 * 2 + side) * kGranule;
      if (col >= dim) {
        break;
      }
      float values[kGranule];
#pragma unroll
      for (int t = 0; t < kGranule; ++t) {
        values[t] = totals[n / 2][t][n % 2 * 2 + side];
      }
      const int number = tile.first + row;
      if (kByKey && tile.span.first_query > 0) {
        add_sums(call.sums, key_offset(call.sums, tile.span, tile.head, number), col, dim, values);
      }
      if (kByKey && !tile.span.has_last_query) {
        const int64_t sums = key_offset(call.sums, tile.span, tile.head, number);
        store_granule(call.sums, sums, col, dim, values);
      } else {
        store_granule(call.out, out[number], col, dim, values);
      }
    }
  }
}

template <bool kByKey, int kTerms>
__global__ void __launch_bounds__(kThreads, 3) weighted_kernel(const WeightedCall call) {
  __shared__ __align__(16) Shared<kComputedTerms<kTerms>> shared;
  __shared__ Place place;
  find_place(call.sequences, kByKey, kRowShift, place);
  const Span& span = place.span;
  // Rows that sum nothing were cleared before (Call::leaves_rows).
  if (place.count == 0 || span.query_count == 0 || span.key_count == 0) {
    return;
  }
  const int64_t warp_col = threadIdx.x / kWarp * kCols;
  for (int64_t head = blockIdx.z; head < call.heads; head += gridDim.z) {
    const OutputTile tile{call,        span,        head,
                          place.first, place.count, kByKey ? span.query_count : span.key_count};
    int filled = -1;  // the first of the rows whose alpha is in place
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.rows =
          kByKey ? query_offsets(call.rows, span, head) : key_offsets(call.rows, span, head);
      shared.out = kByKey ? key_offsets(call.out, span, head) : query_offsets(call.out, span, head);
    }
    if constexpr (!kByKey) {
      softmax(tile, shared);
    }
    for (int64_t block_col = int64_t{blockIdx.y} * kCols * kWarps;
         block_col < larger<int64_t>(call.value_dim, 1);
         block_col += int64_t{gridDim.y} * kCols * kWarps) {
      const int64_t col = block_col + warp_col;
      Totals totals = {};
      for (int begin = 0; begin < tile.inner; begin += kInner) {
        if (begin != filled) {
          __syncthreads();
          fill<kByKey>(tile, begin, shared);
          __syncthreads();
          filled = begin;
        }
        const int steps = smaller(kInner, tile.inner - begin);
        for (int step = 0; step < steps && col < call.value_dim; step += kStep) {
          add_rows<kByKey, kTerms>(tile, begin, step, col + threadIdx.x % kWarp / 4 * kGranule,
                                   shared, totals);
        }
      }
      write<kByKey>(tile, shared.out, col, totals);
    }
  }
}

template <bool kByKey>
void launch_weighted(const WeightedCall& call, cudaStream_t stream) {
  const Range range = worked_on(call.sequences, kByKey);
  const int64_t tiles = (range.end - range.begin) >> kRowShift;
  const int64_t columns = (call.value_dim + kCols * kWarps - 1) / (kCols * kWarps);
  const int terms = terms_of(call.rows.dtype);
  launch("weighted sums",
         terms == 1   ? weighted_kernel<kByKey, 1>
         : terms == 2 ? weighted_kernel<kByKey, 2>
                      : weighted_kernel<kByKey, 3>,
         tile_count(call.sequences, kByKey, kRowShift), blocks_of_tile(tiles, call.heads, columns),
         call.heads, kThreads, call, stream);
}

}  // namespace

void launch_context(const ForwardCall& call, cudaStream_t stream) {
  launch_weighted<false>({call, call.scores, call.value, call.context, {}}, stream);
}

void launch_value_gradient(const BackwardCall& call, cudaStream_t stream) {
  launch_weighted<true>({call, call.alpha, call.dcontext, call.dvalue, call.dvalue_sums}, stream);
}

}  // namespace attn_ext::cuda
