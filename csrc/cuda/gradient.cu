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

// Puts s of the unit's queries and a tile's keys in place, 0 elsewhere.
__device__ inline void fill_dscores(const Unit& unit, int key, int keys, Shared& shared) {
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
  }
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
__device__ inline void write_queries(const Unit& unit, const Shared& shared) {
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
        ((shared.split * rows + unit.span.flat_row + unit.query + i) * call.problem.heads +
         unit.head);
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
    // A lone query waits for memory, not for arithmetic: nothing informs, which is the exact route.
    shared.query_extremes[lane] =
        unit.call.one_step ? Extremes{} : extremes(shared.query, unit.queries);
  }
  for (int key = shared.first_key; key < shared.end_key; key += kKeys) {
    const int keys = smaller(kKeys, shared.end_key - key);
    __syncthreads();
    float key_bound = fill_keys(unit, key, keys, true, shared);
    fill_dscores(unit, key, keys, shared);
    key_bound = reduce<Maximum, kThreads>(key_bound, shared.room);
    Route route = Route::kExact;
    if (informative(shared.query_extremes[lane], extremes(shared.key, keys)) &&
        in_factored_range(query_bound, key_bound, kSmallestGradientSum)) {
      route = Route::kFactored;
    } else {
      if (query_bound + key_bound < static_cast<float>(kSmallestMagnitudeSum) &&
          !unit.call.problem.raw_scores) {  // whose s need not sum to 0
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
  const Sequences& sequences = call.problem.sequences;
  const Tile found = find_key_tile(sequences, call.key_shift, blockIdx.x);
  if (threadIdx.x == 0) {
    const Span span = span_of(sequences, found.sequence);
    const int64_t end = found.first + (int64_t{1} << call.key_shift);
    shared.span = span;
    shared.split = static_cast<int>(found.first >> call.key_shift);
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
