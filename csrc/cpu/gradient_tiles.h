// Register-tiled kernels of the gradient phase: one step of features of many queries against a few
// keys.
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
};

// From a = exp(2q), b = exp(2k): with z = ab, u = 1 / (z + 1) and v = z u = 1 - u, tanh = (z - 1) u
// and (1 - tanh^2) / 4 = u v, taken from the smaller of both, which keeps its relative accuracy
// where tanh is saturated. One reciprocal serves two features.
template <class T>
struct FactoredSlope {
  static ATTN_EXT_INLINE void eval(Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, Vec<T> s,
                                   GradientTerms<T>& t0, GradientTerms<T>& t1) {
    const Vec<T> z0 = a0 * b0;
    const Vec<T> z1 = a1 * b1;
    const Vec<T> x0 = z0 + 1;
    const Vec<T> x1 = z1 + 1;
    const Vec<T> inverse = reciprocal<T>(x0 * x1);
    t0 = terms(z0, x1 * inverse, s);
    t1 = terms(z1, x0 * inverse, s);
  }

  static ATTN_EXT_INLINE GradientTerms<T> terms(Vec<T> z, Vec<T> u, Vec<T> s) {
    const Vec<T> v = z * u;
    const Vec<T> key = rounded<T>(s * quarter_slope<T>(u < v ? u : v));
    // Not s u (z - 1): where s is tiny, s u would vanish.
    const Vec<T> weight = s * ((z - 1) * u);
    // With two keys a register tile, terms of equal keys, whose s are opposite, cancel exactly.
    return {kGradientKeys == 2 ? rounded<T>(weight) : weight, key, key};
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

// One step of features of `rows` queries against K keys. Rows of a, dq, dk are kStep apart; to dq,
// dk and dw the sums of GradientTerms are added.
template <class T>
struct GradientOperands {
  const T* a;
  int64_t a_row;
  const T* b;
  int64_t b_row;
  const T* s;
  int64_t s_row;
  int64_t rows;
  T* dq;
  T* dk;
  T* dw;
};

template <class T, template <class> class Rule, int K, bool kQuery, bool kKey>
void gradient_tile(const GradientOperands<T>& o) {
  constexpr int lanes = kLanes<T>;
  Vec<T> b0[K];
  Vec<T> b1[K];
  Vec<T> dk0[K] = {};
  Vec<T> dk1[K] = {};
#pragma GCC unroll 4
  for (int j = 0; j < K; ++j) {
    b0[j] = load<T>(o.b + j * o.b_row);
    b1[j] = load<T>(o.b + j * o.b_row + lanes);
  }
  Vec<T> dw0{};
  Vec<T> dw1{};
  for (int64_t i = 0; i < o.rows; ++i) {
    const Vec<T> a0 = load<T>(o.a + i * o.a_row);
    const Vec<T> a1 = load<T>(o.a + i * o.a_row + lanes);
    Vec<T> dq0{};
    Vec<T> dq1{};
    Vec<T> row_dw0{};
    Vec<T> row_dw1{};
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) {
      GradientTerms<T> t0;
      GradientTerms<T> t1;
      Rule<T>::eval(a0, a1, b0[j], b1[j], splat<T>(o.s[i * o.s_row + j]), t0, t1);
      if constexpr (kKey) {
        dk0[j] += t0.key;
        dk1[j] += t1.key;
        row_dw0 += t0.weight;
        row_dw1 += t1.weight;
      }
      if constexpr (kQuery) {
        dq0 += t0.query;
        dq1 += t1.query;
      }
    }
    dw0 += row_dw0;
    dw1 += row_dw1;
    if constexpr (kQuery) {
      T* dq = o.dq + i * kStep<T>;
      store<T>(dq, load<T>(dq) + dq0);
      store<T>(dq + lanes, load<T>(dq + lanes) + dq1);
    }
  }
  if constexpr (kKey) {
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) {
      T* dk = o.dk + j * kStep<T>;
      store<T>(dk, load<T>(dk) + dk0[j]);
      store<T>(dk + lanes, load<T>(dk + lanes) + dk1[j]);
    }
    store<T>(o.dw, load<T>(o.dw) + dw0);
    store<T>(o.dw + lanes, load<T>(o.dw + lanes) + dw1);
  }
}

template <class T, template <class> class Rule, int K>
void gradient_tile_for(bool query, bool key, const GradientOperands<T>& operands) {
  const auto kernel = !key    ? gradient_tile<T, Rule, K, true, false>
                      : query ? gradient_tile<T, Rule, K, true, true>
                              : gradient_tile<T, Rule, K, false, true>;
  kernel(operands);
}

// gradient_tile for any keys <= kGradientKeys.
template <class T, template <class> class Rule>
void gradient_keys(bool query, bool key, int64_t keys, GradientOperands<T> operands) {
  if (keys == kGradientKeys) {
    gradient_tile_for<T, Rule, kGradientKeys>(query, key, operands);
    return;
  }
  for (int64_t j = 0; j < keys; ++j) {
    gradient_tile_for<T, Rule, 1>(query, key, operands);
    operands.b += operands.b_row;
    operands.s += 1;
    operands.dk += kStep<T>;
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
