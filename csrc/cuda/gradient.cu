// The gradient phase: from s = alpha (dalpha - delta) to dquery, dkey and dscore_weight. With t =
// tanh(q + k):
//   dquery_id = w_d sum_j s_ij (1 - t_ijd^2),  dkey_jd = w_d sum_i s_ij (1 - t_ijd^2),
//   dscore_weight_d = sum_ij s_ij t_ijd.
// A block has 64 features, two a lane, of a range of keys, against all queries of their sequence.
// 16 keys are held in registers with their gradients; the block's 4 warps share the queries, whose
// gradients stay in shared memory. Each t is computed once for all three sums, which are added in a
// fixed order.
#include "gradient_tile.cuh"
#include "launch.cuh"

namespace attn_ext {
namespace cuda {
namespace {

enum class Route { kFactored, kExact, kSmall };

__device__ __forceinline__ void put_granule(float* target, const float (&values)[kGranule]) {
#pragma unroll
  for (int f = 0; f < kGranule; f += 4) {
    *reinterpret_cast<float4*>(target + f) =
        make_float4(values[f], values[f + 1], values[f + 2], values[f + 3]);
  }
}

// Puts exponentials of the unit's queries in place and clears their gradients; leaves the largest
// |query| of each warp.
__device__ inline void fill_queries(const Unit& unit, Shared& shared) {
  const Problem& problem = unit.call.problem;
  const int col = threadIdx.x % kRowGranules * kGranule;
  float bound = 0;
#pragma unroll 1
  for (int row = threadIdx.x / kRowGranules; row < unit.queries; row += kThreads / kRowGranules) {
    float values[kGranule];
    load_granule(problem.query, shared.queries[unit.query + row], unit.col + col, problem.dim,
                 values);
    const float zeros[kGranule] = {};
    put_granule(&shared.dquery[row][col], zeros);
    exponentiate(problem.is_short, values, bound);
    put_granule(&shared.query[row][col], values);
  }
  if (threadIdx.x < kGradientQueries) {
    shared.left_out[threadIdx.x] = 0;
    shared.shifted_keys[threadIdx.x] = 0;
  }
  bound = reduce_warp<Maximum>(bound);
  if (threadIdx.x % kWarp == 0) {
    shared.query_room[threadIdx.x / kWarp] = bound;
  }
}

// Puts a tile of keys in place, their exponentials or as they are, 0 for those past the last;
// returns this thread's largest.
__device__ inline float fill_keys(const Unit& unit, int key, int keys, bool exponentials,
                                  Shared& shared) {
  const Problem& problem = unit.call.problem;
  const int row = threadIdx.x / kRowGranules;
  const int col = threadIdx.x % kRowGranules * kGranule;
  float bound = 0;
  float values[kGranule] = {};
  if (row < keys) {
    load_granule(problem.key, shared.keys[key + row], unit.col + col, problem.dim, values);
  }
  if (exponentials) {
    exponentiate(problem.is_short, values, bound);
  }
  put_granule(&shared.key[row][col], values);
  return bound;
}

// Puts s of the unit's queries and a tile's keys in place, 0 for keys past the last.
__device__ inline void fill_dscores(const Unit& unit, int key, int keys, Shared& shared) {
  const Scores& dscores = unit.call.dscores;
  const int j = threadIdx.x % kKeys;
  const int first = threadIdx.x / kKeys;
  const float* source = dscores.data;
  if (j < keys) {
    source = &shared.first_dscores[key + j] + (unit.query + first) * dscores.query;
  }
#pragma unroll 2
  for (int i = first; i < unit.queries; i += kThreads / kKeys) {
    shared.dscores[i][j] = j < keys ? *source : 0.0f;
    source += kThreads / kKeys * dscores.query;
  }
}

__device__ inline float largest_of(const float (&room)[kWarps]) {
  return Maximum::of(Maximum::of(room[0], room[1]), Maximum::of(room[2], room[3]));
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

// Multiplies a granule of sums by 4 w.
__device__ __forceinline__ void weigh(const Shared& shared, int col, float (&values)[kGranule]) {
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    values[f] *= shared.weight[col + f];
  }
}

// Adds the warps' shares of dkey, in their order, to what earlier tiles of queries left.
__device__ inline void write_keys(const Unit& unit, int key, int keys, const LaneTile& tile,
                                  Shared& shared) {
  const GradientCall& call = unit.call;
  const int64_t dim = call.problem.dim;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();  // everyone has the panel of keys in registers
#pragma unroll
  for (int j = 0; j < kKeys; ++j) {
    *reinterpret_cast<float2*>(&shared.dkey[threadIdx.x / kWarp][j][2 * lane]) = tile.dkey[j];
  }
  __syncthreads();
  const int j = threadIdx.x / kRowGranules;
  const int col = threadIdx.x % kRowGranules * kGranule;
  if (j >= keys || unit.col + col >= dim) {
    return;
  }
  float sums[kGranule] = {};
  if (!unit.first) {
    const int64_t at = key_offset(call.dkey_sums, unit.span, unit.head, key + j);
    add_sums(call.dkey_sums, at, unit.col + col, dim, sums);
  }
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    add_granule(&shared.dkey[warp][j][col], sums);
  }
  if (unit.last) {
    weigh(shared, col, sums);
    store_granule(call.dkey, shared.dkeys[key + j], unit.col + col, dim, sums);
  } else {
    const int64_t at = key_offset(call.dkey_sums, unit.span, unit.head, key + j);
    store_granule(call.dkey_sums, at, unit.col + col, dim, sums);
  }
}

// dquery of the unit: to its place, or as sums over the block's keys that wait for those of other
// blocks.
__device__ inline void write_queries(const Unit& unit, const Shared& shared) {
  const GradientCall& call = unit.call;
  const int64_t dim = call.problem.dim;
  const int col = threadIdx.x % kRowGranules * kGranule;
  if (unit.col + col >= dim) {
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x / kRowGranules; i < unit.queries; i += kThreads / kRowGranules) {
    float sums[kGranule] = {};
    add_granule(&shared.dquery[i][col], sums);
    if (call.partial_dquery.data != nullptr) {
      const Rows& rows = call.partial_dquery;
      const int64_t row = unit.span.flat_row + unit.query + i;
      const int64_t at = (shared.place.first >> call.key_shift) * rows.batch + row * rows.row +
                         unit.head * rows.head;
      store_granule(rows, at, unit.col + col, dim, sums);
      if (col == 0) {
        const int64_t chunks = (dim + kGradientFeatures - 1) / kGradientFeatures;
        call.left_out[at / dim * chunks + unit.col / kGradientFeatures] =
            float2{shared.left_out[i], static_cast<float>(shared.shifted_keys[i])};
      }
      continue;
    }
    if (shared.shifted_keys[i] != unit.span.key_count) {
#pragma unroll
      for (int f = 0; f < kGranule; ++f) {
        sums[f] += 0.25f * shared.left_out[i];
      }
    }
    weigh(shared, col, sums);
    store_granule(call.dquery, shared.dqueries[unit.query + i], unit.col + col, dim, sums);
  }
}

// The factored form with as few groups of four keys as hold the tile.
template <bool kQuery, bool kKey>
__device__ __forceinline__ void add_factored(int queries, int keys, Shared& shared,
                                             LaneTile& tile) {
  if (keys > 12) {
    add_factored<kQuery, kKey, 16>(queries, shared, tile);
  } else if (keys > 8) {
    add_factored<kQuery, kKey, 12>(queries, shared, tile);
  } else if (keys > 4) {
    add_factored<kQuery, kKey, 8>(queries, shared, tile);
  } else {
    add_factored<kQuery, kKey, 4>(queries, shared, tile);
  }
}

// Everything that the unit's queries give. Sums of the score weights are continued in double.
template <bool kQuery, bool kKey>
__device__ inline void run_unit(const Unit& unit, Shared& shared) {
  __syncthreads();
  fill_queries(unit, shared);
  __syncthreads();
  const float query_bound = largest_of(shared.query_room);
  const bool is_short = unit.call.problem.is_short;
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp && !is_short) {
    shared.query_extremes[lane] = extremes(shared.query, unit.queries);
  }
  const int first_key = shared.place.first;
  const int end_key = static_cast<int>(
      smaller<int64_t>(unit.span.key_count, first_key + (int64_t{1} << unit.call.key_shift)));
  for (int key = first_key; key < end_key; key += kKeys) {
    const int keys = smaller(kKeys, end_key - key);
    __syncthreads();
    float key_bound = reduce_warp<Maximum>(fill_keys(unit, key, keys, true, shared));
    fill_dscores(unit, key, keys, shared);
    if (lane == 0) {
      shared.key_room[threadIdx.x / kWarp] = key_bound;
    }
    __syncthreads();
    key_bound = largest_of(shared.key_room);
    Route route = Route::kExact;
    // A lone query waits for memory, not for arithmetic.
    if (!unit.call.one_step && in_factored_range(query_bound, key_bound, kSmallestGradientSum) &&
        (is_short || informative(shared.query_extremes[lane], extremes(shared.key, keys)))) {
      route = Route::kFactored;
    } else {
      if (query_bound + key_bound < static_cast<float>(kSmallestMagnitudeSum) &&
          !unit.call.problem.raw_scores) {  // whose s need not sum to 0
        route = Route::kSmall;
      }
      __syncthreads();
      fill_keys(unit, key, keys, false, shared);
      if (route == Route::kSmall && static_cast<int>(threadIdx.x) < unit.queries) {
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
      add_factored<kQuery, kKey>(unit.queries, keys, shared, tile);
      tile.dweight.x *= -2.0f;  // tanh = -2h
      tile.dweight.y *= -2.0f;
    } else {
      add_exact<kQuery, kKey>(unit, route == Route::kSmall, shared, tile);
    }
    if constexpr (kKey) {
      shared.dweight[threadIdx.x].x += static_cast<double>(tile.dweight.x);
      shared.dweight[threadIdx.x].y += static_cast<double>(tile.dweight.y);
      if (unit.call.dkey.data != nullptr) {
        write_keys(unit, key, keys, tile, shared);
      }
    }
  }
}

// The block's partial sums of dscore_weight, the warps' in their order. Waves after the first add
// to what the ones before left, which the same block of each does in the order of the stream.
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
    float& partial = call.partial_dweight[row * call.problem.dim + col + threadIdx.x];
    if (call.problem.sequences.first_row > 0) {
      sum += static_cast<double>(partial);
    }
    partial = static_cast<float>(sum);
  }
}

