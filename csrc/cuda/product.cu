// Inner products of all queries' dcontext with all values of their sequence, on tensor cores. A
// block has 32 queries and goes through tiles of 32 keys; its warps share the features.
#include "kernels.h"
#include "launch.cuh"
#include "product.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileShift = 5;
constexpr int kTile = 1 << kTileShift;   // queries, and keys
constexpr int kFeatures = 4 * kGranule;  // a warp's at a time: 4 lanes have a granule each
constexpr int kLd = kTile + 4;

// The sums of this warp's features.
template <int kTerms>
__device__ __forceinline__ void add_features(const BackwardCall& call, const int64_t (&left)[4],
                                             const int64_t (&right)[4], int queries, int keys,
                                             float (&sums)[2][4][4]) {
  const int r = threadIdx.x % kWarp / 4;
  const int64_t first = threadIdx.x / kWarp * kFeatures;
#pragma unroll 1
  for (int64_t begin = first; begin < call.value_dim; begin += kWarps * kFeatures) {
    const int64_t col = begin + threadIdx.x % 4 * kGranule;
    unsigned a[4][kTerms][kGranule / 2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      load_terms(call.dcontext, left[n], col, call.value_dim, 8 * n + r < queries, a[n]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      unsigned b[kTerms][kGranule / 2];
      load_terms(call.value, right[n], col, call.value_dim, 8 * n + r < keys, b);
      // The order of features does not matter as long as both sides have the same.
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int step = m / 2 * 2;
        unsigned x[kTerms][4];
        unsigned y[kTerms][2];
#pragma unroll
        for (int p = 0; p < kTerms; ++p) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            x[p][k] = a[m % 2 * 2 + k % 2][p][step + k / 2];
          }
          y[p][0] = b[p][step];
          y[p][1] = b[p][step + 1];
        }
        multiply_terms(x, y, sums[m % 2][n]);
      }
    }
  }
}

template <int kTerms>
__global__ void __launch_bounds__(kThreads, 3) product_kernel(const BackwardCall call) {
  __shared__ __align__(16) float shared[kWarps][kTile][kLd];
  __shared__ Place place;
  find_place(call.sequences, false, kTileShift, place);
  if (place.count == 0) {
    return;
  }
  const Span& span = place.span;
  const int query = place.first;
  const int queries = place.count;
  const int r = threadIdx.x % kWarp / 4;
  for (int64_t head = blockIdx.z; head < call.heads; head += gridDim.z) {
    int64_t left[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      left[n] = query_offset(call.dcontext, span, head, query + 8 * n + r);
    }
    for (int64_t key = int64_t{blockIdx.y} * kTile; key < span.key_count;
         key += int64_t{gridDim.y} * kTile) {
      const int keys = static_cast<int>(smaller<int64_t>(kTile, span.key_count - key));
      int64_t right[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        right[n] = key_offset(call.value, span, head,
                              static_cast<int>(key) + smaller(8 * n + r, keys - 1));
      }
      float sums[2][4][4] = {};
      add_features<kTerms>(call, left, right, queries, keys, sums);
      __syncthreads();
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const float (&own)[4] = sums[n / 8][n / 2 % 4];
        *reinterpret_cast<float2*>(&shared[threadIdx.x / kWarp][n / 8 * 16 + n % 2 * 8 + r]
                                          [n / 2 % 4 * 8 + threadIdx.x % 4 * 2]) =
            make_float2(own[n % 2 * 2], own[n % 2 * 2 + 1]);
      }
      __syncthreads();
      const int j = threadIdx.x % kTile;
      for (int i = threadIdx.x / kTile; i < queries && j < keys; i += kThreads / kTile) {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
          sum += shared[warp][i][j];
        }
        score_row(call.dscores, span, head, query + i)[key + j] = sum;
      }
    }
  }
}

}  // namespace

void launch_product(const BackwardCall& call, cudaStream_t stream) {
  const int terms = std::max(terms_of(call.dcontext.dtype), terms_of(call.value.dtype));
  launch_pairs("inner products",
               terms == 1   ? product_kernel<1>
               : terms == 2 ? product_kernel<2>
                            : product_kernel<3>,
               kTileShift, kThreads, call, stream);
}

}  // namespace attn_ext::cuda
