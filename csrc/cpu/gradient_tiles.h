// Register-tiled kernels of the gradient phase: one step of features of many queries against a few
// keys.
#pragma once

#include "panels.h"
#include "tiles.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Keys a register tile holds.
constexpr int kGradientKeys = kManyRegisters ? 4 : 2;

// tanh and its slope for a step of features, from a = exp(2q), b = exp(2k): with z = ab and
// u = 1 / (z + 1), tanh = (z - 1) u and 1 - tanh^2 = 4 z u^2, which keeps its relative accuracy
// where tanh is saturated. One reciprocal serves two features.
template <class T>
struct FactoredSlope {
  static constexpr bool kShifted = false;

  static ATTN_EXT_INLINE void eval(Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, TanhParts<T>& t0,
                                   TanhParts<T>& t1) {
    const Vec<T> z0 = a0 * b0;
    const Vec<T> z1 = a1 * b1;
    const Vec<T> x0 = a0 * b0 + 1;
    const Vec<T> x1 = a1 * b1 + 1;
    const Vec<T> inverse = reciprocal<T>(x0 * x1);
    const Vec<T> u0 = x1 * inverse;
    const Vec<T> u1 = x0 * inverse;
    t0.tanh = (a0 * b0 - 1) * u0;
    t1.tanh = (a1 * b1 - 1) * u1;
    t0.slope = 4 * (z0 * u0) * u0;
    t1.slope = 4 * (z1 * u1) * u1;
  }
};

// The same from a = q, b = k, for any magnitudes.
template <class T>
struct ExactSlope {
  static constexpr bool kShifted = false;

  static ATTN_EXT_INLINE void eval(Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, TanhParts<T>& t0,
                                   TanhParts<T>& t1) {
    t0 = tanh_parts<T>(a0 + b0);
    t1 = tanh_parts<T>(a1 + b1);
  }
};

// The same where every tanh is small, with -t^2 in place of 1 - t^2 for dquery (see Route).
template <class T>
struct SmallSlope : ExactSlope<T> {
  static constexpr bool kShifted = true;
};

// One step of features of `rows` queries against K keys. Rows of a, dq, dk are kStep apart; dq, dk
// and dw are added to: sums of s (1 - t^2) or -s t^2, s (1 - t^2) and s t.
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
      TanhParts<T> t0;
      TanhParts<T> t1;
      Rule<T>::eval(a0, a1, b0[j], b1[j], t0, t1);
      const Vec<T> s = splat<T>(o.s[i * o.s_row + j]);
      if constexpr (kKey) {
        dk0[j] += s * t0.slope;
        dk1[j] += s * t1.slope;
        row_dw0 += s * t0.tanh;
        row_dw1 += s * t1.tanh;
      }
      if constexpr (kQuery) {
        dq0 += s * (Rule<T>::kShifted ? -t0.tanh * t0.tanh : t0.slope);
        dq1 += s * (Rule<T>::kShifted ? -t1.tanh * t1.tanh : t1.slope);
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
