// Hidden rows of pooling: h = tanh(k), or with a gate tanh(k) sigmoid(g), and their derivatives.
#pragma once

#include "kernels.h"
#include "memory.cuh"

namespace attn_ext::cuda {

// The keys of a sequence and head.
struct Bag {
  const ForwardCall& call;
  const Span& span;
  int64_t head;
};

// Multiplies by 0, or by the scale of what is kept: feature d takes word d % 4 of Philox with the
// counter (key position, d / 4, ~(2 head + factor), sequence), as on every backend.
__device__ inline void drop_features(const Dropout& dropout, int factor, const Bag& bag, int key,
                                     int64_t col, float (&factors)[kGranule]) {
  const auto threshold = static_cast<uint32_t>(ceil(dropout.threshold));
  const float scale = static_cast<float>(dropout.keep_scale);
  static_assert(kGranule % 4 == 0);
#pragma unroll
  for (int group = 0; group < kGranule / 4; ++group) {
    uint32_t c[4] = {
        static_cast<uint32_t>(bag.span.position(key)), static_cast<uint32_t>(col / 4 + group),
        ~static_cast<uint32_t>(2 * bag.head + factor), static_cast<uint32_t>(bag.span.number)};
    PhiloxKey round_key = dropout.philox_key();
#pragma unroll 1
    for (int round = 0; round < 10; ++round, round_key = next_key(round_key)) {
      philox_round(c[0], c[1], c[2], c[3], round_key);
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      factors[4 * group + word] *= (c[word] >> 8) >= threshold ? scale : 0.0f;
    }
  }
}

// A granule of a hidden row, and its derivatives in key and gate.
struct HiddenGranule {
  float hidden[kGranule];
  float dkey[kGranule];
  float dgate[kGranule];
};

// From granules of key, and of gate if there is one.
__device__ __forceinline__ HiddenGranule hidden_of(const Bag& bag, int key, int64_t col,
                                                   const float (&keys)[kGranule],
                                                   const float (&gates)[kGranule]) {
  float factors[kGranule];  // of dropout
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    factors[f] = 1;
  }
#pragma unroll
  for (int factor = 0; factor < 2; ++factor) {
    const Dropout& dropout = bag.call.feature_dropout[factor];
    if (dropout.active) {
      drop_features(dropout, factor, bag, key, col, factors);
    }
  }
  const bool gated = bag.call.gate.data != nullptr;
  HiddenGranule granule;
#pragma unroll
  for (int f = 0; f < kGranule; ++f) {
    const TanhSlope parts = exact_tanh(keys[f]);
    const SigmoidSlope gate = gated ? exact_sigmoid(gates[f]) : SigmoidSlope{1, 0};
    const float slope = 4 * parts.slope;
    granule.hidden[f] = parts.tanh * gate.sigmoid * factors[f];
    granule.dkey[f] =
        slope < static_cast<float>(kVanishingSlope) ? 0.0f : slope * gate.sigmoid * factors[f];
    granule.dgate[f] = parts.tanh * gate.slope * factors[f];
  }
  return granule;
}

}  // namespace attn_ext::cuda
