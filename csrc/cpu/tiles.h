// Register-tiled kernels: inner products (scores and dot products) and outer products (weighted
// sums).
#pragma once

#include "panels.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Tile sizes, by the number of vector registers: 32 with AVX-512, else 16.
constexpr bool kManyRegisters = ATTN_EXT_ISA_AVX512;
constexpr int kTileRows = kManyRegisters ? 4 : 2;
constexpr int kTileCols = 4;
constexpr int kOuterRows = kManyRegisters ? 8 : 4;
static_assert((kOuterRows & (kOuterRows - 1)) == 0, "outer_products halves it");

// Rules of inner_tile. add() adds one step of features of a row of each panel to a sum: `a` and `b`
// point to the step's two vectors, `w` to its score weights.

// Sum of w tanh(q + k) from a = exp(2q), b = exp(2k) and a third and fourth vector of `a`, w
// exp(2q). With z = ab, x = z + 1 and y = w (z - 1), tanh = y / (w x), and w0 tanh0 + w1 tanh1 =
// (y0 x1 + y1 x0) / (x0 x1). Terms and partial sums are as small as those of the score: sums of
// w / x, of which sum w - 2 times their sum is the score too, grow with sum w, and so would
// roundings.
template <class T>
struct FactoredScore {
  static ATTN_EXT_INLINE Vec<T> add(Vec<T> sum, const T* a, const T* b, const T* w) {
    constexpr int lanes = kLanes<T>;
    const Vec<T> b0 = load<T>(b);
    const Vec<T> b1 = load<T>(b + lanes);
    const Vec<T> x0 = load<T>(a) * b0 + 1;
    const Vec<T> x1 = load<T>(a + lanes) * b1 + 1;
    const Vec<T> y0 = load<T>(a + 2 * lanes) * b0 - load<T>(w);
    const Vec<T> y1 = load<T>(a + 3 * lanes) * b1 - load<T>(w + lanes);
    return sum + quotient<T>(y0 * x1 + y1 * x0, x0 * x1);
  }
};

// The same sum from a = q, b = k, for any magnitudes, or with kSmall for small_tanh_parts.
template <class T, bool kSmall>
struct UnfactoredScore {
  static ATTN_EXT_INLINE Vec<T> add(Vec<T> sum, const T* a, const T* b, const T* w) {
    for (int half = 0; half < kStep<T>; half += kLanes<T>) {
      const Vec<T> x = load<T>(a + half) + load<T>(b + half);
      const TanhParts<T> parts = kSmall ? small_tanh_parts<T>(x) : tanh_parts<T>(x);
      sum += load<T>(w + half) * parts.tanh;
    }
    return sum;
  }
};

template <class T>
using ExactScore = UnfactoredScore<T, false>;
template <class T>
using SmallScore = UnfactoredScore<T, true>;

template <class T>
struct DotProduct {
  static ATTN_EXT_INLINE Vec<T> add(Vec<T> sum, const T* a, const T* b, const T*) {
    for (int half = 0; half < kStep<T>; half += kLanes<T>) {
      sum += load<T>(a + half) * load<T>(b + half);
    }
    return sum;
  }
};

// Steps whose sum is kept in registers before it joins the total: rounding errors grow with the
// number of terms of each of the two sums, not of their product.
constexpr int64_t kStepsOfSum = 8;

// out[i * out_row + j] = sum over features by Rule of rows a_i and b_j, for R x C rows.
template <class T, template <class> class Rule, int R, int C>
void inner_tile(Panel<T> a, Panel<T> b, int64_t steps, const T* weights, T* out, int64_t out_row) {
  constexpr int lanes = kLanes<T>;
  Vec<T> totals[R * C] = {};
  for (int64_t begin = 0; begin < steps; begin += kStepsOfSum) {
    const int64_t end = smaller(begin + kStepsOfSum, steps);
    Vec<T> sums[R * C] = {};
    for (int64_t p = begin; p < end; ++p) {
      const StepRows<T> a_step = a.at(p);
      const StepRows<T> b_step = b.at(p);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          sums[i * C + j] = Rule<T>::add(sums[i * C + j], a_step.data + i * a_step.row,
                                         b_step.data + j * b_step.row, weights + p * kStep<T>);
        }
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < R * C; ++n) {
      totals[n] += sums[n];
    }
  }
  sum_lanes<T, R * C>(totals);
#pragma GCC unroll 16
  for (int n = 0; n < R * C; ++n) {
    out[(n / C) * out_row + n % C] = totals[n / lanes][n % lanes];
  }
}

