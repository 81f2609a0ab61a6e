// The gradient phase: from s = alpha (dalpha - delta) to dquery, dkey and dscore_weight. With t =
// tanh(q + k):
//   dquery_id = w_d sum_j s_ij (1 - t_ijd^2),  dkey_jd = w_d sum_i s_ij (1 - t_ijd^2),
//   dscore_weight_d = sum_ij s_ij t_ijd.
// A block has 64 features, two a lane, of a range of keys, against all queries of their sequence.
// 16 keys are held in registers with their gradients; the block's 4 warps share the queries, whose
// gradients stay in shared memory. Each t is computed once for all three sums, which are added in a
// fixed order.
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace attn_ext {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kKeys = 16;  // a tile's
constexpr int kRowGranules = kGradientFeatures / kGranule;
static_assert(kGradientFeatures == 2 * kWarp);
static_assert(kKeys * kRowGranules == kThreads);
static_assert(kGradientQueries * kRowGranules % kThreads == 0);

// Smallest and largest exponentials of a lane's two features.
struct __align__(16) Extremes {
  float2 low;
  float2 high;
};

struct Shared {
  float query[kGradientQueries][kGradientFeatures];   // exp(2 query)
  float dquery[kGradientQueries][kGradientFeatures];  // sums of s (1 - t^2) / 4
  float dscores[kGradientQueries][kKeys];
  union {  // the panel of keys is in registers by the time that gradients are written
    float key[kKeys][kGradientFeatures];
    float dkey[kWarps][kKeys][kGradientFeatures];
  };
  // Where every tanh is small, 1 - t^2 is nearly 1, and as sum_j s_ij = 0 what remains of
  // sum_j s_ij (1 - t_ijd^2) is little more than the rounding errors of that 0. There dquery leaves
  // out the 1, and notes the sum of s that it left out, and of how many keys.
  float left_out[kGradientQueries];
  int shifted_keys[kGradientQueries];
  Extremes query_extremes[kWarp];
  // Here because registers are scarce.
  Span span;
  int first_key;  // of the block
  int end_key;
  double2 dweight[kThreads];  // sums of s t, a thread's two features
  float room[kWarps];
};

enum class Route { kFactored, kExact, kSmall };

// Some queries of a sequence, a feature chunk, and the keys of the block.
struct Unit {
  const GradientCall& call;
  const Span& span;
  int64_t head;
  int64_t col;
  int query;
  int queries;
  bool first;  // to add to dkey
  bool last;
};

__device__ __forceinline__ void put_granule(float* target, const float (&values)[kGranule]) {
#pragma unroll
  for (int f = 0; f < kGranule; f += 4) {
    *reinterpret_cast<float4*>(target + f) =
        make_float4(values[f], values[f + 1], values[f + 2], values[f + 3]);
  }
}

// Puts exponentials of the unit's queries in place and clears their gradients; returns the largest
// |query|.
__device__ inline float fill_queries(const Unit& unit, Shared& shared) {
  float bound = 0;
#pragma unroll 1
  for (int n = threadIdx.x; n < kGradientQueries * kRowGranules; n += kThreads) {
    const int row = n / kRowGranules;
    const int col = n % kRowGranules * kGranule;
    float values[kGranule] = {};
    if (row < unit.queries) {
      const int64_t offset =
          query_offset(unit.call.problem.query, unit.span, unit.head, unit.query + row);
      load_granule(unit.call.problem.query, offset, unit.col + col, unit.call.problem.dim, values);
    }
    const float zeros[kGranule] = {};
    put_granule(&shared.dquery[row][col], zeros);
#pragma unroll
    for (int f = 0; f < kGranule; ++f) {
      bound = Maximum::of(fabsf(values[f]), bound);
      values[f] = factored_exponential(values[f]);
    }
    put_granule(&shared.query[row][col], values);
  }
  if (threadIdx.x < kGradientQueries) {
    shared.left_out[threadIdx.x] = 0;
    shared.shifted_keys[threadIdx.x] = 0;
  }
  return reduce<Maximum, kThreads>(bound, shared.room);
}

// Puts a tile of keys in place, their exponentials or as they are; returns this thread's largest.
__device__ inline float fill_keys(const Unit& unit, int key, int keys, bool exponentials,
                                  Shared& shared) {
  const int row = threadIdx.x / kRowGranules;
  const int col = threadIdx.x % kRowGranules * kGranule;
  float bound = 0;
  float values[kGranule] = {};
  if (row < keys) {
    const int64_t offset = key_offset(unit.call.problem.key, unit.span, unit.head, key + row);
    load_granule(unit.call.problem.key, offset, unit.col + col, unit.call.problem.dim, values);
  }
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    bound = Maximum::of(fabsf(values[f]), bound);
    values[f] = exponentials ? factored_exponential(values[f]) : values[f];
  }
  put_granule(&shared.key[row][col], values);
  return bound;
}

