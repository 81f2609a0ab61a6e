// Register-tiled kernels: inner products (scores and dot products) and outer products (weighted
// sums).
#pragma once

#include "vec.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// One step of features of rows i = 0, 1, ...: kStep numbers at data + i * row.
template <class T>
struct StepRows {
  const T* data;
  int64_t row;
};

// Rows of the compute type whose length is padded to whole steps: step p of row i stands at
// data + i * row + p * step. Where rows lie in a tensor, only whole steps are read there, and the
// rest is a packed copy, the `tail`.
template <class T>
struct Panel {
  const T* data;
  int64_t row;
  int64_t step;
  int64_t whole_steps = INT64_MAX;
  const T* tail = nullptr;  // rows are kStep apart

  ATTN_EXT_INLINE Panel from_row(int64_t i) const {
    return {data + i * row, row, step, whole_steps, tail + i * kStep<T>};
  }

  ATTN_EXT_INLINE StepRows<T> at(int64_t p) const {
    return p < whole_steps ? StepRows<T>{data + p * step, row} : StepRows<T>{tail, kStep<T>};
  }
};

template <class T>
ATTN_EXT_INLINE int64_t steps_of(int64_t columns) {
  return (columns + kStep<T> - 1) / kStep<T>;
}

// From one step to the next of `rows` packed rows of `width` numbers a step: an odd number of cache
// lines, as the steps of a row, written one after the other, would else compete for few cache sets.
template <class T>
ATTN_EXT_INLINE int64_t step_stride(int64_t rows, int64_t width = kStep<T>) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((rows * width + line - 1) / line | 1) * line;
}

constexpr int kTileRows = 4;
constexpr int kTileCols = 4;
// By the number of vector registers: 32 with AVX-512, else 16.
constexpr int kOuterRows = ATTN_EXT_ISA_AVX512 ? 8 : 4;
static_assert((kOuterRows & (kOuterRows - 1)) == 0, "outer_products halves it");

// Rules of inner_tile. add() adds one step of features of a row of each panel to a sum: `a` and `b`
// point to the step's two vectors, `w` to its score weights.

// Sum of w tanh(q + k) from a = exp(2q), b = exp(2k) and a third and fourth vector of `a`, w
// exp(2q). With z = ab, x = z + 1 and y = w (z - 1), tanh = y / (w x), and w0 tanh0 + w1 tanh1 =
// (y0 x1 + y1 x0) / (x0 x1). Terms and partial sums are as small as those of the score: sums of
// w / x, of which sum w - 2 times their sum is the score too, grow with sum w, and so would
// roundings.
template <class T, bool kDivides>
struct PairedScore {
  static ATTN_EXT_INLINE Vec<T> add(Vec<T> sum, const T* a, const T* b, const T* w) {
    constexpr int lanes = kLanes<T>;
    const Vec<T> b0 = load<T>(b);
    const Vec<T> b1 = load<T>(b + lanes);
    const Vec<T> x0 = load<T>(a) * b0 + 1;
    const Vec<T> x1 = load<T>(a + lanes) * b1 + 1;
    const Vec<T> y0 = load<T>(a + 2 * lanes) * b0 - load<T>(w);
    const Vec<T> y1 = load<T>(a + 3 * lanes) * b1 - load<T>(w + lanes);
    const Vec<T> numerator = y0 * x1 + y1 * x0;
    return sum + (kDivides ? numerator / (x0 * x1) : quotient<T>(numerator, x0 * x1));
  }
};

template <class T>
using FactoredScore = PairedScore<T, false>;
// The same for processors that divide AVX-512's vectors in less time than quotient() takes.
template <class T>
using DividedScore = PairedScore<T, ATTN_EXT_ISA_AVX512>;

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

// sums[i * C + j] += one step of features by Rule of rows a_i and b_j, for R x C rows.
template <class T, template <class> class Rule, int R, int C>
ATTN_EXT_INLINE void add_step(StepRows<T> a, StepRows<T> b, const T* weights, Vec<T>* sums) {
#pragma GCC unroll 8
  for (int j = 0; j < C; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      Vec<T>& sum = sums[i * C + j];
      sum = Rule<T>::add(sum, a.data + i * a.row, b.data + j * b.row, weights);
    }
  }
}

