// The gradient phase: from s = alpha (dalpha - delta) to dquery, dkey and dscore_weight. With t =
// tanh(q + k):
//   dquery_id = w_d sum_j s_ij (1 - t_ijd^2),  dkey_jd = w_d sum_i s_ij (1 - t_ijd^2),
//   dscore_weight_d = sum_ij s_ij t_ijd.
#pragma once

#include "gradient_tiles.h"
#include "scores.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Terms of dscore_weight that are summed in the compute type before they join a sum in double. With
// 16 a lone query near saturation erred by 3.05 times what eager does, its terms nearly cancelling.
constexpr int64_t kWeightTerms = 4;
// Queries whose share of dkey is summed in registers before it joins the sum in memory.
constexpr int64_t kRunQueries = 128;
// Keys whose share of dquery is summed before it joins the sum of all keys. What a register tile
// adds to a large sum is rounded to that sum's last place; so it is added to a small one, and how
// often the large one rounds does not depend on how few keys a tile holds.
constexpr int64_t kRunKeys = 4 * kGradientTile;
static_assert(kGradientTile % kGradientKeys == 0, "runs end where tiles do");

// The features [col, col + cols) of one unit against tiles of its keys.
template <class T>
class GradientBlock {
 public:
  GradientBlock(const BackwardCall<T>& call, const GradientItem& item, const Unit& unit,
                double* dweight, Scratch& scratch)
      : call_(call),
        item_(item),
        unit_(unit),
        sequence_(call.problem->sequences[unit.sequence]),
        steps_(steps_of<T>(item.cols)),
        sums_row_(step_stride<T>(steps_)),
        tile_keys_(unit.query_count < 4 ? kGradientKeys : kGradientTile),
        queries_(query_rows(call.problem->query, sequence_, unit.head), unit.query_count, item.col,
                 item.cols, scratch),
        keys_(*call.problem, sequence_, unit.head, tile_keys_, item.col, item.cols, scratch),
        dweight_total_(dweight),
        scratch_(scratch),
        informative_(queries_, steps_, nullptr, T(0), scratch) {
    const int64_t padded = steps_ * kStep<T>;
    queries_.take(unit.query, unit.query_count);
    dquery_ = scratch.take<T>(dquery_size());
    dkey_ = scratch.take<T>(tile_keys_ * sums_row_);
    row_ = scratch.take<T>(padded);
    dweight_ = scratch.take<T>(padded);
    shifts_ = scratch.take<Shift>(unit.query_count);
    for (int64_t i = 0; i < unit.query_count; ++i) {
      shifts_[i] = {0, 0, 0};
    }
    pad_row<T>(dquery_, 0, dquery_size(), 0);
    pad_row<T>(dweight_, 0, padded, 0);
  }

  void run(int64_t first, int64_t count) {
    read_scores(first, count);
    const bool has_runs = call_.dquery.data != nullptr && count > kRunKeys;
    if (has_runs) {
      dquery_total_ = scratch_.take<T>(dquery_size());
      pad_row<T>(dquery_total_, 0, dquery_size(), 0);
    }
    for (int64_t j = 0; j < count; j += tile_keys_) {
      run_tile(first + j, smaller(tile_keys_, count - j));
      if (has_runs && (j + tile_keys_) % kRunKeys == 0) {
        flush_dquery();
      }
    }
    if (has_runs) {
      flush_dquery();
      dquery_ = dquery_total_;
    }
    if (call_.dquery.data != nullptr) {
      write_queries();
    }
    add_weights();
  }

 private:
  // s of the item's keys, which begin with `first`, times `lift`.
  struct Scores {
    T* data;
    int64_t ld;
    int64_t first;
    T lift;

    T* at(int64_t i, int64_t key) const { return data + i * ld + (key - first); }
  };

  // What a query's sums leave out: sum s and sum |s| of so many keys.
  struct Shift {
    double left_out;
    double magnitude;
    int64_t keys;
  };

