// The gradient phase: from s = alpha (dalpha - delta) to dquery, dkey and dscore_weight. With t =
// tanh(q + k):
//   dquery_id = w_d sum_j s_ij (1 - t_ijd^2),  dkey_jd = w_d sum_i s_ij (1 - t_ijd^2),
//   dscore_weight_d = sum_ij s_ij t_ijd.
// A block is a warp. It has 64 features, two a lane, of a range of keys, and keeps a panel of them
// and their gradients in registers while it goes through the queries of their sequence. So each t
// is computed once for all three sums, none of which crosses lanes; those of a query wait in memory
// for the next panel.
#include <type_traits>

#include "kernels.h"
#include "launch.cuh"
#include "product.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kKeys = kGradientKeys;  // a panel's, at most
constexpr int kGroup = 4;  // keys whose s is one load: a panel is worked on up to a multiple of it
// After as many queries sums of the score weights are continued in double.
constexpr int kFewQueries = 8;
static_assert(kGradientFeatures == 2 * kWarp && kKeys <= kWarp);

// A warp's keys of one sequence and head, and its features: a lane has `col` and `col` + 32.
struct Slice {
  const BackwardCall& call;
  const Span& span;
  int64_t head;
  int64_t col;
  bool exists[2];
};

// Whether products with s are bfloat16's, on tensor cores.
template <class T>
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kPacked = std::is_same_v<T, __nv_bfloat16>;
#else
constexpr bool kPacked = false;
#endif

template <class T>
struct Shared {
  // s of a query, and in turn of the next one.
  std::conditional_t<kPacked<T>, T, float> dscores[2][kWarp];
  int64_t keys[kKeys];   // where the panel's rows of key are, past the last one that is repeated
  int64_t dkeys[kKeys];  // and of dkey
  Place place;
  // Each lane's own, here because registers are scarce.
  float weight[2][kWarp];    // -4 w
  double dweight[2][kWarp];  // sums of s t
  float low[2][kWarp];       // extremes of the keys' exponentials, where that is asked
  float high[2][kWarp];
};

// Inputs of 16 bits err more than the factored form does, if nothing overflows and keys are not
// next to nothing.
template <class T>
constexpr bool kGuarded = sizeof(T) == 4;

// A panel of keys, exponentiated, and what decides whether queries meet them in the factored form.
struct KeyPanel {
  int first;
  int count;
  float keys[kKeys][2];
  float bound;    // the largest |key| of the warp's features
  bool factored;  // whether any query may
};

// Both features of a row, from that of a lane's first one on.
template <class T>
__device__ __forceinline__ void load_pair(const Slice& slice, const T* row, float (&values)[2]) {
  values[0] = slice.exists[0] ? as_float(row[0]) : 0.0f;
  values[1] = slice.exists[1] ? as_float(row[kWarp]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_pair(const Slice& slice, T* row, float first, float second) {
  if (slice.exists[0]) {
    put(row, first);
  }
  if (slice.exists[1]) {
    put(row + kWarp, second);
  }
}

template <class T>
__device__ __forceinline__ void load_keys(const Slice& slice, Shared<T>& shared, KeyPanel& panel) {
  panel.bound = 0;
#pragma unroll
  for (int first = 0; first < kKeys && first < panel.count; first += kGroup) {
#pragma unroll
    for (int j = first; j < first + kGroup; ++j) {
      load_pair(slice, static_cast<const T*>(slice.call.key.data) + slice.col + shared.keys[j],
                panel.keys[j]);
    }
#pragma unroll
    for (int j = first; j < first + kGroup; ++j) {
      exponentiate<kGuarded<T>>(panel.keys[j], panel.bound);
    }
    if constexpr (kGuarded<T>) {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        float low = first > 0 ? shared.low[f][threadIdx.x] : INFINITY;
        float high = first > 0 ? shared.high[f][threadIdx.x] : 0;
#pragma unroll
        for (int j = first; j < first + kGroup; ++j) {
          low = fminf(low, panel.keys[j][f]);
          high = fmaxf(high, panel.keys[j][f]);
        }
        shared.low[f][threadIdx.x] = low;
        shared.high[f][threadIdx.x] = high;
      }
    }
  }
  panel.bound = reduce_warp<Maximum>(panel.bound);
  // One query waits for memory, not for arithmetic.
  panel.factored = !slice.call.few_queries && panel.bound <= FactoredRange<float>::kLargest &&
                   (kGuarded<T> || panel.bound >= static_cast<float>(kSmallestRoughSum));
}

// Whether a query of this exponential and magnitude meets the keys in the factored form: nothing
// overflows, and of inputs that are not of 16 bits some feature can inform.
template <class T>
__device__ __forceinline__ bool is_factored(const KeyPanel& panel, const Shared<T>& shared,
                                            const float (&query)[2], float bound) {
  if (!panel.factored || __any_sync(kAllLanes, !(bound <= FactoredRange<float>::kLargest))) {
    return false;
  }
  if constexpr (kGuarded<T>) {
    bool informs = false;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      informs |=
          can_inform(query[f] * shared.low[f][threadIdx.x], query[f] * shared.high[f][threadIdx.x]);
    }
    return __any_sync(kAllLanes, informs) &&
           __any_sync(kAllLanes, bound + panel.bound >= static_cast<float>(kSmallestGradientSum));
  }
  return true;
}

