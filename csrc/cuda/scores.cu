// Scores of all queries with all keys of their sequence. A block has up to 32 queries and goes
// through tiles of up to 32 keys. Their squares of 4 x 4 go to threads, and as there are more
// threads than squares, each square to several, which share the features. So tiles are worked on
// as large as they are, to the next multiple of 4. Features come in chunks through shared memory,
// where each is exponentiated once, while the next chunk is loaded.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileShift = 5;
constexpr int kTile = 1 << kTileShift;   // queries, and keys
constexpr int kChunk = 64;               // features
constexpr int kLd = kChunk + 4;          // so that 8 rows' 16 bytes lie in different banks
constexpr int kSide = 4;                 // rows and columns of a square
constexpr int kSquares = kTile / kSide;  // in a row of them, at most
constexpr int kQuads = kChunk / 4;       // what threads share of a chunk: 4 features at a time
// Half of the threads fill the queries' panel, half that of keys: so many rows at a time.
constexpr int kFillRows = kThreads / 2 / (kChunk / kGranule);
constexpr int kFillTurns = kTile / kFillRows;
static_assert(kThreads % (kSquares * kSquares) == 0);

// How four features enter a sum. kExponential: panels hold exp(2x) of their rows, and the score
// weights are -2w, as sum_d w_d tanh_d = sum_d w_d - 2 sum_d w_d r_d.
struct FactoredScore {
  static constexpr bool kExponential = true;
  static __device__ float add(float sum, const float4& w, const float4& a, const float4& b) {
    sum = add_factored_pair(sum, w.x, w.y, a.x, a.y, b.x, b.y);
    return add_factored_pair(sum, w.z, w.w, a.z, a.w, b.z, b.w);
  }
};

struct ExactScore {
  static constexpr bool kExponential = false;
  // The four are summed on their own, here and below: errors grow with the additions to a long sum.
  static __device__ float add(float sum, const float4& w, const float4& a, const float4& b) {
    const float first = fmaf(w.y, exact_tanh(a.y + b.y).tanh, w.x * exact_tanh(a.x + b.x).tanh);
    const float last = fmaf(w.w, exact_tanh(a.w + b.w).tanh, w.z * exact_tanh(a.z + b.z).tanh);
    return sum + (first + last);
  }
};

// Whether roundings of the inputs exceed those of the factored form for any magnitudes that do not
// overflow: of 16 bits, where scores are not returned.
__device__ inline bool is_rough(const ForwardCall& call) {
  return call.is_short && !call.raw_scores;
}

struct Shared {
  union {
    struct {
      // Row 4 i + n of a tile is in place 8 n + i, so that neighbours read neighbouring ones.
      float panels[2][kTile][kLd];  // of queries, and of keys
      float weight[kChunk];
      float quad_weight[kQuads];  // sums of w
    };
    float sums[kSide * kSide][kThreads];
  };
  float informative;  // sum of |w| of features that can inform
  float room[kThreads / kWarp];
};

// One tile of queries and keys.
struct TileRows {
  const ForwardCall& call;
  const Span& span;
  int64_t head;
  int query;
  int key;
  int queries;
  int keys;

  __device__ int key_squares() const { return (keys + kSide - 1) / kSide; }
  __device__ int squares() const { return (queries + kSide - 1) / kSide * key_squares(); }
};

__device__ __forceinline__ int place_of(int row) { return row % kSide * kSquares + row / kSide; }

// What a thread fills: 8 columns of every 16th row of one panel. Past the last row that is
// repeated.
struct Filling {
  const Rows& rows;
  int64_t dim;
  int64_t offsets[kFillTurns];
  int side;
  int first;
  int count;  // of rows, whole squares
  int col;
  Granule raw[kFillTurns];  // of the next chunk
};

__device__ inline Filling filling(const TileRows& tile) {
  const int side = threadIdx.x / (kThreads / 2);
  const int count = side == 0 ? tile.queries : tile.keys;
  Filling own{side == 0 ? tile.call.query : tile.call.key,
              tile.call.dim,
              {},
              side,
              static_cast<int>(threadIdx.x) % (kThreads / 2) / (kChunk / kGranule),
              (count + kSide - 1) / kSide * kSide,
              static_cast<int>(threadIdx.x) % (kChunk / kGranule) * kGranule,
              {}};
#pragma unroll
  for (int n = 0; n < kFillTurns; ++n) {
    const int row = smaller(own.first + n * kFillRows, count - 1);
    own.offsets[n] = side == 0 ? query_offset(own.rows, tile.span, tile.head, tile.query + row)
                               : key_offset(own.rows, tile.span, tile.head, tile.key + row);
  }
  return own;
}

