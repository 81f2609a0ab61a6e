// Scores and inner products of all queries with all keys of their sequence. A block has 32 queries
// and goes through tiles of 32 keys; features come in chunks through shared memory, where each is
// exponentiated once, while the next chunk is copied. A thread holds 4 x 4 sums over half of each
// chunk, so that 9 loads serve 64 elements (query, key, feature).
//
// The raw rows are copied asynchronously, by the thread that will exponentiate them: it waits for
// its own copies, and nothing else has to.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTileShift = 5;
constexpr int kTile = 1 << kTileShift;  // queries, and keys
constexpr int kChunk = 64;              // features
constexpr int kParts = 2;               // of a chunk, for the two halves of the block
constexpr int kLd = kChunk + 4;         // so that 8 rows' 16 bytes lie in different banks
constexpr int kSide = 4;                // rows and columns of a thread's tile
constexpr int kStride = kTile / kSide;  // between them
constexpr int kGranules = kTile * kChunk / kGranule / kThreads;  // a thread's, of each panel
static_assert(kThreads == kParts * kStride * kStride);
static_assert(kTile * kChunk == kGranules * kGranule * kThreads);

// How four features enter a sum. kExponential: panels hold exp(2x) of their rows, and the score
// weights are -2w, as sum_d w_d tanh_d = sum_d w_d - 2 sum_d w_d r_d.
struct FactoredScore {
  static constexpr int kUnroll = 4;
  static constexpr bool kExponential = true;
  static constexpr bool kWeighted = true;
  static __device__ float add(float sum, const float4& w, const float4& a, const float4& b) {
    sum = add_factored_pair(sum, w.x, w.y, a.x, a.y, b.x, b.y);
    return add_factored_pair(sum, w.z, w.w, a.z, a.w, b.z, b.w);
  }
};

struct ExactScore {
  static constexpr int kUnroll = 1;
  static constexpr bool kExponential = false;
  static constexpr bool kWeighted = true;
  // The four are summed on their own, here and below: errors grow with the additions to a long sum.
  static __device__ float add(float sum, const float4& w, const float4& a, const float4& b) {
    const float first = fmaf(w.y, exact_tanh(a.y + b.y).tanh, w.x * exact_tanh(a.x + b.x).tanh);
    const float last = fmaf(w.w, exact_tanh(a.w + b.w).tanh, w.z * exact_tanh(a.z + b.z).tanh);
    return sum + (first + last);
  }
};

struct DotProduct {
  static constexpr int kUnroll = 2;
  static constexpr bool kExponential = false;
  static constexpr bool kWeighted = false;
  static __device__ float add(float sum, const float4&, const float4& a, const float4& b) {
    return sum + fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
  }
};

struct Shared {
  float left[kTile][kLd];
  float right[kTile][kLd];
  float weight[kChunk];
  float part_weight[kParts];  // sums of w
  float informative;          // sum of |w| of features that can inform
  Granule raw[2 * kGranules][kThreads];
  float room[kThreads / kWarp];
};

// One tile of queries and keys.
struct TileRows {
  const InnerCall& call;
  const Span& span;
  int64_t head;
  int query;
  int key;
  int queries;
  int keys;

  __device__ bool has(int side, int row) const { return row < (side == 0 ? queries : keys); }
  __device__ const Rows& rows(int side) const { return side == 0 ? call.left : call.right; }
  __device__ int64_t offset(int side, int row) const {
    return side == 0 ? query_offset(call.left, span, head, query + row)
                     : key_offset(call.right, span, head, key + row);
  }
};

__device__ __forceinline__ int granule_row(int n) {
  return static_cast<int>(n % kGranules * kThreads + threadIdx.x) / (kChunk / kGranule);
}

__device__ __forceinline__ int granule_col() {
  return static_cast<int>(threadIdx.x) % (kChunk / kGranule) * kGranule;
}

__device__ __forceinline__ void start_copies(const TileRows& tile, int64_t chunk, Shared& shared) {
  const int64_t col = chunk + granule_col();
#pragma unroll
  for (int n = 0; n < 2 * kGranules; ++n) {
    const int side = n / kGranules;
    const int row = granule_row(n);
    const Rows& rows = tile.rows(side);
    if (tile.has(side, row) && is_whole(rows, col, tile.call.dim)) {
      copy_async(&shared.raw[n][threadIdx.x], rows, tile.offset(side, row) + col);
    }
  }
}