// Puts s of the unit's queries and a tile's keys in place, 0 elsewhere; returns this thread's sum.
__device__ inline float fill_dscores(const Unit& unit, int key, int keys, Shared& shared) {
  float sum = 0;
#pragma unroll 2
  for (int n = threadIdx.x; n < kGradientQueries * kKeys; n += kThreads) {
    const int i = n / kKeys;
    const int j = n % kKeys;
    float s = 0;
    if (i < unit.queries && j < keys) {
      s = unit.call.dscores
              .data[score_offset(unit.call.dscores, unit.span, unit.head, unit.query + i, key + j)];
    }
    shared.dscores[i][j] = s;
    sum += s;
  }
  return sum;
}

__device__ inline Extremes extremes(const float (*rows)[kGradientFeatures], int count) {
  const int lane = threadIdx.x % kWarp;
  Extremes result;
  result.low = result.high = *reinterpret_cast<const float2*>(&rows[0][2 * lane]);
#pragma unroll 2
  for (int row = 1; row < count; ++row) {
    const float2 value = *reinterpret_cast<const float2*>(&rows[row][2 * lane]);
    result.low = {fminf(result.low.x, value.x), fminf(result.low.y, value.y)};
    result.high = {fmaxf(result.high.x, value.x), fmaxf(result.high.y, value.y)};
  }
  return result;
}

// Whether any of the block's features can inform some query of some key.
__device__ inline bool informative(const Extremes& query, const Extremes& key) {
  return __any_sync(kAllLanes, can_inform(query.low.x * key.low.x, query.high.x * key.high.x) ||
                                   can_inform(query.low.y * key.low.y, query.high.y * key.high.y));
}

// A lane's share of a tile of keys: the keys, their gradients, and the sum for the score weights.
struct LaneTile {
  float2 key[kKeys];
  float2 dkey[kKeys];
  float2 dweight;
};

// Adds what the queries i = warp, warp + kWarps, ... of the unit give, by the factored form:
// dweight gathers s r, the others s (r - r^2).
template <bool kQuery, bool kKey>
__device__ __forceinline__ void add_factored(int queries, Shared& shared, LaneTile& tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int i = threadIdx.x / kWarp; i < queries; i += kWarps) {
    const float2 a = *reinterpret_cast<const float2*>(&shared.query[i][2 * lane]);
    float2* const target = reinterpret_cast<float2*>(&shared.dquery[i][2 * lane]);
    float2 dquery = kQuery ? *target : float2{};
#pragma unroll
    for (int first = 0; first < kKeys; first += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&shared.dscores[i][first]);
      const float s[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = first + n;
        float r0;
        float r1;
        factored_pair(a.x, a.y, tile.key[j].x, tile.key[j].y, r0, r1);
        const float slope0 = fmaf(-r0, r0, r0);
        const float slope1 = fmaf(-r1, r1, r1);
        if constexpr (kQuery) {
          dquery.x = fmaf(s[n], slope0, dquery.x);
          dquery.y = fmaf(s[n], slope1, dquery.y);
        }
        if constexpr (kKey) {
          tile.dkey[j].x = fmaf(s[n], slope0, tile.dkey[j].x);
          tile.dkey[j].y = fmaf(s[n], slope1, tile.dkey[j].y);
          tile.dweight.x = fmaf(s[n], r0, tile.dweight.x);
          tile.dweight.y = fmaf(s[n], r1, tile.dweight.y);
        }
      }
    }
    if constexpr (kQuery) {
      *target = dquery;
    }
  }
}

