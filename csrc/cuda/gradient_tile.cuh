// The inner loops of the gradient kernel (see gradient.cu): a tile of keys against the queries of
// one warp, by the factored form or exactly.
#pragma once

#include "kernels.h"
#include "memory.cuh"

namespace attn_ext {
namespace cuda {

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
  float weight[kGradientFeatures];                    // 4 w
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
  Place place;
  RowOffsets queries;
  RowOffsets dqueries;
  RowOffsets keys;
  RowOffsets dkeys;
  ScoreRow first_dscores;     // of query 0
  double2 dweight[kThreads];  // sums of s t, a thread's two features
  float query_room[kWarps];
  float key_room[kWarps];
};

// Some queries of a sequence and head, and a chunk of features, to meet the keys of the block.
struct Unit {
  const GradientCall& call;
  const Span& span;
  int64_t head;
  int64_t col;  // of the first feature
  int query;    // the first, of the span's
  int queries;
  bool first;  // to add to dkey
  bool last;
};

// A lane's share of a tile of keys: the keys, their gradients, and the sum for the score weights.
struct LaneTile {
  float2 key[kKeys];
  float2 dkey[kKeys];
  float2 dweight;
};

// Adds what the queries i = warp, warp + kWarps, ... of the unit give with the first keys of the
// tile, by the factored form: dweight gathers s h, the others s (1/4 - h^2).
template <bool kQuery, bool kKey, int kTileKeys>
__device__ __forceinline__ void add_factored(int queries, Shared& shared, LaneTile& tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int i = threadIdx.x / kWarp; i < queries; i += kWarps) {
    const float2 a = *reinterpret_cast<const float2*>(&shared.query[i][2 * lane]);
    float2* const target = reinterpret_cast<float2*>(&shared.dquery[i][2 * lane]);
    float2 dquery = kQuery ? *target : float2{};
#pragma unroll
    for (int first = 0; first < kTileKeys; first += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&shared.dscores[i][first]);
      const float s[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = first + n;
        float h0;
        float h1;
        factored_pair(a.x, a.y, tile.key[j].x, tile.key[j].y, h0, h1);
        const float slope0 = fmaf(-h0, h0, 0.25f);
        const float slope1 = fmaf(-h1, h1, 0.25f);
        if constexpr (kQuery) {
          dquery.x = fmaf(s[n], slope0, dquery.x);
          dquery.y = fmaf(s[n], slope1, dquery.y);
        }
        if constexpr (kKey) {
          tile.dkey[j].x = fmaf(s[n], slope0, tile.dkey[j].x);
          tile.dkey[j].y = fmaf(s[n], slope1, tile.dkey[j].y);
          tile.dweight.x = fmaf(s[n], h0, tile.dweight.x);
          tile.dweight.y = fmaf(s[n], h1, tile.dweight.y);
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

}  // namespace cuda
}  // namespace attn_ext
