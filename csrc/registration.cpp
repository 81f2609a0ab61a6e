// The operations of the CPU backend as PyTorch sees them: unpacks tensors, allocates outputs, calls
// the drivers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/call.h"
#include "kept_memory.h"

namespace attn_ext {
namespace {

Layout layout_of(int64_t query_batch, int64_t query_rows, const Tensor& key,
                 const SequenceArguments& arguments) {
  Layout layout;
  layout.query_batch = query_batch;
  layout.query_rows = query_rows;
  layout.key_batch = key.size(0);
  layout.key_rows = key.size(1);
  layout.query_offsets = integers_of(arguments.cu_seqlens_q);
  layout.key_offsets = integers_of(arguments.cu_seqlens_k);
  layout.key_lengths = integers_of(arguments.key_lengths);
  STD_TORCH_CHECK(layout.key_lengths.data == nullptr || layout.key_lengths.size == key.size(0),
                  "attn_ext: key_lengths has another batch size than key");
  if (arguments.key_padding_mask.has_value()) {
    layout.mask = mask_of(*arguments.key_padding_mask, key.size(0), key.size(1));
  }
  layout.max_queries = arguments.max_seqlen_q;
  layout.max_keys = arguments.max_seqlen_k;
  return layout;
}

// To what is known of the problem, once it has a layout.
void add_sequences(int64_t weights_layout, Problem& problem) {
  problem.weights_by_key = weights_layout & kWeightsByKey;
  problem.raw_scores = weights_layout & kRaw;
  problem.find_sequences();
}

// With `step_major`, query is [S, B, H, D]: its rows are the steps.
Problem describe(const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& score_weight, const OptionalTensor& exp_key,
                 const OptionalTensor& key_bound, const SequenceArguments& sequences,
                 double dropout_p, const OptionalTensor& dropout_seed, int64_t weights_layout,
                 bool step_major = false) {
  Problem problem;
  problem.layout =
      layout_of(query.size(step_major ? 1 : 0), query.size(step_major ? 0 : 1), key, sequences);
  problem.heads = query.size(2);
  problem.dim = query.size(3);
  problem.value_dim = value.size(3);
  problem.query = step_major ? step_rows_of(query) : rows_of(query);
  problem.key = rows_of(key);
  problem.value = rows_of(value);
  problem.score_weight = score_weight_rows(score_weight);
  problem.is_short = is_short(query) && is_short(key) && is_short(value) && is_short(score_weight);
  if (exp_key.has_value()) {
    STD_TORCH_CHECK(key_bound.has_value(), "attn_ext: exp_key comes with key_bound");
    problem.exp_key = rows_of(*exp_key);
    problem.key_bound = rows_of(*key_bound);
  }
  problem.dropout = dropout_of(dropout_p, dropout_seed);
  problem.scores_by_key = !sequences.cu_seqlens_q.has_value() && problem.layout.query_rows == 1;
  add_sequences(weights_layout, problem);
  return problem;
}

// Dropout of pooling: of the factors of the hidden rows, and of weights.
struct PoolDropout {
  double tanh_p;
  double gate_p;
  double weights_p;
  OptionalTensor seed;
};

// Pooling: the K rows of score weights [H, K, D] are the queries of every sequence.
Problem describe_pool(const Tensor& key, const Tensor& value, const Tensor& score_weight,
                      const OptionalTensor& gate, const SequenceArguments& sequences,
                      const PoolDropout& dropout, int64_t weights_layout) {
  Problem problem;
  const int64_t batch = sequences.cu_seqlens_k.has_value()
                            ? std::max<int64_t>(sequences.cu_seqlens_k->size(0) - 1, 0)
                            : key.size(0);
  problem.layout = layout_of(batch, score_weight.size(1), key, sequences);
  problem.heads = key.size(2);
  problem.dim = key.size(3);
  problem.value_dim = value.size(3);
  problem.query =
      view(score_weight, 0, score_weight.stride(1), score_weight.stride(0), score_weight.stride(2));
  problem.key = rows_of(key);
  problem.value = rows_of(value);
  problem.keys_alone = true;
  problem.weight_rows = score_weight.size(1);
  if (gate.has_value()) {
    problem.gate = rows_of(*gate);
  }
  problem.feature_dropout[0] = dropout_of(dropout.tanh_p, dropout.seed);
  problem.feature_dropout[1] = dropout_of(dropout.gate_p, dropout.seed);
  problem.dropout = dropout_of(dropout.weights_p, dropout.seed);
  problem.scores_by_key = true;
  add_sequences(weights_layout, problem);
  return problem;
}

// Sizes of a tensor with `last` numbers a query and head.
std::vector<int64_t> by_query(const Problem& problem, int64_t last) {
  return {problem.layout.query_batch, problem.layout.query_rows, problem.heads, last};
}

Tensor allocate_weights(const Problem& problem, const Tensor& key, const Tensor& value,
                        int64_t weights_layout) {
  const ScalarType dtype = problem.raw_scores ? compute_type(key) : value.scalar_type();
  if (weights_layout == kNoWeights) {
    return nothing(value, dtype);
  }
  std::vector<int64_t> sizes{static_cast<int64_t>(problem.sequences.size()), problem.heads,
                             problem.layout.longest_query(), problem.layout.longest_key()};
  if (problem.weights_by_key) {
    sizes = {key.size(1), problem.heads};
    if (problem.keys_alone) {
      sizes.push_back(problem.layout.query_rows);
    }
  }
  return torch::stable::fill_(allocate(value, sizes, dtype),
                              problem.raw_scores ? -std::numeric_limits<double>::infinity() : 0);
}

// Whether forward computes a score for every number of allocate_scores().
bool fills_scores(const Problem& problem) {
  if (problem.scores_by_key) {
    return problem.covers_keys;
  }
  const auto& sequences = problem.sequences;
  return problem.covers_queries && std::all_of(sequences.begin(), sequences.end(), [&](auto& each) {
           return each.key_count == problem.layout.longest_key();
         });
}

// [.., Nk, H] where each sequence has one query, [.., Nk, H, Nq] in pooling, else [.., Nq, H,
// max_seqlen_k].
Tensor allocate_scores(const Problem& problem, const Tensor& key, bool zeros) {
  std::vector<int64_t> sizes = by_query(problem, problem.layout.longest_key());
  if (problem.scores_by_key) {
    sizes = {key.size(0), key.size(1), key.size(2)};
    if (problem.keys_alone) {
      sizes.push_back(problem.layout.query_rows);
    }
  }
  return allocate(key, sizes, compute_type(key), zeros);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results forward(const Problem& problem, const Tensor& key, const Tensor& value,
                int64_t weights_layout, bool keep_scores) {
  const bool zeros = !problem.covers_queries || problem.raw_scores;
  const ScalarType compute = compute_type(key);
  Tensor context = allocate(key, by_query(problem, value.size(3)), value.scalar_type(), zeros);
  Tensor stats = allocate(key, by_query(problem, 2), compute, zeros);
  Tensor weights = allocate_weights(problem, key, value, weights_layout);
  Tensor scores = nothing(key, compute);
  ForwardArguments arguments;
  arguments.problem = &problem;
  arguments.context = rows_of(context);
  arguments.stats = rows_of(stats);
  if (weights_layout != kNoWeights) {
    arguments.weights = weight_rows(weights, problem.weights_by_key);
  }
  if (keep_scores || (weights_layout != kNoWeights && !problem.raw_scores)) {
    scores = allocate_scores(problem, key, keep_scores && !fills_scores(problem));
    arguments.scores = rows_of(scores);
  }
  arguments.keeps_scores = keep_scores;
  run_forward(arguments);
  return {context, weights, stats, keep_scores ? scores : nothing(key, compute)};
}

Results additive_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& exp_key, const OptionalTensor& key_bound,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, bool keep_scores, bool /*deterministic*/,
    const std::string& /*backend*/) {
  Problem problem = describe(
      query, key, value, score_weight, exp_key, key_bound,
      {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
      dropout_p, dropout_seed, weights_layout);
  problem.is_short = problem.is_short && !problem.raw_scores;
  return forward(problem, key, value, weights_layout, keep_scores);
}

Results additive_pool_forward(const Tensor& key, const Tensor& value, const Tensor& score_weight,
                              const OptionalTensor& gate, const OptionalTensor& cu_seqlens_k,
                              const OptionalTensor& key_lengths,
                              const OptionalTensor& key_padding_mask, int64_t max_seqlen_k,
                              double tanh_dropout_p, double gate_dropout_p, double dropout_p,
                              const OptionalTensor& dropout_seed, int64_t weights_layout,
                              bool keep_scores, bool /*deterministic*/,
                              const std::string& /*backend*/) {
  const Problem problem =
      describe_pool(key, value, score_weight, gate,
                    {{}, cu_seqlens_k, key_lengths, key_padding_mask, 0, max_seqlen_k},
                    {tanh_dropout_p, gate_dropout_p, dropout_p, dropout_seed}, weights_layout);
  return forward(problem, key, value, weights_layout, keep_scores);
}

// Key-side gradients that gather over several waves do so in the compute type.
struct KeyGradient {
  Tensor result;
  OptionalTensor sums;

  KeyGradient(bool wanted, const Tensor& like, bool gathers, bool zeros, bool deterministic)
      : result(wanted ? allocate_large(like, like.scalar_type(), zeros, deterministic)
                      : nothing(like, like.scalar_type())) {
    if (wanted && gathers && like.scalar_type() != compute_type(like)) {
      sums = allocate_large(like, compute_type(like), false, deterministic);
    }
  }

  void set(bool wanted, Rows& target, Rows& gathered) const {
    if (wanted) {
      target = rows_of(result);
      gathered = sums.has_value() ? rows_of(*sums) : target;
    }
  }
};

// Numbers of keys and values from which their gradients, 16 MiB in float32, are streamed: more than
// a core's share of most caches.
constexpr int64_t kSmallestStreamed = int64_t{1} << 22;

// The gradients of grad_mask, given what comes in.
Results backward(const Problem& problem, BackwardArguments arguments, const Tensor& query,
                 const Tensor& key, const Tensor& value, const Tensor& score_weight,
                 int64_t grad_mask, bool deterministic) {
  const bool wants_query = grad_mask & kGradQuery;
  const bool wants_key = grad_mask & kGradKey;
  const bool wants_value = grad_mask & kGradValue;
  const bool wants_weight = grad_mask & kGradScoreWeight;
  const bool has_dcontext = arguments.dcontext.data != nullptr;
  const bool gathers = !problem.keys_alone;
  Tensor dquery = nothing(query, query.scalar_type());
  Tensor dscore_weight = nothing(score_weight, score_weight.scalar_type());
  if (wants_query) {
    dquery = allocate_large(query, query.scalar_type(), !problem.covers_queries, deterministic);
    arguments.dquery = rows_of(dquery);
  }
  if (wants_weight) {
    dscore_weight = allocate(score_weight, sizes_of(score_weight), score_weight.scalar_type());
    arguments.dscore_weight = score_weight_rows(dscore_weight);
  }
  const KeyGradient dkey(wants_key, key, gathers, !problem.covers_keys, deterministic);
  const KeyGradient dvalue(wants_value, value, gathers, !problem.covers_keys || !has_dcontext,
                           deterministic);
  dkey.set(wants_key, arguments.dkey, arguments.dkey_sum);
  dvalue.set(wants_value, arguments.dvalue, arguments.dvalue_sum);
  arguments.problem = &problem;
  arguments.needs_scores = arguments.needs_scores || wants_query || wants_key || wants_weight;
  arguments.needs_weights = wants_value && has_dcontext;
  arguments.streams = key.numel() + value.numel() >= kSmallestStreamed;
  run_backward(arguments);
  return {dquery, dkey.result, dvalue.result, dscore_weight};
}

// The incoming gradients and what forward left.
BackwardArguments incoming(const OptionalTensor& dcontext, const OptionalTensor& dweights,
                           const Tensor& stats, const Tensor& scores, int64_t weights_layout) {
  BackwardArguments arguments;
  if (dcontext.has_value()) {
    arguments.dcontext = rows_of(*dcontext);
  }
  if (dweights.has_value()) {
    arguments.dweights = weight_rows(*dweights, weights_layout & kWeightsByKey);
  }
  arguments.stats = rows_of(stats);
  if (scores.dim() > 1) {  // else forward kept none
    arguments.scores = rows_of(scores);
  }
  return arguments;
}

Results additive_attention_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& score_weight, const Tensor& stats,
    const Tensor& scores, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, int64_t grad_mask, bool deterministic, const std::string& /*backend*/) {
  const Problem problem = describe(
      query, key, value, score_weight, {}, {},
      {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
      dropout_p, dropout_seed, weights_layout);
  return backward(problem, incoming(dcontext, dweights, stats, scores, weights_layout), query, key,
                  value, score_weight, grad_mask, deterministic);
}

Results additive_pool_backward(const OptionalTensor& dcontext, const OptionalTensor& dweights,
                               const Tensor& key, const Tensor& value, const Tensor& score_weight,
                               const OptionalTensor& gate, const Tensor& stats,
                               const Tensor& scores, const OptionalTensor& cu_seqlens_k,
                               const OptionalTensor& key_lengths,
                               const OptionalTensor& key_padding_mask, int64_t max_seqlen_k,
                               double tanh_dropout_p, double gate_dropout_p, double dropout_p,
                               const OptionalTensor& dropout_seed, int64_t weights_layout,
                               int64_t grad_mask, bool deterministic,
                               const std::string& /*backend*/) {
  const Problem problem =
      describe_pool(key, value, score_weight, gate,
                    {{}, cu_seqlens_k, key_lengths, key_padding_mask, 0, max_seqlen_k},
                    {tanh_dropout_p, gate_dropout_p, dropout_p, dropout_seed}, weights_layout);
  const bool wants_gate = gate.has_value() && (grad_mask & kGradGate);
  const KeyGradient dgate(wants_gate, gate.value_or(key), false, !problem.covers_keys,
                          deterministic);
  BackwardArguments arguments = incoming(dcontext, dweights, stats, scores, weights_layout);
  Rows no_sums;
  dgate.set(wants_gate, arguments.dgate, no_sums);
  arguments.needs_scores = wants_gate;
  // There is no query, and grad_mask asks for no gradient of one.
  const auto [dquery, dkey, dvalue, dscore_weight] =
      backward(problem, arguments, key, key, value, score_weight, grad_mask, deterministic);
  return {dkey, dvalue, dscore_weight, dgate.result};
}

std::tuple<Tensor, Tensor> additive_attention_prepare(const Tensor& key) {
  const ScalarType compute = compute_type(key);
  Tensor exp_key = allocate_large(key, compute, false, false);
  Tensor key_bound = allocate(key, {key.size(0), key.size(1), key.size(2)}, compute);
  run_prepare(rows_of(key), sizes_of(key), exp_key.data_ptr(), key_bound.data_ptr());
  return {exp_key, key_bound};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_step_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& exp_key, const OptionalTensor& key_bound, const Tensor& stats,
    const Tensor& scores, const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, double dropout_p,
    const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
    bool deterministic, const std::string& /*backend*/) {
  const Problem problem =
      describe(query, key, value, score_weight, exp_key, key_bound,
               {{}, cu_seqlens_k, key_lengths, key_padding_mask, query.size(1), max_seqlen_k},
               dropout_p, dropout_seed, weights_layout);
  const std::vector<int64_t> sizes{key.size(0), key.size(1), key.size(2)};
  Tensor dscores = allocate(key, sizes, compute_type(query), !problem.covers_keys);
  Tensor weights = allocate(key, sizes, compute_type(query), !problem.covers_keys);
  BackwardArguments arguments = incoming(dcontext, dweights, stats, scores, weights_layout);
  arguments.step_dscores = rows_of(dscores);
  arguments.step_weights = rows_of(weights);
  arguments.needs_scores = grad_mask & (kGradKey | kGradScoreWeight);
  const Results gradients = backward(problem, arguments, query, key, value, score_weight,
                                     grad_mask & kGradQuery, deterministic);
  return {std::get<0>(gradients), dscores, weights};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_memory_backward(
    const Tensor& query, const Tensor& dscores, const Tensor& weights, const Tensor& dcontext,
    const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& exp_key, const OptionalTensor& key_bound,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, int64_t grad_mask,
    bool deterministic, const std::string& /*backend*/) {
  const Problem problem =
      describe(query, key, value, score_weight, exp_key, key_bound,
               {{}, cu_seqlens_k, key_lengths, key_padding_mask, query.size(0), max_seqlen_k}, 0,
               {}, 0, true);
  BackwardArguments arguments;
  arguments.dcontext = step_rows_of(dcontext);
  arguments.step_dscores = step_score_rows_of(dscores);
  arguments.step_weights = step_score_rows_of(weights);
  arguments.from_steps = true;
  const auto [dquery, dkey, dvalue, dscore_weight] = backward(
      problem, arguments, query, key, value, score_weight, grad_mask & ~kGradQuery, deterministic);
  return {dkey, dvalue, dscore_weight};
}

std::string cpu_isa_name() { return cpu_isa(); }

std::string cpu_isa_names() { return cpu_isas(); }

void cpu_use_isa(const std::string& name) { use_cpu_isa(name); }

void cpu_empty_cache() { release_kept_memory(); }

}  // namespace
}  // namespace attn_ext

STABLE_TORCH_LIBRARY_FRAGMENT(attn_ext, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_use_isa(str name) -> ()");
  m.def("cpu_empty_cache() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&attn_ext::cpu_isa_name));
  m.impl("cpu_isas", TORCH_BOX(&attn_ext::cpu_isa_names));
  m.impl("cpu_use_isa", TORCH_BOX(&attn_ext::cpu_use_isa));
  m.impl("cpu_empty_cache", TORCH_BOX(&attn_ext::cpu_empty_cache));
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&attn_ext::additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&attn_ext::additive_attention_backward));
  m.impl("additive_pool_forward", TORCH_BOX(&attn_ext::additive_pool_forward));
  m.impl("additive_pool_backward", TORCH_BOX(&attn_ext::additive_pool_backward));
  m.impl("additive_attention_prepare", TORCH_BOX(&attn_ext::additive_attention_prepare));
  m.impl("additive_attention_step_backward",
         TORCH_BOX(&attn_ext::additive_attention_step_backward));
  m.impl("additive_attention_memory_backward",
         TORCH_BOX(&attn_ext::additive_attention_memory_backward));
}