// The same for any magnitudes, from rows as they are: dweight gathers s t. `small` leaves out the 1
// of dquery's 1 - t^2.
template <bool kQuery, bool kKey>
__device__ inline void add_exact(const Unit& unit, bool small, Shared& shared, LaneTile& tile) {
  const int lane = threadIdx.x % kWarp;
  const Rows& rows = unit.call.problem.query;
  const int64_t col = unit.col + 2 * lane;
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < unit.queries; i += kWarps) {
    const int64_t offset = query_offset(rows, unit.span, unit.head, unit.query + i);
    const int64_t dim = unit.call.problem.dim;
    const float a0 = col < dim ? load(rows, offset + col * rows.col) : 0.0f;
    const float a1 = col + 1 < dim ? load(rows, offset + (col + 1) * rows.col) : 0.0f;
    float2* const target = reinterpret_cast<float2*>(&shared.dquery[i][2 * lane]);
    float2 dquery = *target;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const float s = shared.dscores[i][j];
      const TanhSlope t0 = exact_tanh(a0 + tile.key[j].x);
      const TanhSlope t1 = exact_tanh(a1 + tile.key[j].y);
      if constexpr (kQuery) {
        dquery.x = fmaf(s, small ? -0.25f * t0.tanh * t0.tanh : t0.slope, dquery.x);
        dquery.y = fmaf(s, small ? -0.25f * t1.tanh * t1.tanh : t1.slope, dquery.y);
      }
      if constexpr (kKey) {
        tile.dkey[j].x = fmaf(s, t0.slope, tile.dkey[j].x);
        tile.dkey[j].y = fmaf(s, t1.slope, tile.dkey[j].y);
        tile.dweight.x = fmaf(s, t0.tanh, tile.dweight.x);
        tile.dweight.y = fmaf(s, t1.tanh, tile.dweight.y);
      }
    }
    *target = dquery;
  }
}

__device__ inline float score_weight(const Unit& unit, int64_t col) {
  const Rows& rows = unit.call.problem.score_weight;
  return col < unit.call.problem.dim ? load(rows, unit.head * rows.head + col * rows.col) : 0.0f;
}

// Adds the warps' shares of dkey, in their order, to what earlier tiles of queries left.
__device__ inline void write_keys(const Unit& unit, int key, int keys, const LaneTile& tile,
                                  Shared& shared) {
  const GradientCall& call = unit.call;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();  // everyone has the panel of keys in registers
#pragma unroll
  for (int j = 0; j < kKeys; ++j) {
    *reinterpret_cast<float2*>(&shared.dkey[threadIdx.x / kWarp][j][2 * lane]) = tile.dkey[j];
  }
  __syncthreads();
#pragma unroll 2
  for (int n = threadIdx.x; n < keys * kGradientFeatures; n += kThreads) {
    const int j = n / kGradientFeatures;
    const int f = n % kGradientFeatures;
    if (unit.col + f >= call.problem.dim) {
      continue;
    }
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += shared.dkey[warp][j][f];
    }
    const int64_t at = key_offset(call.dkey_sums, unit.span, unit.head, key + j) + unit.col + f;
    if (!unit.first) {
      sum += load(call.dkey_sums, at);
    }
    if (unit.last) {
      store(call.dkey, key_offset(call.dkey, unit.span, unit.head, key + j) + unit.col + f,
            4 * sum * score_weight(unit, unit.col + f));
    } else {
      store(call.dkey_sums, at, sum);
    }
  }
}

// dquery of the unit: to its place, or as sums over the block's keys that wait for those of other
// blocks.
__device__ inline void write_queries(const Unit& unit, int64_t split, const Shared& shared) {
  const GradientCall& call = unit.call;
  const int64_t dim = call.problem.dim;
  const int64_t rows = call.problem.sequences.last_row - call.problem.sequences.first_row;
#pragma unroll 2
  for (int n = threadIdx.x; n < unit.queries * kGradientFeatures; n += kThreads) {
    const int i = n / kGradientFeatures;
    const int64_t col = unit.col + n % kGradientFeatures;
    if (col >= dim) {
      continue;
    }
    const float sum = 4 * shared.dquery[i][n % kGradientFeatures];
    if (call.partial_dquery == nullptr) {
      const float shift = shared.shifted_keys[i] == unit.span.key_count ? 0.0f : shared.left_out[i];
      store(call.dquery, query_offset(call.dquery, unit.span, unit.head, unit.query + i) + col,
            score_weight(unit, col) * (sum + shift));
      continue;
    }
    const int64_t row =
        ((split * rows + unit.span.flat_row + unit.query + i) * call.problem.heads + unit.head);
    call.partial_dquery[row * dim + col] = sum;
    if (col == unit.col) {
      const int64_t chunks = (dim + kGradientFeatures - 1) / kGradientFeatures;
      call.left_out[row * chunks + unit.col / kGradientFeatures] =
          float2{shared.left_out[i], static_cast<float>(shared.shifted_keys[i])};
    }
  }
}