// What queries gather of a lane's features: h = -t / 2 times s for dweight, and h^2 - 1/4 =
// -(1 - t^2) / 4 times s for each key, and for dquery. In fours as products on tensor cores have
// them: of the first feature for an even key, then for an odd one, and so of the second feature.
struct Sums {
  float dkeys[kKeys / 2][4];
  float dweight[4];

  __device__ __forceinline__ float& dkey(int j, int f) { return dkeys[j / 2][2 * f + j % 2]; }
};

// Adds what a query gives with the keys of a panel, in the factored form, to a query's sums and
// those of the keys.
template <bool kQuery, bool kKey>
__device__ __forceinline__ void add_factored(const KeyPanel& panel, const float (&query)[2],
                                             const float* dscores, float (&dquery)[2], Sums& sums) {
#pragma unroll
  for (int first = 0; first < kKeys && first < panel.count; first += kGroup) {
    const float4 four = *reinterpret_cast<const float4*>(dscores + first);
    const float s[kGroup] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      const int j = first + n;
      float h[2];
      factored_pair(query[0], query[1], panel.keys[j][0], panel.keys[j][1], h[0], h[1]);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const float slope = fmaf(h[f], h[f], -0.25f);
        if constexpr (kQuery) {
          dquery[f] = fmaf(s[n], slope, dquery[f]);
        }
        if constexpr (kKey) {
          float& dweight = sums.dweight[2 * f + n % 2];
          sums.dkey(j, f) = fmaf(s[n], slope, sums.dkey(j, f));
          dweight = fmaf(s[n], h[f], dweight);
        }
      }
    }
  }
}

// The same by products of a matrix A [16, 8] with a diagonal B [8, 8] on tensor cores, so that no
// number meets that of another lane: lane 4 r + c has rows r, its first feature, and r + 8, its
// second, at columns 2 c, an even key, and 2 c + 1, an odd key. B has s of the two, of which
// `share` is the lane's.
template <bool kQuery, bool kKey>
__device__ __forceinline__ void add_factored(const KeyPanel& panel, const float (&query)[2],
                                             const __nv_bfloat16* dscores, float (&dquery)[2],
                                             Sums& sums) {
  const unsigned column = threadIdx.x / 4;
  const unsigned half = column % 2 == 0 ? 0xffffu : 0xffff0000u;
  const unsigned share = column / 2 == threadIdx.x % 4 ? half : 0;
  float own[4] = {};
#pragma unroll
  for (int first = 0; first < kKeys && first < panel.count; first += kGroup) {
    const uint2 words = *reinterpret_cast<const uint2*>(dscores + first);
#pragma unroll
    for (int j = first; j < first + kGroup; j += 2) {
      const unsigned s = (j == first ? words.x : words.y) & share;
      float even[2];
      float odd[2];
      factored_pair(query[0], query[1], panel.keys[j][0], panel.keys[j][1], even[0], even[1]);
      factored_pair(query[0], query[1], panel.keys[j + 1][0], panel.keys[j + 1][1], odd[0], odd[1]);
      const unsigned h[2] = {bfloat16_pair(even[0], odd[0]), bfloat16_pair(even[1], odd[1])};
      const unsigned slopes[2] = {packed_slopes(h[0]), packed_slopes(h[1])};
      if constexpr (kQuery) {
        multiply(slopes, s, own);
      }
      if constexpr (kKey) {
        multiply(slopes, s, sums.dkeys[j / 2]);
        multiply(h, s, sums.dweight);
      }
    }
  }
  dquery[0] += own[0] + own[1];
  dquery[1] += own[2] + own[3];
}

