// Register-tiled kernels of the gradient phase: many queries against a tile of keys, a few keys and
// one step of features at a time.
#pragma once

#include "panels.h"
#include "tiles.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Keys a register tile holds.
constexpr int kGradientKeys = kManyRegisters ? 4 : 2;

// What one pair adds to dscore_weight, dkey and dquery for a step of features: s tanh and, to both
// others, a quarter of s (1 - tanh^2).
template <class T>
struct GradientTerms {
  Vec<T> weight;
  Vec<T> key;
  Vec<T> query;

  // Of another key: what each adds to its own dkey is not summed.
  ATTN_EXT_INLINE void add_other_key(const GradientTerms& other) {
    weight += other.weight;
    query += other.query;
  }
};

// From a = exp(2q), b = exp(2k): with z = ab, u = 1 / (1 + z) and v = z u, tanh = v - u and
// (1 - tanh^2) / 4 = u v, taken from the smaller of both, which keeps its relative accuracy where
// tanh is saturated. One division serves two features. Sums take their terms rounded: those of
// equal keys, whose s are opposite, then cancel exactly, and additions are left to the adders that
// most machines have beside their multipliers.
template <class T>
struct FactoredSlope {
  static ATTN_EXT_INLINE void eval(Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, Vec<T> s,
                                   GradientTerms<T>& t0, GradientTerms<T>& t1) {
    const Vec<T> z0 = a0 * b0;
    const Vec<T> z1 = a1 * b1;
    const Vec<T> x0 = z0 + 1;
    const Vec<T> x1 = z1 + 1;
    const Vec<T> inverse = quotient<T>(splat<T>(1), x0 * x1);
    t0 = terms(z0, x1 * inverse, s);
    t1 = terms(z1, x0 * inverse, s);
  }

  static ATTN_EXT_INLINE GradientTerms<T> terms(Vec<T> z, Vec<T> u, Vec<T> s) {
    const Vec<T> v = z * u;
    const Vec<T> key = rounded<T>(s * quarter_slope<T>(u < v ? u : v));
    return {rounded<T>(s * (v - u)), key, key};
  }
};

// The same from a = q, b = k, for any magnitudes, or with kSmall for small_tanh_parts and with
// -tanh^2 for 1 - tanh^2 in dquery.
template <class T, bool kSmall>
struct UnfactoredSlope {
  static ATTN_EXT_INLINE void eval(Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, Vec<T> s,
                                   GradientTerms<T>& t0, GradientTerms<T>& t1) {
    t0 = terms(a0 + b0, s);
    t1 = terms(a1 + b1, s);
  }

  static ATTN_EXT_INLINE GradientTerms<T> terms(Vec<T> x, Vec<T> s) {
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
  T* dq;  // [steps, rows, kStep]
  int64_t dq_step;
  T* dk;  // [steps, keys, kStep]
  int64_t dk_step;
  T* dw;  // [steps, kStep]
};

// Step p, all queries and keys [j, j + K).
template <class T, template <class> class Rule, int K, bool kQuery, bool kKey>
ATTN_EXT_INLINE void gradient_tile(const GradientOperands<T>& o, int64_t p, int64_t j) {
  constexpr int lanes = kLanes<T>;
  const StepRows<T> a = o.a.at(p);
  const StepRows<T> b = o.b.at(p);
  Vec<T> b0[K];
  Vec<T> b1[K];
  Vec<T> dk0[K] = {};
  Vec<T> dk1[K] = {};
#pragma GCC unroll 4
  for (int n = 0; n < K; ++n) {
    b0[n] = load<T>(b.data + (j + n) * b.row);
    b1[n] = load<T>(b.data + (j + n) * b.row + lanes);
  }
  Vec<T> dw0{};
  Vec<T> dw1{};
  T* dq = o.dq + p * o.dq_step;
  const T* s = o.s + j;
  for (int64_t i = 0; i < o.rows; ++i) {
    const Vec<T> a0 = load<T>(a.data + i * a.row);
    const Vec<T> a1 = load<T>(a.data + i * a.row + lanes);
    GradientTerms<T> sum0;
    GradientTerms<T> sum1;
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      GradientTerms<T> t0;
      GradientTerms<T> t1;
      Rule<T>::eval(a0, a1, b0[n], b1[n], splat<T>(s[i * o.s_row + n]), t0, t1);
      if constexpr (kKey) {
        dk0[n] += t0.key;
        dk1[n] += t1.key;
      }
      if (n == 0) {  // not added to 0, which is an operation too
        sum0 = t0;
        sum1 = t1;
      } else {
        sum0.add_other_key(t0);
        sum1.add_other_key(t1);
      }
    }
    if constexpr (kKey) {
      dw0 += sum0.weight;
      dw1 += sum1.weight;
    }
    if constexpr (kQuery) {
      store<T>(dq, load<T>(dq) + sum0.query);
      store<T>(dq + lanes, load<T>(dq + lanes) + sum1.query);
      dq += kStep<T>;
    }
  }
  if constexpr (kKey) {
    T* dk = o.dk + p * o.dk_step + j * kStep<T>;
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n, dk += kStep<T>) {
      store<T>(dk, load<T>(dk) + dk0[n]);
      store<T>(dk + lanes, load<T>(dk + lanes) + dk1[n]);
    }
    T* dw = o.dw + p * kStep<T>;
    store<T>(dw, load<T>(dw) + dw0);
    store<T>(dw + lanes, load<T>(dw + lanes) + dw1);
  }
}

template <class T, template <class> class Rule, bool kQuery, bool kKey>
void gradient_tiles(const GradientOperands<T>& o) {
  for (int64_t p = 0; p < o.steps; ++p) {
    int64_t j = 0;
    for (; j + kGradientKeys <= o.keys; j += kGradientKeys) {
      gradient_tile<T, Rule, kGradientKeys, kQuery, kKey>(o, p, j);
    }
    for (; j < o.keys; ++j) {
      gradient_tile<T, Rule, 1, kQuery, kKey>(o, p, j);
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