// Turns the chunk's raw rows into panels. Rows that the tile lacks, and features past the last,
// count as 0.
template <class Rule>
__device__ __forceinline__ void fill_panels(const TileRows& tile, int64_t chunk, Shared& shared,
                                            float (&bounds)[2]) {
  const int64_t dim = tile.call.dim;
  const int col = granule_col();
  wait_for_copies();
#pragma unroll
  for (int n = 0; n < 2 * kGranules; ++n) {
    const int side = n / kGranules;
    const int row = granule_row(n);
    const Rows& rows = tile.rows(side);
    float values[kGranule] = {};
    if (tile.has(side, row)) {
      if (is_whole(rows, chunk + col, dim)) {
        unpack(rows.dtype, shared.raw[n][threadIdx.x], values);
      } else {
        load_granule(rows, tile.offset(side, row), chunk + col, dim, values);
      }
    }
    float* target = side == 0 ? &shared.left[row][col] : &shared.right[row][col];
    if constexpr (Rule::kExponential) {
#pragma unroll
      for (int f = 0; f < kGranule; ++f) {
        bounds[side] = Maximum::of(fabsf(values[f]), bounds[side]);
        values[f] = factored_exponential(values[f]);
      }
    }
#pragma unroll
    for (int f = 0; f < kGranule; f += 4) {
      *reinterpret_cast<float4*>(target + f) =
          make_float4(values[f], values[f + 1], values[f + 2], values[f + 3]);
    }
  }
}

template <class Rule>
__device__ __forceinline__ void fill_weights(const TileRows& tile, int64_t chunk, Shared& shared) {
  if (threadIdx.x < kChunk) {
    const int64_t col = chunk + threadIdx.x;
    const Rows& rows = tile.call.problem.score_weight;
    const float weight =
        col < tile.call.dim ? load(rows, tile.head * rows.head + col * rows.col) : 0.0f;
    shared.weight[threadIdx.x] = Rule::kExponential ? -2 * weight : weight;
    static_assert(kChunk / kParts == kWarp);
    const float sum = reduce_warp<Sum>(weight);
    if (threadIdx.x % kWarp == 0) {
      shared.part_weight[threadIdx.x / kWarp] = sum;
    }
  }
}

// Adds the |w| of those features of the chunk that can inform some query of some key.
__device__ inline void add_informative(const TileRows& tile, Shared& shared) {
  float weight = 0;
  if (threadIdx.x < kChunk) {
    float low[2];
    float high[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float* values =
          side == 0 ? &shared.left[0][threadIdx.x] : &shared.right[0][threadIdx.x];
      low[side] = high[side] = values[0];
      for (int row = 1; row < (side == 0 ? tile.queries : tile.keys); ++row) {
        low[side] = fminf(low[side], values[row * kLd]);
        high[side] = fmaxf(high[side], values[row * kLd]);
      }
    }
    if (can_inform(low[0] * low[1], high[0] * high[1])) {
      weight = 0.5f * fabsf(shared.weight[threadIdx.x]);  // of -2w
    }
  }
  weight = reduce<Sum, kThreads>(weight, shared.room);
  if (threadIdx.x == 0) {
    shared.informative += weight;
  }
}

// What the score weights of a head say about its tiles.
struct WeightFacts {
  bool fit;     // small enough, and so is their sum beside their norm
  float least;  // |w| of informative features that factored scores need
};

__device__ inline WeightFacts weight_facts(const InnerCall& call, int64_t head, Shared& shared) {
  float magnitudes = 0;
  float sum = 0;
  float squares = 0;
  const Rows& rows = call.problem.score_weight;
  for (int64_t col = threadIdx.x; col < call.dim; col += kThreads) {
    const float weight = load(rows, head * rows.head + col * rows.col);
    magnitudes += fabsf(weight);
    sum += weight;
    squares = fmaf(weight, weight, squares);
  }
  magnitudes = reduce<Sum, kThreads>(magnitudes, shared.room);
  sum = reduce<Sum, kThreads>(sum, shared.room);
  squares = reduce<Sum, kThreads>(squares, shared.room);
  constexpr float largest_square = kLargestWeightNorm * kLargestWeightNorm;
  constexpr float largest_sum = kLargestWeightSum;
  return {squares <= largest_square && sum * sum <= largest_sum * largest_sum * squares,
          magnitudes * static_cast<float>(kInformativePart)};
}