  // Multiplies s by a power of two that makes the largest about 1 or, where that is more, the root
  // of sum w^2: s (1 - t^2), which w multiplies in the end only, then neither underflows nor
  // overflows where w s (1 - t^2) does not.
  void read_scores(int64_t first, int64_t count) {
    constexpr int kHighest = sizeof(T) == 4 ? 120 : 1000;  // of it and its inverse
    const T* s = call_.dscores + unit_.scores + first;
    Vec<T> sizes{};
    for (int64_t i = 0; i < unit_.query_count; ++i) {
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        const Vec<T> next = magnitude<T>(load_some<T>(s + i * unit_.ld + j, count - j));
        sizes = next > sizes ? next : sizes;
      }
    }
    const T largest = fold_lanes<T, LargerLane<T>>(sizes);
    int exponent = 0;
    if (largest > 0 && largest - largest == T(0)) {
      __builtin_frexp(static_cast<double>(largest), &exponent);
    }
    constexpr double kLargestLifted = 0x1p24;  // w s of larger ones might overflow
    const double norm = call_.score_weights[unit_.head].norm;
    if (norm > 1 && norm <= kLargestLifted) {
      int of_weights = 0;
      __builtin_frexp(norm, &of_weights);
      exponent -= of_weights;
    }
    exponent = smaller(exponent, kHighest);
    const T lift = static_cast<T>(__builtin_ldexp(1.0, smaller(-exponent, kHighest)));
    scores_ = {scratch_.take<T>(unit_.query_count * count), count, first, lift};
    for (int64_t i = 0; i < unit_.query_count; ++i) {
      for (int64_t j = 0; j < count; ++j) {
        scores_.data[i * count + j] = s[i * unit_.ld + j] * lift;
      }
    }
  }

  void run_tile(int64_t first, int64_t keys) {
    keys_.take(first, keys);
    key_bound_ = keys_.bound(0, keys);
    least_key_bound_ = call_.problem->is_short ? key_bound_ : keys_.smallest_bound(0, keys);
    const bool informative = call_.problem->is_short || informative_(keys_);
    if (wants_keys()) {
      pad_row<T>(dkey_, 0, keys * sums_row_, 0);
    }
    for (int64_t i = 0; i < unit_.query_count;) {
      const Route route = route_of(i, informative);
      int64_t end = i + 1;
      while (end < smaller(unit_.query_count, i + kRunQueries) &&
             route_of(end, informative) == route) {
        ++end;
      }
      run_queries(route, i, end - i, first, keys);
      i = end;
    }
    if (call_.dkey.data != nullptr) {
      write_keys(first, keys);
    }
    weight_terms_ += keys * unit_.query_count;
    if (weight_terms_ >= kWeightTerms) {
      add_weights();
    }
  }

  // Where every tanh is small, 1 - t^2 is nearly 1, and as sum_j s_ij = 0 what remains of
  // sum_j s_ij (1 - t_ijd^2) is little more than the rounding errors of that 0: there the sum
  // leaves out the 1.
  enum class Route { kFactored, kExact, kSmall };

  Route route_of(int64_t i, bool informative) const {
    const T bound = queries_.bound(i, 1);
    if (bound + key_bound_ < T(kSmallestGradientSum)) {
      return Route::kSmall;
    }
    // Some keys may be small where others of the tile are not.
    const bool sizeable = bound + least_key_bound_ >= T(kSmallestGradientSum);
    return informative && sizeable && in_factored_range(bound, key_bound_, kSmallestGradientSum)
               ? Route::kFactored
               : Route::kExact;
  }

  // Queries [i, i + rows), all of one route, against a tile of keys.
  void run_queries(Route route, int64_t i, int64_t rows, int64_t first, int64_t keys) {
    const bool factored = route == Route::kFactored;
    const GradientOperands<T> operands{
        (factored ? queries_.exponentials : queries_.numbers()).from_row(i),
        factored ? keys_.exponentials : keys_.numbers(),
        scores_.at(i, first),
        scores_.ld,
        rows,
        keys,
        steps_,
        dquery_ + i * sums_row_,
        dkey_,
        dweight_,
        sums_row_};
    const bool query = call_.dquery.data != nullptr;
    if (factored) {
      gradient_products<T, FactoredSlope>(query, wants_keys(), operands);
    } else if (route == Route::kSmall) {
      add_shifted(i, i + rows, first, keys);
      gradient_products<T, SmallSlope>(query, wants_keys(), operands);
    } else {
      gradient_products<T, ExactSlope>(query, wants_keys(), operands);
    }
  }

  // Notes what the shift leaves out of queries [begin, end) for keys [key, key + keys).
  void add_shifted(int64_t begin, int64_t end, int64_t key, int64_t keys) {
    for (int64_t i = begin; i < end; ++i) {
      const T* s = scores_.at(i, key);
      for (int64_t j = 0; j < keys; ++j) {
        const double score = static_cast<double>(s[j]);
        shifts_[i].left_out += score;
        shifts_[i].magnitude += score < 0 ? -score : score;
      }
      shifts_[i].keys += keys;
    }
  }

  // What is to be added to the sums of query i. Behind a softmax sum_j s_ij = 0, so where all keys
  // were shifted it is 0, unless finish_scores left that sum as it is, as beside a weight that is 1
  // but for less than epsilon, whose s is 0.
  T shift_of_query(int64_t i) const {
    constexpr double kRounding = 0x1p-12;  // more of sum |s| than rounding leaves
    const Shift& shift = shifts_[i];
    const double size = shift.left_out < 0 ? -shift.left_out : shift.left_out;
    const bool is_rounding = !call_.problem->raw_scores && shift.keys == unit_.key_count &&
                             size <= kRounding * shift.magnitude;
    return is_rounding ? T(0) : static_cast<T>(shift.left_out);
  }

  int64_t dquery_size() const { return unit_.query_count * sums_row_; }

  // Moves what dquery_ holds into the sum of all keys.
  void flush_dquery() {
    for (int64_t n = 0; n < dquery_size(); ++n) {
      dquery_total_[n] += dquery_[n];
    }
    pad_row<T>(dquery_, 0, dquery_size(), 0);
  }

  bool wants_keys() const { return call_.dkey.data != nullptr || call_.partial_dweight != nullptr; }

  // Long sums of s t continue in double.
  void add_weights() {
    weight_terms_ = 0;
    if (dweight_total_ != nullptr) {
      for (int64_t c = 0; c < item_.cols; ++c) {
        dweight_total_[c] += static_cast<double>(dweight_[c]) / static_cast<double>(scores_.lift);
      }
      pad_row<T>(dweight_, 0, steps_ * kStep<T>, 0);
    }
  }

  // out = w (4 sums + shift) / lift for a row of sums, which are of quarters.
  void final_row(const T* sums, T shift, T* out) const {
    const T* weight = call_.score_weights[unit_.head].data + item_.col;
    const T unlift = 1 / scores_.lift;
    for (int64_t c = 0; c < item_.cols; ++c) {
      out[c] = weight[c] * (4 * sums[c] + shift) * unlift;
    }
  }

  // Where the item's part of row j of a gradient is computed: in place if it has the compute type.
  T* result_row(const RowSource& target, int64_t j) const {
    return target.has_vectors<T>() ? target.at<T>(j, item_.col) : row_;
  }

  // To dquery, or to partial rows of it.
  void write_queries() {
    const int64_t row = padded_columns(call_.problem->dim);
    const RowSource target =
        item_.dquery_partial < 0
            ? query_rows(call_.dquery, sequence_, unit_.head)
            : RowSource{call_.partial_dquery, kDTypeOf<T>, item_.dquery_partial * row, row, 1,
                        -unit_.query,         nullptr};
    for (int64_t i = 0; i < unit_.query_count; ++i) {
      T* result = result_row(target, unit_.query + i);
      final_row(dquery_ + i * sums_row_, shift_of_query(i), result);
      write_columns<T>(target, unit_.query + i, item_.col, item_.cols, result);
    }
  }

  void write_keys(int64_t first, int64_t keys) {
    const RowSource sum = key_rows(call_.dkey_sum, sequence_, unit_.head);
    const RowSource target = unit_.last ? key_rows(call_.dkey, sequence_, unit_.head) : sum;
    for (int64_t j = 0; j < keys; ++j) {
      T* row = unit_.first ? result_row(target, first + j) : row_;
      final_row(dkey_ + j * sums_row_, 0, row);
      if (!unit_.first) {
        const T* before = sum.at<T>(first + j, item_.col);
        for (int64_t c = 0; c < item_.cols; ++c) {
          row_[c] += before[c];
        }
      }
      write_columns<T>(target, first + j, item_.col, item_.cols, row);
    }
  }

  const BackwardCall<T>& call_;
  const GradientItem& item_;
  const Unit& unit_;
  const Sequence& sequence_;
  const int64_t steps_;
  const int64_t sums_row_;  // of dquery_ and dkey_, [.., steps, kStep]
  const int64_t tile_keys_;
  RowBlock<T> queries_;
  RowBlock<T> keys_;
  double* const dweight_total_;
  Scratch& scratch_;
  Informative<T> informative_;
  T key_bound_ = 0;        // the largest magnitude in the tile of keys
  T least_key_bound_ = 0;  // that of the key whose own is the smallest
  Scores scores_;
  T* dweight_;
  T* dquery_;
  T* dquery_total_ = nullptr;  // of all keys, where they come in runs
  T* dkey_;
  T* row_;
  Shift* shifts_;
  int64_t weight_terms_ = 0;
};

// dquery of one unit from the partial sums over its ranges of keys, in the order of the keys.
template <class T>
void query_merge(const BackwardCall<T>& call, const QueryMerge& merge) {
  Scratch scratch;
  const Unit& unit = call.wave->units[merge.unit];
  const Sequence& sequence = call.problem->sequences[unit.sequence];
  const RowSource target = query_rows(call.dquery, sequence, unit.head);
  const int64_t dim = call.problem->dim;
  T* sum = scratch.take<T>(dim);
  for (int64_t i = 0; i < unit.query_count; ++i) {
    pad_row<T>(sum, 0, dim, 0);
    for (int64_t n = 0; n < merge.splits; ++n) {
      const T* partial =
          call.partial_dquery + (merge.partial + n * unit.query_count + i) * padded_columns(dim);
      for (int64_t c = 0; c < dim; ++c) {
        sum[c] += partial[c];
      }
    }
    write_columns<T>(target, unit.query + i, 0, dim, sum);
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