// The same for any magnitudes, from rows as they are.
template <class T, bool kQuery, bool kKey>
__device__ __forceinline__ void add_exact(const Slice& slice, const Shared<T>& shared, int count,
                                          const float (&query)[2], int turn, float (&dquery)[2],
                                          Sums& sums) {
#pragma unroll
  for (int j = 0; j < kKeys && j < count; ++j) {
    const float s = as_float(shared.dscores[turn][j]);
    float key[2];
    load_pair(slice, static_cast<const T*>(slice.call.key.data) + slice.col + shared.keys[j], key);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const TanhSlope parts = exact_tanh(query[f] + key[f]);
      if constexpr (kQuery) {
        dquery[f] = fmaf(-s, parts.slope, dquery[f]);
      }
      if constexpr (kKey) {
        float& dweight = sums.dweight[2 * f + j % 2];
        sums.dkey(j, f) = fmaf(-s, parts.slope, sums.dkey(j, f));
        dweight = fmaf(s, -0.5f * parts.tanh, dweight);
      }
    }
  }
}

// Stores the panel's dkey, or what later waves of queries add to.
template <class T>
__device__ __forceinline__ void write_keys(const Slice& slice, const Shared<T>& shared, int count,
                                           Sums& gathered) {
  const BackwardCall& call = slice.call;
#pragma unroll
  for (int j = 0; j < kKeys && j < count; ++j) {
    float* const sums = static_cast<float*>(call.dkey_sums.data) + slice.col + shared.dkeys[j];
    float own[2] = {gathered.dkey(j, 0), gathered.dkey(j, 1)};
    if (slice.span.first_query > 0) {
      float before[2];
      load_pair(slice, sums, before);
      own[0] += before[0];
      own[1] += before[1];
    }
    if (slice.span.has_last_query) {
      store_pair(slice, static_cast<T*>(call.dkey.data) + slice.col + shared.dkeys[j],
                 shared.weight[0][threadIdx.x] * own[0], shared.weight[1][threadIdx.x] * own[1]);
    } else {
      store_pair(slice, sums, own[0], own[1]);
    }
  }
}

// All that a panel of keys gives. Of the block's panels the first starts the sums of queries, which
// the last ends, unless other blocks have keys of the sequence too.
template <class T, bool kQuery, bool kKey>
__device__ __forceinline__ void run_panel(const Slice& slice, KeyPanel& panel, bool starts,
                                          bool ends, Shared<T>& shared) {
  const BackwardCall& call = slice.call;
  const Span& span = slice.span;
  const int lane = threadIdx.x;
  const int own_key = panel.first + smaller(lane, panel.count - 1);
  __syncthreads();
  if (lane < kKeys) {
    shared.keys[lane] = key_offset(call.key, span, slice.head, own_key);
    shared.dkeys[lane] = key_offset(call.dkey, span, slice.head, own_key);
  }
  __syncthreads();
  load_keys<T>(slice, shared, panel);
  Sums gathered{};
  const float* dscores = &score_row(call.dscores, span, slice.head, 0)[own_key];
  const Rows& rows = call.dquery_sums;
  float* sums = static_cast<float*>(rows.data) + (panel.first >> call.key_shift) * rows.batch +
                span.flat_row * rows.row + slice.head * rows.head + slice.col;
  const T* query_row = static_cast<const T*>(call.query.data) + slice.col +
                       query_offset(call.query, span, slice.head, 0);
  T* dquery_row = static_cast<T*>(call.dquery.data) + slice.col +
                  query_offset(call.dquery, span, slice.head, 0);
  const int queries = span.query_count;
#pragma unroll 1
  for (int i = 0; i < queries; ++i) {
    put(&shared.dscores[i % 2][lane], lane < panel.count ? *dscores : 0.0f);
    float query[2];
    load_pair(slice, query_row, query);
    float dquery[2] = {};
    if (kQuery && !starts) {
      load_pair(slice, sums, dquery);
    }
    __syncthreads();
    float exponentials[2] = {query[0], query[1]};
    float bound = 0;
    exponentiate<kGuarded<T>>(exponentials, bound);
    if (is_factored(panel, shared, exponentials, bound)) {
      add_factored<kQuery, kKey>(panel, exponentials, shared.dscores[i % 2], dquery, gathered);
    } else {
      add_exact<T, kQuery, kKey>(slice, shared, panel.count, query, i % 2, dquery, gathered);
    }
    if (kQuery && ends) {
      store_pair(slice, dquery_row, shared.weight[0][threadIdx.x] * dquery[0],
                 shared.weight[1][threadIdx.x] * dquery[1]);
    } else if (kQuery) {
      store_pair(slice, sums, dquery[0], dquery[1]);
    }
    if (kKey && (i % kFewQueries == kFewQueries - 1 || i == queries - 1)) {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        float* const own = &gathered.dweight[2 * f];
        shared.dweight[f][lane] -= 2.0 * static_cast<double>(own[0] + own[1]);
        own[0] = own[1] = 0;
      }
    }
    dscores += call.dscores.rows.row;
    query_row += call.query.row;
    dquery_row += call.dquery.row;
    sums += rows.row;
  }
  if constexpr (kKey) {
    if (call.dkey.data != nullptr) {
      write_keys<T>(slice, shared, panel.count, gathered);
    }
  }
}

