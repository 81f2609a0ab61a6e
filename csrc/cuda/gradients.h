// The gradients of a call, and the phase of a backward that makes those of queries, keys and score
// weights.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace attn_ext {
namespace cuda {

// The gradients that a call is to give; data of what is not wanted is null.
class Gradients {
 public:
  Gradients(const Call& call, const Tensor& query, const Tensor& key, const Tensor& value,
            const Tensor& score_weight, int64_t grad_mask, bool has_dcontext, bool many_waves)
      : dquery(make(call, query, grad_mask & kGradQuery, call.leaves_rows())),
        dkey(make(call, key, grad_mask & kGradKey, call.leaves_rows())),
        dvalue(make(call, value, grad_mask & kGradValue, call.leaves_rows() || !has_dcontext)),
        dscore_weight(make(call, score_weight, grad_mask & kGradScoreWeight, false)) {
    wants_query = grad_mask & kGradQuery;
    wants_key = grad_mask & kGradKey;
    wants_value = (grad_mask & kGradValue) && has_dcontext;
    wants_weight = grad_mask & kGradScoreWeight;
    if (wants_key) {
      const bool gathers = many_waves || call.longest_query() > kGradientQueries;
      dkey_sums_ = sums(dkey, gathers);
    }
    if (wants_value) {
      dvalue_sums_ = sums(dvalue, many_waves);
    }
  }

  bool wants_scores() const { return wants_query || wants_key || wants_weight; }
  Rows dkey_sums() const { return rows_of(*dkey_sums_); }
  Rows dvalue_sums() const { return rows_of(*dvalue_sums_); }

  static Tensor make(const Call& call, const Tensor& like, bool wanted, bool zeros) {
    Tensor result = wanted ? allocate(like, sizes_of(like), like.scalar_type())
                           : nothing(like, like.scalar_type());
    if (zeros) {
      clear(result, call.stream());
    }
    return result;
  }

  Tensor dquery;
  Tensor dkey;
  Tensor dvalue;
  Tensor dscore_weight;
  bool wants_query;
  bool wants_key;
  bool wants_value;
  bool wants_weight;

 private:
  // Gradients gather in float32, those of that type where they are.
  static Tensor sums(const Tensor& gradient, bool gathers) {
    const bool in_place = !gathers || gradient.scalar_type() == ScalarType::Float;
    return in_place ? gradient : allocate(gradient, sizes_of(gradient), ScalarType::Float);
  }

  OptionalTensor dkey_sums_;
  OptionalTensor dvalue_sums_;
};

// Keys of a block of the gradient kernel, as a shift: so few that the blocks fill the device and
// none is much longer than the others, as far as there is room for the partial gradients of the
// `rows` queries of a wave.
inline int gradient_shift(const Call& call, bool wants_query, int64_t rows) {
  constexpr int kMostShift = 10;
  constexpr int kFewestShift = 6;
  const int64_t heads = call.problem.heads;
  const int64_t chunks = (call.problem.dim + kGradientFeatures - 1) / kGradientFeatures;
  const int64_t blocks = std::max<int64_t>(call.batch() * heads * chunks, 1);
  const int64_t splits = 4 * processors() / blocks + 1;
  const int64_t bytes = rows * heads * call.problem.dim * 4;
  const int whole = shift_for(call.longest_key());
  int shift = std::clamp(shift_for(call.longest_key() / splits), kFewestShift, kMostShift);
  while (wants_query && shift < whole &&
         ((call.longest_key() >> shift) + 1) * bytes > kPartialBytes) {
    ++shift;
  }
  return std::min(shift, whole);
}

// Runs the gradient kernel on one wave after the other.
class GradientPhase {
 public:
  GradientPhase(const Call& call, const Gradients& gradients, int64_t waves, int64_t rows)
      : call_(call), gradients_(gradients) {
    if (!gradients.wants_scores()) {
      return;
    }
    const Problem& problem = call.problem;
    if (gradients.wants_query) {
      base_.dquery = rows_of(gradients.dquery);
    }
    if (gradients.wants_key) {
      base_.dkey = rows_of(gradients.dkey);
      base_.dkey_sums = gradients.dkey_sums();
    }
    base_.one_step = call.one_step();
    base_.key_shift = gradient_shift(call, gradients.wants_query, rows);
    const int64_t splits = ((call.longest_key() - 1) >> base_.key_shift) + 1;
    if (gradients.wants_query && splits > 1) {
      const int64_t chunks = (problem.dim + kGradientFeatures - 1) / kGradientFeatures;
      partial_dquery_ = call.floats({splits, rows, problem.heads, problem.dim});
      left_out_ = call.floats({splits, rows, problem.heads, chunks, 2});
      base_.partial_dquery = rows_of(*partial_dquery_);
      base_.left_out = static_cast<float2*>(left_out_->data_ptr());
    }
    if (gradients.wants_weight) {
      tiles_ = waves > 0 ? call.key_tiles(base_.key_shift) : 0;  // else nobody fills them
      partial_dweight_ = call.floats({tiles_, problem.heads, problem.dim});
      base_.partial_dweight = static_cast<float*>(partial_dweight_->data_ptr());
      dscore_weight_ = score_weight_rows(gradients.dscore_weight);
    }
  }

  void run(const Scores& dscores) const {
    if (!gradients_.wants_scores()) {
      return;
    }
    GradientCall gradient = base_;
    gradient.problem = call_.problem;
    gradient.dscores = dscores;
    launch_gradient(gradient, call_.stream());
    if (gradient.partial_dquery.data != nullptr) {
      launch_merge_dquery(gradient, call_.stream());
    }
  }

  void finish() const {
    if (partial_dweight_.has_value()) {
      launch_merge_dweight(base_.partial_dweight, tiles_, call_.problem.heads, call_.problem.dim,
                           dscore_weight_, call_.stream());
    }
  }

 private:
  const Call& call_;
  const Gradients& gradients_;
  GradientCall base_;
  OptionalTensor partial_dquery_;
  OptionalTensor left_out_;
  OptionalTensor partial_dweight_;
  Rows dscore_weight_;
  int64_t tiles_ = 0;
};

}  // namespace cuda
}  // namespace attn_ext