// inner_tile for any rows <= kTileRows and cols <= kTileCols.
template <class T, template <class> class Rule>
void inner_products(Panel<T> a, int64_t rows, Panel<T> b, int64_t cols, int64_t steps,
                    const T* weights, T* out, int64_t out_row) {
  const int64_t row_tile = rows == kTileRows ? kTileRows : 1;
  const int64_t col_tile = cols == kTileCols ? kTileCols : 1;
  const auto tile =
      row_tile > 1 ? (col_tile > 1 ? inner_tile<T, Rule, kTileRows, kTileCols>
                                   : inner_tile<T, Rule, kTileRows, 1>)
                   : (col_tile > 1 ? inner_tile<T, Rule, 1, kTileCols> : inner_tile<T, Rule, 1, 1>);
  for (int64_t i = 0; i < rows; i += row_tile) {
    for (int64_t j = 0; j < cols; j += col_tile) {
      tile(a.from_row(i), b.from_row(j), steps, weights, out + i * out_row + j, out_row);
    }
  }
}

// A matrix of scalars: element (i, k) at data + i * row + k * col.
template <class T>
struct Scalars {
  const T* data;
  int64_t row;
  int64_t col;
};

// sums[i] += sum_k scalars(i, k) b_k for R rows i and one step of features.
template <class T, int R>
void outer_tile(Scalars<T> scalars, StepRows<T> b, int64_t inner, T* sums, int64_t sums_row) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum0[R];
  Vec<T> sum1[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    sum0[i] = load<T>(sums + i * sums_row);
    sum1[i] = load<T>(sums + i * sums_row + lanes);
  }
  for (int64_t k = 0; k < inner; ++k) {
    const Vec<T> b0 = load<T>(b.data + k * b.row);
    const Vec<T> b1 = load<T>(b.data + k * b.row + lanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const T scalar = scalars.data[i * scalars.row + k * scalars.col];
      sum0[i] += scalar * b0;
      sum1[i] += scalar * b1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    store<T>(sums + i * sums_row, sum0[i]);
    store<T>(sums + i * sums_row + lanes, sum1[i]);
  }
}

// The same for one row i and every step: reads each b_k once from its beginning to its end.
template <class T, int K>
void outer_stream(Scalars<T> scalars, Panel<T> b, int64_t steps, T* sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> scale[K];
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    scale[k] = splat<T>(scalars.data[k * scalars.col]);
  }
  for (int64_t p = 0; p < steps; ++p) {
    const StepRows<T> rows = b.at(p);
    Vec<T> sum0 = load<T>(sums + p * kStep<T>);
    Vec<T> sum1 = load<T>(sums + p * kStep<T> + lanes);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const T* row = rows.data + k * rows.row;
      sum0 += scale[k] * load<T>(row);
      sum1 += scale[k] * load<T>(row + lanes);
    }
    store<T>(sums + p * kStep<T>, sum0);
    store<T>(sums + p * kStep<T> + lanes, sum1);
  }
}

// Terms of a sum up to which rows are summed one by one: the terms stay in the first cache.
constexpr int64_t kFewTerms = 4;

// sums[i] += sum_k scalars(i, k) b_k for `rows` rows of `steps` steps, one row after the other.
template <class T>
void outer_products(Scalars<T> scalars, int64_t rows, Panel<T> b, int64_t inner, int64_t steps,
                    T* sums) {
  const int64_t sums_row = steps * kStep<T>;
  if (rows == 1 || inner <= kFewTerms) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = scalars.data + i * scalars.row;
      int64_t k = 0;
      for (; k + 4 <= inner; k += 4) {
        outer_stream<T, 4>({row + k * scalars.col, 0, scalars.col}, b.from_row(k), steps,
                           sums + i * sums_row);
      }
      for (; k < inner; ++k) {
        outer_stream<T, 1>({row + k * scalars.col, 0, scalars.col}, b.from_row(k), steps,
                           sums + i * sums_row);
      }
    }
    return;
  }
  for (int64_t p = 0; p < steps; ++p) {
    int64_t tile = kOuterRows;
    for (int64_t i = 0; i < rows; i += tile) {
      while (i + tile > rows) {
        tile /= 2;
      }
      const auto kernel = tile == 8   ? outer_tile<T, kOuterRows>
                          : tile == 4 ? outer_tile<T, 4>
                          : tile == 2 ? outer_tile<T, 2>
                                      : outer_tile<T, 1>;
      kernel({scalars.data + i * scalars.row, scalars.row, scalars.col}, b.at(p), inner,
             sums + i * sums_row + p * kStep<T>, sums_row);
    }
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