// Everything that the unit's queries give. Sums of the score weights are continued in double.
template <bool kQuery, bool kKey>
__device__ inline void run_unit(const Unit& unit, Shared& shared) {
  __syncthreads();
  const float query_bound = fill_queries(unit, shared);
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp) {
    shared.query_extremes[lane] = extremes(shared.query, unit.queries);
  }
  for (int key = shared.first_key; key < shared.end_key; key += kKeys) {
    const int keys = smaller(kKeys, shared.end_key - key);
    __syncthreads();
    float key_bound = fill_keys(unit, key, keys, true, shared);
    float s_sum = fill_dscores(unit, key, keys, shared);
    key_bound = reduce<Maximum, kThreads>(key_bound, shared.room);
    s_sum = reduce<Sum, kThreads>(s_sum, shared.room);
    Route route = Route::kExact;
    if (informative(shared.query_extremes[lane], extremes(shared.key, keys)) &&
        in_factored_range(query_bound, key_bound)) {
      route = Route::kFactored;
    } else {
      if (query_bound + key_bound < static_cast<float>(kSmallestMagnitudeSum)) {
        route = Route::kSmall;
      }
      __syncthreads();
      fill_keys(unit, key, keys, false, shared);
      if (route == Route::kSmall && threadIdx.x < kGradientQueries) {
        float left_out = shared.left_out[threadIdx.x];
        for (int j = 0; j < keys; ++j) {
          left_out += shared.dscores[threadIdx.x][j];
        }
        shared.left_out[threadIdx.x] = left_out;
        shared.shifted_keys[threadIdx.x] += keys;
      }
      __syncthreads();
    }
    LaneTile tile{};
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      tile.key[j] = *reinterpret_cast<const float2*>(&shared.key[j][2 * lane]);
    }
    if (route == Route::kFactored) {
      add_factored<kQuery, kKey>(unit.queries, shared, tile);
      // sum s t = sum s - 2 sum s r, of which the first sum is the whole block's.
      const float constant = threadIdx.x < kWarp ? s_sum : 0.0f;
      tile.dweight.x = fmaf(-2.0f, tile.dweight.x, constant);
      tile.dweight.y = fmaf(-2.0f, tile.dweight.y, constant);
    } else {
      add_exact<kQuery, kKey>(unit, route == Route::kSmall, shared, tile);
    }
    if constexpr (kKey) {
      shared.dweight[threadIdx.x].x += static_cast<double>(tile.dweight.x);
      shared.dweight[threadIdx.x].y += static_cast<double>(tile.dweight.y);
    }
    if constexpr (kKey) {
      if (unit.call.dkey.data != nullptr) {
        write_keys(unit, key, keys, tile, shared);
      }
    }
  }
}

// The block's partial sums of dscore_weight, the warps' in their order.
__device__ inline void write_dweight(const GradientCall& call, int64_t head, int64_t col,
                                     const Shared& shared) {
  __syncthreads();
  if (threadIdx.x < kGradientFeatures && col + threadIdx.x < call.problem.dim) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      const double2 pair = shared.dweight[warp * kWarp + threadIdx.x / 2];
      sum += threadIdx.x % 2 == 0 ? pair.x : pair.y;
    }
    const int64_t row = int64_t{blockIdx.x} * call.problem.heads + head;
    call.partial_dweight[row * call.problem.dim + col + threadIdx.x] = static_cast<float>(sum);
  }
}

template <bool kQuery, bool kKey>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(const GradientCall call) {
  __shared__ __align__(16) Shared shared;
  const Sequences& sequences = call.problem.sequences;
  const Tile found = find_key_tile(sequences, call.key_shift, blockIdx.x);
  if (threadIdx.x == 0) {
    const Span span = span_of(sequences, found.sequence);
    const int64_t end = found.first + (int64_t{1} << call.key_shift);
    shared.span = span;
    shared.first_key = static_cast<int>(smaller<int64_t>(found.first, span.key_count));
    shared.end_key = static_cast<int>(smaller<int64_t>(end, span.key_count));
  }
  __syncthreads();
  const Span& span = shared.span;
  for (int64_t head = blockIdx.z; head < call.problem.heads; head += gridDim.z) {
    for (int64_t col = int64_t{blockIdx.y} * kGradientFeatures; col < call.problem.dim;
         col += int64_t{gridDim.y} * kGradientFeatures) {
      __syncthreads();
      shared.dweight[threadIdx.x] = double2{0, 0};
      for (int query = 0; query < span.query_count && shared.first_key < shared.end_key;
           query += kGradientQueries) {
        const int queries = smaller(kGradientQueries, span.query_count - query);
        const Unit unit{call,
                        span,
                        head,
                        col,
                        query,
                        queries,
                        span.first_query + query == 0,
                        span.has_last_query && query + queries == span.query_count};
        run_unit<kQuery, kKey>(unit, shared);
        if constexpr (kQuery) {
          __syncthreads();
          write_queries(unit, found.first >> call.key_shift, shared);
        }
      }
      if (kKey && call.partial_dweight != nullptr) {
        write_dweight(call, head, col, shared);
      }
    }
  }
}

