// The operations of the CUDA backend as PyTorch sees them: allocates outputs and buffers, and puts
// the kernels in order. attn_ext/ops.py hands CUDA tensors on to them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"

// Tests register the same operations for CPU tensors, over kernels that the host runs.
#ifndef ATTN_EXT_CUDA_KEY
#define ATTN_EXT_CUDA_KEY CUDA
#endif

namespace attn_ext {
namespace cuda {
namespace {

enum GradMask : int64_t { kGradQuery = 1, kGradKey = 2, kGradValue = 4, kGradScoreWeight = 8 };

constexpr bool kScores = true;
constexpr bool kProducts = false;

InnerCall inner_call(const Call& call, bool scores, const Rows& left, const Rows& right,
                     int64_t dim, const Scores& out) {
  InnerCall inner;
  inner.problem = call.problem;
  inner.scores = scores;
  inner.left = left;
  inner.right = right;
  inner.dim = dim;
  inner.out = out;
  return inner;
}

// Every sequence's only query: scores, softmax and weighted sum in one kernel, or two if there are
// too few sequences for a block each.
void forward_step(const Call& call, const Rows& context, const Rows& stats,
                  const Weights& weights) {
  constexpr int kFewestShift = 6;
  const Problem& problem = call.problem;
  const int64_t processors = cuda::processors();
  StepCall step;
  step.problem = problem;
  step.context = context;
  step.stats = stats;
  step.weights = weights;
  const int whole = shift_for(call.longest_key());
  int share = kMostStepShift - 1;
  if (call.batch() * problem.heads < 2 * processors) {
    const int64_t keys = call.key_rows() * problem.heads / (4 * processors) + 1;
    share = std::clamp(shift_for(keys), kFewestShift, kMostStepShift);
  }
  step.key_shift = std::min(whole, share);
  step.merges = step.key_shift < whole;
  if (!step.merges) {
    launch_step(step, call.stream());
    return;
  }
  const int64_t parts = call.key_tiles(step.key_shift) * problem.heads;
  const Tensor sums = call.floats({parts, problem.value_dim});
  const Tensor part_stats = call.floats({parts, 2});
  step.partial_sums = static_cast<float*>(sums.data_ptr());
  step.partial_stats = static_cast<SoftmaxPart*>(part_stats.data_ptr());
  OptionalTensor scores;
  if (weights.rows.data != nullptr) {
    const bool jagged = problem.sequences.key.offsets.data != nullptr;
    scores = call.floats({jagged ? 1 : call.batch(), problem.sequences.key.rows, problem.heads});
    step.scores = key_scores(*scores);
  }
  launch_step(step, call.stream());
  launch_step_merge(step, call.stream());
}

void forward_rows(Call& call, const Rows& context, const Rows& stats, const Weights& weights) {
  const int64_t rows = call.wave_rows(1);
  const Tensor room = call.floats({rows, call.problem.heads, call.longest_key()});
  const Scores scores = call.dense_scores(room);
  for (int64_t first = 0; first < call.query_rows(); first += rows) {
    call.begin_wave(first, rows);
    const Problem& problem = call.problem;
    launch_inner(inner_call(call, kScores, problem.query, problem.key, problem.dim, scores),
                 call.stream());
    launch_softmax({problem, scores, stats, weights}, call.stream());
    WeightedCall weighted;
    weighted.problem = problem;
    weighted.alpha = scores;
    weighted.rows = problem.value;
    weighted.out = context;
    launch_weighted(weighted, call.stream());
  }
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& /*exp_key*/, const OptionalTensor& /*key_bound*/,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, bool /*deterministic*/) {
  Call call(query, key, value, score_weight,
            {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
            {dropout_p, dropout_seed});
  Tensor context = allocate(query, with_last(query, value.size(3)), value.scalar_type());
  Tensor stats = allocate(query, with_last(query, 2), ScalarType::Float);
  Tensor weights = nothing(value);
  Weights weights_view;
  if (call.leaves_rows()) {
    clear(context, call.stream());
    clear(stats, call.stream());
  }
  if (weights_layout != 0) {
    const bool by_key = weights_layout == 2;
    weights = allocate(value,
                       by_key ? std::vector<int64_t>{key.size(1), key.size(2)}
                              : std::vector<int64_t>{call.batch(), key.size(2), call.max_queries(),
                                                     call.max_keys()},
                       value.scalar_type());
    clear(weights, call.stream());
    weights_view = weights_of(weights, by_key);
  }
  if (call.one_step()) {
    forward_step(call, rows_of(context), rows_of(stats), weights_view);
  } else {
    forward_rows(call, rows_of(context), rows_of(stats), weights_view);
  }
  return {context, weights, stats};
}

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

  Tensor dquery;
  Tensor dkey;
  Tensor dvalue;
  Tensor dscore_weight;
  bool wants_query;
  bool wants_key;
  bool wants_value;
  bool wants_weight;

 private:
  static Tensor make(const Call& call, const Tensor& like, bool wanted, bool zeros) {
    Tensor result = wanted ? allocate(like, sizes_of(like), like.scalar_type()) : nothing(like);
    if (zeros) {
      clear(result, call.stream());
    }
    return result;
  }

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
// queries.
int gradient_shift(const Call& call, bool wants_query) {
  constexpr int kMostShift = 10;
  constexpr int kFewestShift = 6;
  const int64_t heads = call.problem.heads;
  const int64_t chunks = (call.problem.dim + kGradientFeatures - 1) / kGradientFeatures;
  const int64_t blocks = std::max<int64_t>(call.batch() * heads * chunks, 1);
  const int64_t splits = 4 * processors() / blocks + 1;
  const int64_t bytes = call.query_rows() * heads * call.problem.dim * 4;
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
    base_.key_shift = gradient_shift(call, gradients.wants_query);
    const int64_t splits = ((call.longest_key() - 1) >> base_.key_shift) + 1;
    if (gradients.wants_query && splits > 1) {
      const int64_t chunks = (problem.dim + kGradientFeatures - 1) / kGradientFeatures;
      partial_dquery_ = call.floats({splits, rows, problem.heads, problem.dim});
      left_out_ = call.floats({splits, rows, problem.heads, chunks, 2});
      base_.partial_dquery = static_cast<float*>(partial_dquery_->data_ptr());
      base_.left_out = static_cast<float2*>(left_out_->data_ptr());
    }
    if (gradients.wants_weight) {
      tiles_ = call.key_tiles(base_.key_shift);
      all_tiles_ = tiles_ * waves;
      partial_dweight_ = call.floats({all_tiles_, problem.heads, problem.dim});
      dscore_weight_ = score_weight_rows(gradients.dscore_weight);
    }
  }

  void run(int64_t wave, const Scores& dscores) const {
    if (!gradients_.wants_scores()) {
      return;
    }
    GradientCall gradient = base_;
    gradient.problem = call_.problem;
    gradient.dscores = dscores;
    if (partial_dweight_.has_value()) {
      gradient.partial_dweight = static_cast<float*>(partial_dweight_->data_ptr()) +
                                 wave * tiles_ * call_.problem.heads * call_.problem.dim;
    }
    launch_gradient(gradient, call_.stream());
    if (gradient.partial_dquery != nullptr) {
      launch_merge_dquery(gradient, call_.stream());
    }
  }

  void finish() const {
    if (partial_dweight_.has_value()) {
      launch_merge_dweight(static_cast<const float*>(partial_dweight_->data_ptr()), all_tiles_,
                           call_.problem.heads, call_.problem.dim, dscore_weight_, call_.stream());
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
  int64_t all_tiles_ = 0;
};

void value_gradient(const Call& call, const Gradients& gradients, const Rows& dcontext,
                    const Scores& alpha) {
  if (!gradients.wants_value) {
    return;
  }
  WeightedCall weighted;
  weighted.problem = call.problem;
  weighted.by_key = true;
  weighted.alpha = alpha;
  weighted.rows = dcontext;
  weighted.out = rows_of(gradients.dvalue);
  weighted.sums = gradients.dvalue_sums();
  launch_weighted(weighted, call.stream());
}

// What comes in from the outputs.
struct Incoming {
  const OptionalTensor& dcontext;
  const OptionalTensor& dweights;
  const Tensor& stats;
  bool weights_by_key;
};

// alpha and s of a wave's queries.
void softmax_gradient(const Call& call, const Incoming& incoming, bool wants_scores,
                      const Scores& alpha, const Scores& dscores) {
  const Problem& problem = call.problem;
  const auto run = call.one_step() ? launch_step_inner : launch_inner;
  run(inner_call(call, kScores, problem.query, problem.key, problem.dim, alpha), call.stream());
  SoftmaxGradientCall softmax;
  softmax.problem = problem;
  softmax.scores = alpha;
  softmax.dalpha = dscores;
  softmax.stats = rows_of(incoming.stats);
  softmax.one_step = call.one_step();
  if (incoming.dweights.has_value()) {
    softmax.dweights = weights_of(*incoming.dweights, incoming.weights_by_key);
  }
  if (incoming.dcontext.has_value() && wants_scores) {
    softmax.has_dalpha = true;
    run(inner_call(call, kProducts, rows_of(*incoming.dcontext), problem.value, problem.value_dim,
                   dscores),
        call.stream());
  }
  launch_softmax_gradient(softmax, call.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& score_weight, const Tensor& stats,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, int64_t grad_mask, bool /*deterministic*/) {
  Call call(query, key, value, score_weight,
            {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
            {dropout_p, dropout_seed});
  const Incoming incoming{dcontext, dweights, stats, weights_layout == 2};
  const int64_t rows =
      call.one_step() ? std::max<int64_t>(call.query_rows(), 1) : call.wave_rows(2);
  const int64_t waves = (call.query_rows() + rows - 1) / rows;
  const Gradients gradients(call, query, key, value, score_weight, grad_mask, dcontext.has_value(),
                            waves > 1);
  const std::vector<int64_t> sizes =
      call.one_step() ? std::vector<int64_t>{key.size(0), key.size(1), key.size(2)}
                      : std::vector<int64_t>{rows, call.problem.heads, call.longest_key()};
  const Tensor alpha_room = call.floats(sizes);
  const Tensor dscores_room = call.floats(sizes);
  const auto view = [&](const Tensor& room) {
    return call.one_step() ? key_scores(room) : call.dense_scores(room);
  };
  const Scores alpha = view(alpha_room);
  const Scores dscores = view(dscores_room);
  const GradientPhase phase(call, gradients, waves, rows);
  for (int64_t wave = 0; wave < waves; ++wave) {
    call.begin_wave(wave * rows, rows);
    softmax_gradient(call, incoming, gradients.wants_scores(), alpha, dscores);
    phase.run(wave, dscores);
    if (dcontext.has_value()) {
      value_gradient(call, gradients, rows_of(*dcontext), alpha);
    }
  }
  phase.finish();
  return {gradients.dquery, gradients.dkey, gradients.dvalue, gradients.dscore_weight};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_step_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& /*exp_key*/, const OptionalTensor& /*key_bound*/, const Tensor& stats,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, double dropout_p,
    const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
    bool /*deterministic*/) {
  Call call(query, key, value, score_weight,
            {{}, cu_seqlens_k, key_lengths, key_padding_mask, 1, max_seqlen_k},
            {dropout_p, dropout_seed});
  const Incoming incoming{dcontext, dweights, stats, weights_layout == 2};
  const Gradients gradients(call, query, key, value, score_weight, grad_mask & kGradQuery, true,
                            false);
  const std::vector<int64_t> sizes{key.size(0), key.size(1), key.size(2)};
  Tensor dscores = call.floats(sizes);
  Tensor weights = call.floats(sizes);
  if (call.leaves_rows()) {
    clear(dscores, call.stream());
    clear(weights, call.stream());
  }
  const bool wants_scores = grad_mask & (kGradQuery | kGradKey | kGradScoreWeight);
  softmax_gradient(call, incoming, wants_scores, key_scores(weights), key_scores(dscores));
  const GradientPhase phase(call, gradients, 1, call.query_rows());
  phase.run(0, key_scores(dscores));
  return {gradients.dquery, dscores, weights};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_memory_backward(
    const Tensor& query, const Tensor& dscores, const Tensor& weights, const Tensor& dcontext,
    const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& /*exp_key*/, const OptionalTensor& /*key_bound*/,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, int64_t grad_mask,
    bool /*deterministic*/) {
  const Call call(query, key, value, score_weight,
                  {{}, cu_seqlens_k, key_lengths, key_padding_mask, query.size(0), max_seqlen_k},
                  {}, true);
  const Gradients gradients(call, query, key, value, score_weight, grad_mask & ~kGradQuery, true,
                            false);
  const GradientPhase phase(call, gradients, 1, call.query_rows());
  phase.run(0, key_scores(dscores));
  phase.finish();
  value_gradient(call, gradients, step_rows_of(dcontext), key_scores(weights));
  return {gradients.dkey, gradients.dvalue, gradients.dscore_weight};
}

}  // namespace
}  // namespace cuda
}  // namespace attn_ext

#define ATTN_EXT_INPUTS "Tensor query, Tensor key, Tensor value, Tensor score_weight, "
#define ATTN_EXT_PREPARED "Tensor? exp_key, Tensor? key_bound, "
#define ATTN_EXT_KEY_LAYOUT "Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? key_padding_mask, "
#define ATTN_EXT_LAYOUT \
  "Tensor? cu_seqlens_q, " ATTN_EXT_KEY_LAYOUT "SymInt max_seqlen_q, SymInt max_seqlen_k, "
#define ATTN_EXT_DROPOUT "float dropout_p, Tensor? dropout_seed, int weights_layout, "
#define ATTN_EXT_GRADS "Tensor? dcontext, Tensor? dweights, "

STABLE_TORCH_LIBRARY_FRAGMENT(attn_ext_cuda, m) {
  m.def("additive_attention_forward(" ATTN_EXT_INPUTS ATTN_EXT_PREPARED
            ATTN_EXT_LAYOUT ATTN_EXT_DROPOUT
        "bool deterministic) -> (Tensor context, Tensor weights, Tensor stats)");
  m.def("additive_attention_backward(" ATTN_EXT_GRADS ATTN_EXT_INPUTS
        "Tensor stats, " ATTN_EXT_LAYOUT ATTN_EXT_DROPOUT
        "int grad_mask, bool deterministic) "
        "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dscore_weight)");
  m.def("additive_attention_step_backward(" ATTN_EXT_GRADS ATTN_EXT_INPUTS ATTN_EXT_PREPARED
        "Tensor stats, " ATTN_EXT_KEY_LAYOUT "SymInt max_seqlen_k, " ATTN_EXT_DROPOUT
        "int grad_mask, bool deterministic) -> (Tensor dquery, Tensor dscores, Tensor weights)");
  m.def(
      "additive_attention_memory_backward(Tensor query, Tensor dscores, Tensor weights, "
      "Tensor dcontext, Tensor key, Tensor value, Tensor "
      "score_weight, " ATTN_EXT_PREPARED ATTN_EXT_KEY_LAYOUT
      "SymInt max_seqlen_k, int grad_mask, bool deterministic) "
      "-> (Tensor dkey, Tensor dvalue, Tensor dscore_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext_cuda, ATTN_EXT_CUDA_KEY, m) {
  using namespace attn_ext::cuda;
  m.impl("additive_attention_forward", TORCH_BOX(&additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
  m.impl("additive_attention_step_backward", TORCH_BOX(&additive_attention_step_backward));
  m.impl("additive_attention_memory_backward", TORCH_BOX(&additive_attention_memory_backward));
}