template <bool kQuery, bool kKey>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(const GradientCall call) {
  __shared__ __align__(16) Shared shared;
  find_place(call.problem.sequences, true, call.key_shift, shared.place);
  const Span& span = shared.place.span;
  for (int64_t head = blockIdx.z; head < call.problem.heads; head += gridDim.z) {
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.queries = query_offsets(call.problem.query, span, head);
      shared.dqueries = query_offsets(call.dquery, span, head);
      shared.keys = key_offsets(call.problem.key, span, head);
      shared.dkeys = key_offsets(call.dkey, span, head);
      shared.first_dscores = score_row(call.dscores, span, head, 0);
    }
    for (int64_t col = int64_t{blockIdx.y} * kGradientFeatures; col < call.problem.dim;
         col += int64_t{gridDim.y} * kGradientFeatures) {
      __syncthreads();
      shared.dweight[threadIdx.x] = double2{0, 0};
      if (threadIdx.x < kGradientFeatures) {
        const Rows& rows = call.problem.score_weight;
        const int64_t feature = col + threadIdx.x;
        shared.weight[threadIdx.x] =
            feature < call.problem.dim ? 4 * load(rows, head * rows.head + feature * rows.col) : 0;
      }
      for (int query = 0; query < span.query_count && !shared.place.is_empty(true);
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
          write_queries(unit, shared);
        }
      }
      if (kKey && call.partial_dweight != nullptr) {
        write_dweight(call, head, col, shared);
      }
    }
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

}  // namespace cuda
}  // namespace attn_ext