// The block's partial sums of dscore_weight. Waves after the first add to what the ones before
// left, which the same block of each does in the order of the stream.
template <class T>
__device__ inline void write_dweight(const Slice& slice, const Shared<T>& shared) {
  const BackwardCall& call = slice.call;
  const int64_t row = int64_t{blockIdx.x} * call.heads + slice.head;
  for (int f = 0; f < 2 && slice.exists[f]; ++f) {
    float& partial = call.partial_dweight[row * call.dim + slice.col + f * kWarp];
    const bool adds = call.sequences.first_row > 0;
    const double sum = shared.dweight[f][threadIdx.x];
    partial = static_cast<float>(adds ? sum + static_cast<double>(partial) : sum);
  }
}

template <class T, bool kQuery, bool kKey>
__global__ void __launch_bounds__(kWarp, 12) gradient_kernel(const BackwardCall call) {
  __shared__ __align__(16) Shared<T> shared;
  find_place(call.sequences, true, call.key_shift, shared.place);
  const Span& span = shared.place.span;
  const Rows& weights = call.score_weight;
  const int keys = span.query_count > 0 ? shared.place.count : 0;
  // Panels of about as many keys each, in whole groups.
  const int panels = (keys + kKeys - 1) / kKeys;
  const int step = panels > 0 ? ((keys + panels - 1) / panels + kGroup - 1) / kGroup * kGroup : 1;
  for (int64_t head = blockIdx.z; head < call.heads; head += gridDim.z) {
    for (int64_t chunk = blockIdx.y; chunk * kGradientFeatures < call.dim; chunk += gridDim.y) {
      Slice slice{call, span, head, chunk * kGradientFeatures + threadIdx.x, {}};
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const int64_t col = slice.col + f * kWarp;
        slice.exists[f] = col < call.dim;
        shared.weight[f][threadIdx.x] =
            slice.exists[f] ? -4 * load(weights, head * weights.head + col) : 0.0f;
        shared.dweight[f][threadIdx.x] = 0;
      }
#pragma unroll 1
      for (int key = 0; key < keys; key += step) {
        KeyPanel panel;
        panel.first = shared.place.first + key;
        panel.count = smaller(step, keys - key);
        run_panel<T, kQuery, kKey>(slice, panel, key == 0, !call.merges && key + step >= keys,
                                   shared);
      }
      if (kKey && call.partial_dweight != nullptr) {
        write_dweight(slice, shared);
      }
    }
  }
}

template <class T>
void launch_gradient_of(const BackwardCall& call, cudaStream_t stream) {
  const bool query = call.dquery.data != nullptr;
  const bool key = call.dkey.data != nullptr || call.partial_dweight != nullptr;
  const auto kernel = !key    ? gradient_kernel<T, true, false>
                      : query ? gradient_kernel<T, true, true>
                              : gradient_kernel<T, false, true>;
  const Sequences& sequences = call.sequences;
  launch("gradients", kernel, tile_count(sequences, true, call.key_shift),
         (call.dim + kGradientFeatures - 1) / kGradientFeatures, call.heads, kWarp, call, stream);
}

}  // namespace

void launch_gradient(const BackwardCall& call, cudaStream_t stream) {
  switch (call.key.dtype) {
    case DType::kFloat16:
      return launch_gradient_of<__half>(call, stream);
    case DType::kBFloat16:
      return launch_gradient_of<__nv_bfloat16>(call, stream);
    default:
      return launch_gradient_of<float>(call, stream);
  }
}

}  // namespace attn_ext::cuda
