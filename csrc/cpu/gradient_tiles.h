// Register-tiled kernels of the gradient phase: many queries against a tile of keys, a few keys and
// one step of features at a time.
#pragma once

#include "tiles.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Keys a register tile holds.
constexpr int kGradientKeys = 4;

// What one pair adds to dscore_weight, dkey and dquery for a vector of features: s tanh and, to
// both others, a quarter of s (1 - tanh^2).
template <class T>
struct GradientTerms {
  Vec<T> weight;
  Vec<T> key;
  Vec<T> query;
};

// Rules of gradient_tile, in two halves: start() is what needs no score, and ends in a division,
// finish() what waits for it.

// From a = exp(2q), b = exp(2k): with z = ab, u = 1 / (1 + z) and v = z u, tanh = v - u and
// (1 - tanh^2) / 4 = u v, taken from the smaller of both, which keeps its relative accuracy where
// tanh is saturated. Sums take their terms rounded: those of equal keys, whose s are opposite, then
// cancel exactly, and additions are left to the adders that most machines have beside their
// multipliers; so is that of 1 + z.
template <class T>
struct FactoredSlope {
  Vec<T> z;
  Vec<T> u;

  static ATTN_EXT_INLINE FactoredSlope start(Vec<T> a, Vec<T> b) {
    const Vec<T> z = rounded<T>(a * b);
    return {z, rounded<T>(quotient<T>(splat<T>(1), z + 1))};
  }

  ATTN_EXT_INLINE GradientTerms<T> finish(Vec<T> s) const {
    const Vec<T> v = z * u;
    const Vec<T> key = rounded<T>(s * quarter_slope<T>(u < v ? u : v));
    return {rounded<T>(s * (v - u)), key, key};
  }
};

// The same from a = q, b = k, for any magnitudes, or with kSmall for small_tanh_parts and with
// -tanh^2 for 1 - tanh^2 in dquery.
template <class T, bool kSmall>
struct UnfactoredSlope {
  Vec<T> x;

  static ATTN_EXT_INLINE UnfactoredSlope start(Vec<T> a, Vec<T> b) { return {a + b}; }

  ATTN_EXT_INLINE GradientTerms<T> finish(Vec<T> s) const {
    const TanhParts<T> parts = kSmall ? small_tanh_parts<T>(x) : tanh_parts<T>(x);
    const Vec<T> quarter = T(0.25) * s;
    const Vec<T> key = quarter * parts.slope;
    return {s * parts.tanh, key, kSmall ? -quarter * parts.tanh * parts.tanh : key};
  }
};

template <class T>
using ExactSlope = UnfactoredSlope<T, false>;
// Where every tanh is small (see Route).
template <class T>
using SmallSlope = UnfactoredSlope<T, true>;

// `rows` queries against `keys` keys, with the same rule, over `steps` steps of features. To dq, dk
// and dw the sums of GradientTerms are added.
template <class T>
struct GradientOperands {
  Panel<T> a;  // queries, [rows, steps]
  Panel<T> b;  // keys, [keys, steps]
  const T* s;  // [rows, keys]
  int64_t s_row;
  int64_t rows;
  int64_t keys;
  int64_t steps;
  T* dq;        // [rows, steps, kStep]
  T* dk;        // [keys, steps, kStep]
  T* dw;        // [steps, kStep]
  int64_t row;  // of dq and dk
};

// One vector of features, at `half` of step p, of all queries and keys [j, j + K). A query's terms
// are finished after those of the next are started, so that a division has time to end.
template <class T, template <class> class Rule, int K, bool kQuery, bool kKey>
ATTN_EXT_INLINE void gradient_tile(const GradientOperands<T>& o, int64_t p, int half, int64_t j) {
  using Terms = Rule<T>[K];
  const int64_t a_row = o.a.at(p).row;
  const int64_t s_row = o.s_row;
  const int64_t dq_row = o.row;
  const int64_t rows = o.rows;
  const StepRows<T> keys = o.b.at(p);
  const T* a = o.a.at(p).data + half;
  const T* s = o.s + j;
  T* dq = o.dq + p * kStep<T> + half;
  T* dk = o.dk + j * o.row + p * kStep<T> + half;
  T* dw = o.dw + p * kStep<T> + half;
  Vec<T> b[K];
  Vec<T> key_sums[K] = {};
  Vec<T> weight_sum{};
#pragma GCC unroll 4
  for (int n = 0; n < K; ++n) {
    b[n] = load<T>(keys.data + (j + n) * keys.row + half);
  }
  const auto start = [&](Terms& terms, const T* query) ATTN_EXT_INLINE_LAMBDA {
    const Vec<T> numbers = load<T>(query);
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      terms[n] = Rule<T>::start(numbers, b[n]);
    }
  };
  const auto finish = [&](const Terms& terms, const T* scores, T* query) ATTN_EXT_INLINE_LAMBDA {
    Vec<T> weight;
    Vec<T> sum;
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      const GradientTerms<T> term = terms[n].finish(splat<T>(scores[n]));
      key_sums[n] += term.key;
      weight = n == 0 ? term.weight : weight + term.weight;  // not added to 0, an operation too
      sum = n == 0 ? term.query : sum + term.query;
    }
    weight_sum += weight;
    if constexpr (kQuery) {
      store<T>(query, load<T>(query) + sum);
    }
  };
  Terms even;
  Terms odd;
  int64_t i = 0;
  start(even, a);
  for (; i + 2 < rows; i += 2, a += 2 * a_row, s += 2 * s_row, dq += 2 * dq_row) {
    start(odd, a + a_row);
    finish(even, s, dq);
    start(even, a + 2 * a_row);
    finish(odd, s + s_row, dq + dq_row);
  }
  const bool one_more = i + 1 < rows;
  if (one_more) {
    start(odd, a + a_row);
  }
  finish(even, s, dq);
  if (one_more) {
    finish(odd, s + s_row, dq + dq_row);
  }
  if constexpr (kKey) {
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      store<T>(dk + n * o.row, load<T>(dk + n * o.row) + key_sums[n]);
    }
    store<T>(dw, load<T>(dw) + weight_sum);
  }
}

template <class T, template <class> class Rule, bool kQuery, bool kKey>
void gradient_tiles(const GradientOperands<T>& o) {
  for (int64_t p = 0; p < o.steps; ++p) {
    for (int half = 0; half < kStep<T>; half += kLanes<T>) {
      int64_t j = 0;
      for (; j + kGradientKeys <= o.keys; j += kGradientKeys) {
        gradient_tile<T, Rule, kGradientKeys, kQuery, kKey>(o, p, half, j);
      }
      for (; j < o.keys; ++j) {
        gradient_tile<T, Rule, 1, kQuery, kKey>(o, p, half, j);
      }
    }
  }
}

// With or without dquery, and with or without dkey and dscore_weight.
template <class T, template <class> class Rule>
void gradient_products(bool query, bool key, const GradientOperands<T>& operands) {
  const auto tiles = !key    ? gradient_tiles<T, Rule, true, false>
                     : query ? gradient_tiles<T, Rule, true, true>
                             : gradient_tiles<T, Rule, false, true>;
  tiles(operands);
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