constexpr int kMergeThreads = 256;

// dquery of one query from its partial sums, in the order of the keys.
__global__ void __launch_bounds__(kMergeThreads) merge_dquery_kernel(const GradientCall call) {
  const Problem& problem = call.problem;
  const Tile found = find_query_tile(problem.sequences, 0, blockIdx.x);
  const Span span = span_of(problem.sequences, found.sequence);
  if (found.first >= span.query_count || span.key_count == 0) {
    return;
  }
  const int64_t rows = problem.sequences.last_row - problem.sequences.first_row;
  const int64_t chunks = (problem.dim + kGradientFeatures - 1) / kGradientFeatures;
  for (int64_t head = blockIdx.y; head < problem.heads; head += gridDim.y) {
    for (int64_t col = threadIdx.x; col < problem.dim; col += kMergeThreads) {
      float sum = 0;
      float left_out = 0;
      float shifted_keys = 0;
      for (int64_t split = 0; (split << call.key_shift) < span.key_count; ++split) {
        const int64_t row = (split * rows + span.flat_row + found.first) * problem.heads + head;
        const float2 left = call.left_out[row * chunks + col / kGradientFeatures];
        sum += call.partial_dquery[row * problem.dim + col];
        left_out += left.x;
        shifted_keys += left.y;
      }
      const float shift = shifted_keys == static_cast<float>(span.key_count) ? 0.0f : left_out;
      const float weight = load(problem.score_weight,
                                head * problem.score_weight.head + col * problem.score_weight.col);
      store(call.dquery, query_offset(call.dquery, span, head, found.first) + col,
            weight * (sum + shift));
    }
  }
}

struct MergeWeightCall {
  const float* partial;
  int64_t tiles;
  int64_t heads;
  int64_t dim;
  Rows dscore_weight;
};

// A warp sums 32 features' partial sums in double, 8 interleaved shares that are then added.
__global__ void __launch_bounds__(kMergeThreads) merge_dweight_kernel(const MergeWeightCall call) {
  constexpr int kShares = kMergeThreads / kWarp;
  __shared__ double shares[kShares][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int share = threadIdx.x / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t columns = call.heads * call.dim;
  double sum = 0;
  if (column < columns) {
    for (int64_t tile = share; tile < call.tiles; tile += kShares) {
      sum += static_cast<double>(call.partial[tile * columns + column]);
    }
  }
  shares[share][lane] = sum;
  __syncthreads();
  if (share == 0 && column < columns) {
    for (int n = 1; n < kShares; ++n) {
      sum += shares[n][lane];
    }
    const int64_t head = column / call.dim;
    store(call.dscore_weight,
          head * call.dscore_weight.head + column % call.dim * call.dscore_weight.col,
          static_cast<float>(sum));
  }
}

}  // namespace

void launch_gradient(const GradientCall& call, cudaStream_t stream) {
  const bool query = call.dquery.data != nullptr;
  const bool key = call.dkey.data != nullptr || call.partial_dweight != nullptr;
  const auto kernel = !key    ? gradient_kernel<true, false>
                      : query ? gradient_kernel<true, true>
                              : gradient_kernel<false, true>;
  const Sequences& sequences = call.problem.sequences;
  launch("gradients", kernel, tile_bound(key_rows(sequences), sequences.count, call.key_shift),
         (call.problem.dim + kGradientFeatures - 1) / kGradientFeatures, call.problem.heads,
         kThreads, call, stream);
}

void launch_merge_dquery(const GradientCall& call, cudaStream_t stream) {
  const Sequences& sequences = call.problem.sequences;
  launch("gradient of queries", merge_dquery_kernel,
         tile_bound(sequences.last_row - sequences.first_row, sequences.count, 0),
         call.problem.heads, 1, kMergeThreads, call, stream);
}

void launch_merge_dweight(const float* partial, int64_t tiles, int64_t heads, int64_t dim,
                          const Rows& dscore_weight, cudaStream_t stream) {
  launch("gradient of score weights", merge_dweight_kernel, (heads * dim + kWarp - 1) / kWarp, 1, 1,
         kMergeThreads, MergeWeightCall{partial, tiles, heads, dim, dscore_weight}, stream);
}

}  // namespace cuda
}  // namespace attn_ext