// out[i * out_row + j] = the sum of all steps.
template <class T, template <class> class Rule, int R, int C>
void inner_tile(Panel<T> a, Panel<T> b, int64_t steps, const T* weights, T* out, int64_t out_row) {
  constexpr int lanes = kLanes<T>;
  const int64_t whole = smaller(steps, smaller(a.whole_steps, b.whole_steps));
  Vec<T> totals[R * C] = {};
  for (int64_t begin = 0; begin < steps; begin += kStepsOfSum) {
    const int64_t end = smaller(begin + kStepsOfSum, steps);
    Vec<T> sums[R * C] = {};
    int64_t p = begin;
    for (; p < smaller(end, whole); ++p) {
      add_step<T, Rule, R, C>({a.data + p * a.step, a.row}, {b.data + p * b.step, b.row},
                              weights + p * kStep<T>, sums);
    }
    if (p < end) {
      add_step<T, Rule, R, C>(a.at(p), b.at(p), weights + p * kStep<T>, sums);
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

// Rows that a product is written to, or added to what they hold.
template <class T>
struct Sums {
  T* data;
  int64_t row;
  bool adds;
};

// sums[i] = sum_k scalars(i, k) b_k, for R rows i and one step of features.
template <class T, int R>
void outer_tile(Scalars<T> scalars, StepRows<T> b, int64_t inner, Sums<T> sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum0[R] = {};
  Vec<T> sum1[R] = {};
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    T* const row = sums.data + i * sums.row;
    if (sums.adds) {
      sum0[i] = load<T>(row);
      sum1[i] = load<T>(row + lanes);
    } else {  // the lines are on their way while the sums are made
      __builtin_prefetch(row, 1);
      __builtin_prefetch(row + lanes, 1);
    }
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
    store<T>(sums.data + i * sums.row, sum0[i]);
    store<T>(sums.data + i * sums.row + lanes, sum1[i]);
  }
}

// The same for one row i and every step: reads each b_k once from its beginning to its end.
template <class T, int K>
void outer_stream(Scalars<T> scalars, Panel<T> b, int64_t steps, Sums<T> sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> scale[K];
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    scale[k] = splat<T>(scalars.data[k * scalars.col]);
  }
  for (int64_t p = 0; p < steps; ++p) {
    const StepRows<T> rows = b.at(p);
    T* const data = sums.data + p * kStep<T>;
    Vec<T> sum0 = sums.adds ? load<T>(data) : Vec<T>{};
    Vec<T> sum1 = sums.adds ? load<T>(data + lanes) : Vec<T>{};
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const T* row = rows.data + k * rows.row;
      sum0 += scale[k] * load<T>(row);
      sum1 += scale[k] * load<T>(row + lanes);
    }
    store<T>(data, sum0);
    store<T>(data + lanes, sum1);
  }
}

// Terms of a sum up to which rows are summed one by one: the terms stay in the first cache.
constexpr int64_t kFewTerms = 4;

// sums[i] = sum_k scalars(i, k) b_k for `rows` rows of `steps` steps, `inner` > 0.
template <class T>
void outer_products(Scalars<T> scalars, int64_t rows, Panel<T> b, int64_t inner, int64_t steps,
                    Sums<T> sums) {
  if (rows == 1 || inner <= kFewTerms) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = scalars.data + i * scalars.row;
      Sums<T> target{sums.data + i * sums.row, 0, sums.adds};
      int64_t k = 0;
      for (; k + 4 <= inner; k += 4, target.adds = true) {
        outer_stream<T, 4>({row + k * scalars.col, 0, scalars.col}, b.from_row(k), steps, target);
      }
      for (; k < inner; ++k, target.adds = true) {
        outer_stream<T, 1>({row + k * scalars.col, 0, scalars.col}, b.from_row(k), steps, target);
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
             {sums.data + i * sums.row + p * kStep<T>, sums.row, sums.adds});
    }
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
