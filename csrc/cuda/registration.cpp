// The operations of the CUDA backend as PyTorch sees them: allocates outputs and buffers, and puts
// the kernels in order. attn_ext/ops.py hands CUDA tensors on to them.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "gradients.h"

// Tests register the same operations for CPU tensors, over kernels that the host runs.
#ifndef ATTN_EXT_CUDA_KEY
#define ATTN_EXT_CUDA_KEY CUDA
#endif

namespace attn_ext {
namespace cuda {
namespace {

InnerCall inner_call(const Call& call, const Rows& left, const Rows& right, int64_t dim,
                     const Scores& out) {
  InnerCall inner;
  inner.problem = call.problem;
  inner.left = left;
  inner.right = right;
  inner.dim = dim;
  inner.out = out;
  return inner;
}

// Of the wave's queries.
void compute_scores(const Call& call, const Scores& scores) {
  const Problem& problem = call.problem;
  const auto run = call.one_step() ? launch_step_scores : launch_scores;
  run(inner_call(call, problem.query, problem.key, problem.dim, scores), call.stream());
}

// Every sequence's only query: scores, softmax and weighted sum in one kernel, or two if there are
// too few sequences for a block each. Pooling has few queries, whose scores are given.
void forward_step(const Call& call, const Rows& context, const Rows& stats, const Weights& weights,
                  const Scores& given = {}) {
  constexpr int kFewestShift = 6;
  const Problem& problem = call.problem;
  const int64_t processors = cuda::processors();
  StepCall step;
  step.problem = problem;
  step.context = context;
  step.stats = stats;
  step.weights = weights;
  step.scores = given;
  step.scored = given.data != nullptr;
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
  const int64_t parts =
      call.key_tiles(step.key_shift) * problem.heads * problem.sequences.query.longest;
  const Tensor sums = call.floats({parts, problem.value_dim});
  const Tensor part_stats = call.floats({parts, 2});
  step.partial_sums = static_cast<float*>(sums.data_ptr());
  step.partial_stats = static_cast<SoftmaxPart*>(part_stats.data_ptr());
  OptionalTensor scores;
  if (weights.rows.data != nullptr && !step.scored) {
    const bool jagged = problem.sequences.key.offsets.data != nullptr;
    scores = call.floats({jagged ? 1 : call.batch(), problem.sequences.key.rows, problem.heads});
    step.scores = key_scores(*scores);
  }
  launch_step(step, call.stream());
  launch_step_merge(step, call.stream());
}

// `scores` has room for those of so many queries.
void forward_rows(Call& call, const Rows& context, const Rows& stats, const Weights& weights,
                  const Scores& scores, int64_t rows) {
  for (int64_t first = 0; first < call.query_rows(); first += rows) {
    call.begin_wave(first, rows);
    compute_scores(call, scores);
    WeightedCall weighted;
    weighted.problem = call.problem;
    weighted.alpha = scores;
    weighted.rows = call.problem.value;
    weighted.out = context;
    weighted.stats = stats;
    weighted.weights = weights;
    launch_weighted(weighted, call.stream());
  }
}

// What is returned as weights, those by key of this shape, with what they are for absent keys.
Tensor make_weights(const Call& call, const Tensor& value, int64_t weights_layout,
                    const std::vector<int64_t>& by_key) {
  const bool raw = call.problem.raw_scores;
  const ScalarType dtype = raw ? ScalarType::Float : value.scalar_type();
  if (weights_layout == kNoWeights) {
    return nothing(value, dtype);
  }
  const std::vector<int64_t> dense{call.batch(), call.problem.heads, call.max_queries(),
                                   call.max_keys()};
  Tensor weights = allocate(value, weights_layout & kWeightsByKey ? by_key : dense, dtype);
  if (raw) {
    torch::stable::fill_(weights, -std::numeric_limits<double>::infinity());
  } else {
    clear(weights, call.stream());
  }
  return weights;
}

Weights view_weights(const Tensor& weights, int64_t weights_layout) {
  return weights_layout == kNoWeights ? Weights{}
                                      : weights_of(weights, weights_layout & kWeightsByKey);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& /*exp_key*/, const OptionalTensor& /*key_bound*/,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, bool keep_scores, bool /*deterministic*/) {
  Call call(query, key, value, score_weight,
            {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
            dropout_of(dropout_p, dropout_seed), weights_layout);
  const bool raw = call.problem.raw_scores;
  Tensor context = allocate(query, with_last(query, value.size(3)), value.scalar_type());
  Tensor stats = allocate(query, with_last(query, 2), ScalarType::Float);
  const Tensor weights =
      make_weights(call, value, weights_layout, {key.size(1), call.problem.heads});
  if (call.leaves_rows() || raw) {
    clear(context, call.stream());
    clear(stats, call.stream());
  }
  const Weights weights_view = view_weights(weights, weights_layout);
  Tensor scores = call.floats({0});
  if (raw) {
    compute_scores(call, raw_scores(weights, weights_view.by_key));
  } else if (call.one_step()) {
    forward_step(call, rows_of(context), rows_of(stats), weights_view);
  } else {
    const int64_t rows = keep_scores ? std::max<int64_t>(call.query_rows(), 1) : call.wave_rows(1);
    const Tensor room =
        keep_scores
            ? call.floats({query.size(0), query.size(1), call.problem.heads, call.max_keys()})
            : call.floats({1, rows, call.problem.heads, call.longest_key()});
    forward_rows(call, rows_of(context), rows_of(stats), weights_view, dense_scores(room), rows);
    if (keep_scores) {
      scores = room;
    }
  }
  return {context, weights, stats, scores};
}

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

// alpha and s of a wave's queries, from their scores.
void gradient_of_scores(const Call& call, const Incoming& incoming, bool wants_scores,
                        const Scores& scores, const Scores& alpha, const Scores& dscores) {
  const Problem& problem = call.problem;
  SoftmaxGradientCall softmax;
  softmax.problem = problem;
  softmax.scores = scores;
  softmax.alpha = alpha;
  softmax.dalpha = dscores;
  softmax.stats = rows_of(incoming.stats);
  softmax.few_rows = call.few_rows();
  if (incoming.dweights.has_value()) {
    softmax.dweights = weights_of(*incoming.dweights, incoming.weights_by_key);
  }
  if (incoming.dcontext.has_value() && wants_scores) {
    const auto run = call.one_step() ? launch_step_product : launch_product;
    softmax.has_dalpha = true;
    run(inner_call(call, rows_of(*incoming.dcontext), problem.value, problem.value_dim, dscores),
        call.stream());
  }
  launch_softmax_gradient(softmax, call.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& score_weight, const Tensor& stats,
    const Tensor& scores, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, int64_t grad_mask, bool /*deterministic*/) {
  Call call(query, key, value, score_weight,
            {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
            dropout_of(dropout_p, dropout_seed), weights_layout);
  check_dtype("dcontext", dcontext);
  check_dtype("dweights", dweights);
  const bool raw = call.problem.raw_scores;
  const bool has_dcontext = dcontext.has_value() && !raw;
  const bool by_key = weights_layout & kWeightsByKey;
  const Incoming incoming{dcontext, dweights, stats, by_key};
  const bool kept = scores.dim() > 3 && !call.one_step();
  const int64_t rows =
      call.one_step() || kept ? std::max<int64_t>(call.query_rows(), 1) : call.wave_rows(2);
  const int64_t waves = (call.query_rows() + rows - 1) / rows;
  const Gradients gradients(call, query, key, value, score_weight, grad_mask, has_dcontext,
                            waves > 1);
  const std::vector<int64_t> sizes =
      raw               ? std::vector<int64_t>{0, 0, 0, 0}  // s is what comes in
      : call.one_step() ? std::vector<int64_t>{key.size(0), key.size(1), key.size(2)}
                        : std::vector<int64_t>{1, rows, call.problem.heads, call.longest_key()};
  const Tensor alpha_room = call.floats(sizes);
  const Tensor dscores_room = call.floats(sizes);
  const auto view = [&](const Tensor& room) {
    return call.one_step() ? key_scores(room) : dense_scores(room);
  };
  const Scores alpha = view(alpha_room);
  const Scores dscores = raw ? raw_scores(*dweights, by_key) : view(dscores_room);
  const GradientPhase phase(call, gradients, waves, rows);
  for (int64_t wave = 0; wave < waves; ++wave) {
    call.begin_wave(wave * rows, rows);
    if (!raw && !kept) {
      compute_scores(call, alpha);
    }
    if (!raw) {
      gradient_of_scores(call, incoming, gradients.wants_scores(),
                         kept ? dense_scores(scores) : alpha, alpha, dscores);
    }
    phase.run(dscores);
    if (has_dcontext) {
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
    const Tensor& /*scores*/, const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, double dropout_p,
    const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
    bool /*deterministic*/) {
  Call call(query, key, value, score_weight,
            {{}, cu_seqlens_k, key_lengths, key_padding_mask, 1, max_seqlen_k},
            dropout_of(dropout_p, dropout_seed), weights_layout);
  check_dtype("dcontext", dcontext);
  check_dtype("dweights", dweights);
  const bool by_key = weights_layout & kWeightsByKey;
  const Incoming incoming{dcontext, dweights, stats, by_key};
  const Gradients gradients(call, query, key, value, score_weight, grad_mask & kGradQuery, true,
                            false);
  const std::vector<int64_t> sizes{key.size(0), key.size(1), key.size(2)};
  Tensor dscores = call.floats(sizes);
  Tensor weights = call.floats(sizes);
  if (call.leaves_rows()) {
    clear(dscores, call.stream());
  }
  if (call.leaves_rows() || call.problem.raw_scores) {
    clear(weights, call.stream());
  }
  const bool wants_scores = grad_mask & (kGradQuery | kGradKey | kGradScoreWeight);
  const Scores alpha = key_scores(weights);
  if (!call.problem.raw_scores) {
    compute_scores(call, alpha);
  }
  gradient_of_scores(call, incoming, wants_scores, alpha, alpha, key_scores(dscores));
  const GradientPhase phase(call, gradients, 1, call.query_rows());
  phase.run(key_scores(dscores));
  return {gradients.dquery, dscores, weights};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_memory_backward(
    const Tensor& query, const Tensor& dscores, const Tensor& weights, const Tensor& dcontext,
    const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& /*exp_key*/, const OptionalTensor& /*key_bound*/,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, int64_t grad_mask,
    bool /*deterministic*/) {
  check_dtype("dcontext", dcontext);
  const Call call(query, key, value, score_weight,
                  {{}, cu_seqlens_k, key_lengths, key_padding_mask, query.size(0), max_seqlen_k},
                  {}, kNoWeights, true);
  const Gradients gradients(call, query, key, value, score_weight, grad_mask & ~kGradQuery, true,
                            false);
  const GradientPhase phase(call, gradients, 1, call.query_rows());
  phase.run(key_scores(dscores));
  phase.finish();
  value_gradient(call, gradients, step_rows_of(dcontext), key_scores(weights));
  return {gradients.dkey, gradients.dvalue, gradients.dscore_weight};
}

PoolCall pool_call(const Call& call, const OptionalTensor& gate, double tanh_dropout_p,
                   double gate_dropout_p, const OptionalTensor& seed) {
  check_dtype("gate", gate);
  PoolCall pool;
  pool.problem = call.problem;
  if (gate.has_value()) {
    pool.gate = rows_of(*gate);
  }
  pool.feature_dropout[0] = dropout_of(tanh_dropout_p, seed);
  pool.feature_dropout[1] = dropout_of(gate_dropout_p, seed);
  return pool;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_pool_forward(
    const Tensor& key, const Tensor& value, const Tensor& score_weight, const OptionalTensor& gate,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, double tanh_dropout_p,
    double gate_dropout_p, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, bool keep_scores, bool /*deterministic*/) {
  const Call call(key, value, score_weight,
                  {{}, cu_seqlens_k, key_lengths, key_padding_mask, 0, max_seqlen_k},
                  dropout_of(dropout_p, dropout_seed), weights_layout);
  const bool raw = call.problem.raw_scores;
  const int64_t heads = key.size(2);
  const int64_t branches = score_weight.size(1);
  Tensor context =
      allocate(key, {call.batch(), branches, heads, value.size(3)}, value.scalar_type());
  Tensor stats = call.floats({call.batch(), branches, heads, 2});
  Tensor scores = raw ? call.floats({0}) : call.floats({key.size(0), key.size(1), heads, branches});
  if (call.leaves_rows() || raw) {
    clear(context, call.stream());
    clear(stats, call.stream());
    clear(scores, call.stream());
  }
  const Tensor weights = make_weights(call, value, weights_layout, {key.size(1), heads, branches});
  const Weights weights_view = view_weights(weights, weights_layout);
  PoolCall pool = pool_call(call, gate, tanh_dropout_p, gate_dropout_p, dropout_seed);
  pool.scores = raw ? raw_scores(weights, weights_view.by_key) : branch_scores(scores);
  launch_pool_scores(pool, call.stream());
  if (!raw) {
    forward_step(call, rows_of(context), rows_of(stats), weights_view, pool.scores);
  }
  return {context, weights, stats, keep_scores ? scores : call.floats({0})};
}

// dkey, dgate and dscore_weight from s.
void pool_gradient(const Call& call, const Gradients& gradients, PoolCall pool) {
  const Problem& problem = pool.problem;
  if (gradients.wants_key) {
    pool.dkey = rows_of(gradients.dkey);
  }
  if (!gradients.wants_weight) {
    launch_pool_gradient(pool, call.stream());
    return;
  }
  const Tensor& dweight = gradients.dscore_weight;  // [H, K, D]
  const int64_t rows = problem.heads * dweight.size(1);
  const int64_t tiles = call.key_tiles(kPoolShift);
  const Tensor partial = call.floats({tiles, rows, problem.dim});
  pool.partial_dweight = static_cast<float*>(partial.data_ptr());
  launch_pool_gradient(pool, call.stream());
  launch_merge_dweight(pool.partial_dweight, tiles, rows, problem.dim,
                       view(dweight, 0, 0, dweight.stride(1), dweight.stride(2)), call.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_pool_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& key,
    const Tensor& value, const Tensor& score_weight, const OptionalTensor& gate,
    const Tensor& stats, const Tensor& scores, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_k,
    double tanh_dropout_p, double gate_dropout_p, double dropout_p,
    const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
    bool /*deterministic*/) {
  const Call call(key, value, score_weight,
                  {{}, cu_seqlens_k, key_lengths, key_padding_mask, 0, max_seqlen_k},
                  dropout_of(dropout_p, dropout_seed), weights_layout);
  check_dtype("dcontext", dcontext);
  check_dtype("dweights", dweights);
  const bool raw = call.problem.raw_scores;
  const bool has_dcontext = dcontext.has_value() && !raw;
  const bool by_key = weights_layout & kWeightsByKey;
  const bool wants_gate = gate.has_value() && (grad_mask & kGradGate);
  // There is no query to want a gradient of.
  const Gradients gradients(call, key, key, value, score_weight, grad_mask & ~kGradQuery,
                            has_dcontext, false);
  const Tensor dgate = Gradients::make(call, gate.value_or(key), wants_gate, call.leaves_rows());
  const bool wants_scores = gradients.wants_scores() || wants_gate;
  PoolCall pool = pool_call(call, gate, tanh_dropout_p, gate_dropout_p, dropout_seed);
  if (wants_gate) {
    pool.dgate = rows_of(dgate);
  }
  const bool kept = scores.dim() > 1;
  const int64_t rows = raw ? 0 : key.size(1);  // of raw scores s is what comes in
  const std::vector<int64_t> sizes{key.size(0), rows, key.size(2), score_weight.size(1)};
  const Tensor alpha = call.floats(sizes);
  const Tensor dscores = call.floats(sizes);
  if (raw) {
    pool.scores = raw_scores(dweights.value(), by_key);
  } else {
    pool.scores = branch_scores(alpha);
    if (!kept) {
      launch_pool_scores(pool, call.stream());
    }
    pool.scores = branch_scores(dscores);
    gradient_of_scores(call, {dcontext, dweights, stats, by_key}, wants_scores,
                       branch_scores(kept ? scores : alpha), branch_scores(alpha), pool.scores);
  }
  if (wants_scores) {
    pool_gradient(call, gradients, pool);
  }
  if (has_dcontext) {
    value_gradient(call, gradients, rows_of(*dcontext), branch_scores(alpha));
  }
  return {gradients.dkey, gradients.dvalue, gradients.dscore_weight, dgate};
}

}  // namespace
}  // namespace cuda
}  // namespace attn_ext

// attn_ext/ops.py defines their schemas.
STABLE_TORCH_LIBRARY_IMPL(attn_ext_cuda, ATTN_EXT_CUDA_KEY, m) {
  using namespace attn_ext::cuda;
  m.impl("additive_attention_forward", TORCH_BOX(&additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
  m.impl("additive_pool_forward", TORCH_BOX(&additive_pool_forward));
  m.impl("additive_pool_backward", TORCH_BOX(&additive_pool_backward));
  m.impl("additive_attention_step_backward", TORCH_BOX(&additive_attention_step_backward));
  m.impl("additive_attention_memory_backward", TORCH_BOX(&additive_attention_memory_backward));
}