// Loads raw rows, as far as whole granules of them are aligned.
__device__ __forceinline__ void start_loads(int64_t chunk, Filling& own) {
  if (is_whole(own.rows, chunk + own.col, own.dim)) {
#pragma unroll
    for (int n = 0; n < kFillTurns; ++n) {
      if (own.first + n * kFillRows < own.count) {
        own.raw[n] = load_raw(own.rows, own.offsets[n] + chunk + own.col);
      }
    }
  }
}

// Turns the chunk's raw rows into panels. Features past the last count as 0.
template <class Rule>
__device__ __forceinline__ void fill_panels(const Filling& own, int64_t chunk, bool rough,
                                            Shared& shared, float& bound) {
#pragma unroll
  for (int n = 0; n < kFillTurns; ++n) {
    const int row = own.first + n * kFillRows;
    if (row >= own.count) {
      break;
    }
    float values[kGranule];
    if (is_whole(own.rows, chunk + own.col, own.dim)) {
      unpack(own.rows.dtype, own.raw[n], values);
    } else {
      load_granule(own.rows, own.offsets[n], chunk + own.col, own.dim, values);
    }
    if constexpr (Rule::kExponential) {
      if (rough) {
        exponentiate<false>(values, bound);
      } else {
        exponentiate<true>(values, bound);
      }
    }
    float* target = &shared.panels[own.side][place_of(row)][own.col];
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
    const Rows& rows = tile.call.score_weight;
    float weight = col < tile.call.dim ? load(rows, tile.head * rows.head + col) : 0.0f;
    shared.weight[threadIdx.x] = Rule::kExponential ? -2 * weight : weight;
    weight += __shfl_xor_sync(kAllLanes, weight, 1);
    weight += __shfl_xor_sync(kAllLanes, weight, 2);
    if (threadIdx.x % 4 == 0) {
      shared.quad_weight[threadIdx.x / 4] = weight;
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
      low[side] = high[side] = shared.panels[side][0][threadIdx.x];
      for (int row = 1; row < (side == 0 ? tile.queries : tile.keys); ++row) {
        const float value = shared.panels[side][place_of(row)][threadIdx.x];
        low[side] = fminf(low[side], value);
        high[side] = fmaxf(high[side], value);
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
  float sum;    // of w
};

__device__ inline WeightFacts weight_facts(const ForwardCall& call, int64_t head, Shared& shared) {
  float magnitudes = 0;
  float sum = 0;
  float squares = 0;
  const Rows& rows = call.score_weight;
  for (int64_t col = threadIdx.x; col < call.dim; col += kThreads) {
    const float weight = load(rows, head * rows.head + col);
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
          magnitudes * static_cast<float>(kInformativePart), sum};
}

// This thread's square over its share of the features. Whether the rule may be trusted here is left
// in `trusted`.
template <class Rule>
__device__ __forceinline__ void add_scores(const TileRows& tile, const WeightFacts& facts,
                                           Shared& shared, float (&sums)[kSide][kSide],
                                           bool& trusted) {
  const bool rough = is_rough(tile.call);
  const int squares = tile.squares();
  const int key_squares = tile.key_squares();
  const int shares = smaller(kThreads / squares, kQuads);
  const int share = threadIdx.x / squares;
  const int square = threadIdx.x % squares;
  // The first shares have a quad more where they cannot all have as many, so that few warps do.
  const int more = kQuads % shares;
  const int begin = 4 * (share * (kQuads / shares) + smaller(share, more));
  const int end = share < shares ? begin + 4 * (kQuads / shares + (share < more ? 1 : 0)) : 0;
  const float* left = shared.panels[0][square / key_squares];
  const float* right = shared.panels[1][square % key_squares];
  Filling own = filling(tile);
  float bound = 0;
#pragma unroll
  for (int n = 0; n < kSide * kSide; ++n) {
    sums[n / kSide][n % kSide] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.informative = 0;
  }
  start_loads(0, own);
  for (int64_t chunk = 0; chunk < tile.call.dim; chunk += kChunk) {
    fill_panels<Rule>(own, chunk, rough, shared, bound);
    fill_weights<Rule>(tile, chunk, shared);
    __syncthreads();
    if (chunk + kChunk < tile.call.dim) {
      start_loads(chunk + kChunk, own);
    }
    if constexpr (Rule::kExponential) {
      if (!rough && shared.informative <= facts.least) {
        add_informative(tile, shared);
      }
    }
#pragma unroll 1
    for (int d = begin; d < end; d += 4) {
      const float4 w = *reinterpret_cast<const float4*>(shared.weight + d);
      float4 a[kSide];
      float4 b[kSide];
#pragma unroll
      for (int n = 0; n < kSide; ++n) {
        a[n] = *reinterpret_cast<const float4*>(left + n * kSquares * kLd + d);
        b[n] = *reinterpret_cast<const float4*>(right + n * kSquares * kLd + d);
      }
#pragma unroll
      for (int n = 0; n < kSide * kSide; ++n) {
        float& sum = sums[n / kSide][n % kSide];
        sum = Rule::add(sum, w, a[n / kSide], b[n % kSide]);
      }
    }
    if constexpr (Rule::kExponential) {
      // The constant joins the sums a chunk at a time, which keeps them as small as the score;
      // where that does not matter, it comes at the end.
      if (!rough) {
        float constant = 0;
        for (int d = begin; d < end; d += 4) {
          constant += shared.quad_weight[d / 4];
        }
#pragma unroll
        for (int n = 0; n < kSide * kSide; ++n) {
          sums[n / kSide][n % kSide] += constant;
        }
      }
    }
    __syncthreads();
  }
  if constexpr (Rule::kExponential) {
    const float query_bound = reduce<Maximum, kThreads>(own.side == 0 ? bound : 0, shared.room);
    const float key_bound = reduce<Maximum, kThreads>(own.side == 1 ? bound : 0, shared.room);
    trusted = (rough || shared.informative > facts.least) &&
              in_factored_range(query_bound, key_bound, rough ? 0 : kSmallestMagnitudeSum);
  }
}

// Adds what the threads of each square have to `constant` and writes the sums out.
__device__ inline void write_sums(const TileRows& tile, float constant, Shared& shared,
                                  const float (&sums)[kSide][kSide]) {
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kSide * kSide; ++n) {
    shared.sums[n][threadIdx.x] = sums[n / kSide][n % kSide];
  }
  __syncthreads();
  const Scores& out = tile.call.scores;
  const int squares = tile.squares();
  const int used = smaller(kThreads / squares, kQuads) * squares;
  const int j = threadIdx.x % kTile;
  for (int i = threadIdx.x / kTile; i < tile.queries && j < tile.keys; i += kThreads / kTile) {
    const float* own = shared.sums[i % kSide * kSide + j % kSide];
    float sum = constant;
    for (int n = i / kSide * tile.key_squares() + j / kSide; n < used; n += squares) {
      sum += own[n];
    }
    score_row(out, tile.span, tile.head, tile.query + i)[tile.key + j] = sum;
  }
}

__global__ void __launch_bounds__(kThreads, 2) score_kernel(const ForwardCall call) {
  __shared__ __align__(16) Shared shared;
  __shared__ Place place;
  find_place(call.sequences, false, kTileShift, place);
  if (place.count == 0) {
    return;
  }
  const Span& span = place.span;
  for (int64_t head = blockIdx.z; head < call.heads; head += gridDim.z) {
    const WeightFacts facts = weight_facts(call, head, shared);
    for (int64_t key = int64_t{blockIdx.y} * kTile; key < span.key_count;
         key += int64_t{gridDim.y} * kTile) {
      const int keys = static_cast<int>(smaller<int64_t>(kTile, span.key_count - key));
      const TileRows tile{call, span, head, place.first, static_cast<int>(key), place.count, keys};
      float sums[kSide][kSide];
      bool trusted = false;
      if (facts.fit) {
        add_scores<FactoredScore>(tile, facts, shared, sums, trusted);
      }
      if (!trusted) {
        add_scores<ExactScore>(tile, facts, shared, sums, trusted);
      }
      write_sums(tile, trusted && is_rough(call) ? facts.sum : 0, shared, sums);
    }
  }
}

}  // namespace

void launch_scores(const ForwardCall& call, cudaStream_t stream) {
  launch_pairs("scores", score_kernel, kTileShift, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