// This thread's sums over its half of the features. Whether the rule may be trusted here is left
// in `trusted`.
template <class Rule>
__device__ __forceinline__ void inner_products(const TileRows& tile, const WeightFacts& facts,
                                               Shared& shared, float (&sums)[kSide][kSide],
                                               bool& trusted) {
  const int part = threadIdx.x / (kThreads / kParts);
  const int tx = threadIdx.x % kStride;
  const int ty = threadIdx.x / kStride % kStride;
  float bounds[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < kSide * kSide; ++n) {
    sums[n / kSide][n % kSide] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.informative = 0;
  }
  start_copies(tile, 0, shared);
  for (int64_t chunk = 0; chunk < tile.call.dim; chunk += kChunk) {
    fill_panels<Rule>(tile, chunk, shared, bounds);
    if constexpr (Rule::kWeighted) {
      fill_weights<Rule>(tile, chunk, shared);
    }
    __syncthreads();
    if (chunk + kChunk < tile.call.dim) {
      start_copies(tile, chunk + kChunk, shared);
    }
    if constexpr (Rule::kExponential) {
      if (shared.informative <= facts.least) {
        add_informative(tile, shared);
      }
    }
    const float* left = &shared.left[ty][part * kChunk / kParts];
    const float* right = &shared.right[tx][part * kChunk / kParts];
    const float* weight = &shared.weight[part * kChunk / kParts];
#pragma unroll Rule::kUnroll
    for (int d = 0; d < kChunk / kParts; d += 4) {
      const float4 w = Rule::kWeighted ? *reinterpret_cast<const float4*>(weight + d) : float4{};
      float4 a[kSide];
      float4 b[kSide];
#pragma unroll
      for (int n = 0; n < kSide; ++n) {
        a[n] = *reinterpret_cast<const float4*>(left + n * kStride * kLd + d);
        b[n] = *reinterpret_cast<const float4*>(right + n * kStride * kLd + d);
      }
#pragma unroll
      for (int n = 0; n < kSide * kSide; ++n) {
        float& sum = sums[n / kSide][n % kSide];
        sum = Rule::add(sum, w, a[n / kSide], b[n % kSide]);
      }
    }
    if constexpr (Rule::kExponential) {
      // The constant joins the sums a chunk at a time, which keeps them as small as the score.
#pragma unroll
      for (int n = 0; n < kSide * kSide; ++n) {
        sums[n / kSide][n % kSide] += shared.part_weight[part];
      }
    }
    __syncthreads();
  }
  if constexpr (Rule::kExponential) {
    const float query_bound = reduce<Maximum, kThreads>(bounds[0], shared.room);
    const float key_bound = reduce<Maximum, kThreads>(bounds[1], shared.room);
    trusted = shared.informative > facts.least &&
              in_factored_range(query_bound, key_bound, kSmallestMagnitudeSum);
  }
}

// Adds the halves' sums and writes them out.
__device__ inline void write_sums(const TileRows& tile, Shared& shared,
                                  const float (&sums)[kSide][kSide]) {
  const int part = threadIdx.x / (kThreads / kParts);
  const int tx = threadIdx.x % kStride;
  const int ty = threadIdx.x / kStride % kStride;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kSide * kSide; ++n) {
    const int row = ty + n / kSide * kStride;
    const int col = tx + n % kSide * kStride;
    if (part == 1) {
      shared.left[row][col] = sums[n / kSide][n % kSide];
    }
  }
  __syncthreads();
  const Scores& out = tile.call.out;
#pragma unroll
  for (int n = 0; n < kSide * kSide; ++n) {
    const int row = ty + n / kSide * kStride;
    const int col = tx + n % kSide * kStride;
    if (part == 0 && row < tile.queries && col < tile.keys) {
      out.data[score_offset(out, tile.span, tile.head, tile.query + row, tile.key + col)] =
          sums[n / kSide][n % kSide] + shared.left[row][col];
    }
  }
}

template <bool kScores>
__global__ void __launch_bounds__(kThreads, kScores ? 4 : 3) inner_kernel(const InnerCall call) {
  __shared__ __align__(16) Shared shared;
  const Sequences& sequences = call.problem.sequences;
  const Tile found = find_query_tile(sequences, kTileShift, blockIdx.x);
  const Span span = span_of(sequences, found.sequence);
  if (found.first >= span.query_count) {
    return;
  }
  const int first = static_cast<int>(found.first);
  const int queries = smaller(kTile, span.query_count - first);
  for (int64_t head = blockIdx.z; head < call.problem.heads; head += gridDim.z) {
    WeightFacts facts{};
    if constexpr (kScores) {
      facts = weight_facts(call, head, shared);
    }
    for (int64_t key = int64_t{blockIdx.y} * kTile; key < span.key_count;
         key += int64_t{gridDim.y} * kTile) {
      const int keys = static_cast<int>(smaller<int64_t>(kTile, span.key_count - key));
      const TileRows tile{call, span, head, first, static_cast<int>(key), queries, keys};
      float sums[kSide][kSide];
      bool trusted = false;
      if constexpr (kScores) {
        if (facts.fit) {
          inner_products<FactoredScore>(tile, facts, shared, sums, trusted);
        }
        if (!trusted) {
          inner_products<ExactScore>(tile, facts, shared, sums, trusted);
        }
      } else {
        inner_products<DotProduct>(tile, facts, shared, sums, trusted);
      }
      write_sums(tile, shared, sums);
    }
  }
}

}  // namespace

void launch_inner(const InnerCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.problem.sequences;
  const int64_t tiles =
      tile_bound(sequences.last_row - sequences.first_row, sequences.count, kTileShift);
  // Tiles of keys go to blocks of their own only as far as that fills the device. Short sequences
  // leave most of their tiles empty, so what counts is how many the rows fill.
  const int64_t full = (sequences.last_row - sequences.first_row) >> kTileShift;
  const int64_t blocks = (full > 0 ? full : 1) * (call.problem.heads > 0 ? call.problem.heads : 1);
  const int64_t wanted = 16 * processors() / blocks + 1;
  const int64_t key_tiles = (sequences.key.longest + kTile - 1) / kTile;
  launch(call.scores ? "scores" : "inner products",
         call.scores ? inner_kernel<true> : inner_kernel<false>, tiles,
         wanted < key_tiles ? wanted : key_tiles, call.problem.heads, kThreads, call, stream);
}

}  // namespace cuda
}  // namespace attn_ext
