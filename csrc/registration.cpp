// The operations of the CPU backend: describes tensors, allocates outputs, calls the drivers.
#include <algorithm>

#include "cpu/call.h"
#include "kept_memory.h"
#include "operations.h"

namespace attn_ext {
namespace {

Problem describe(const Inputs& inputs) {
  const Tensor& key = inputs.key;
  Problem problem;
  describe_operands(inputs, problem);
  Layout& layout = problem.layout;
  layout.query_batch = inputs.query_batch();
  layout.query_rows = inputs.query_rows();
  layout.key_batch = key.size(0);
  layout.key_rows = key.size(1);
  layout.query_offsets = integers_of(inputs.cu_seqlens_q);
  layout.key_offsets = integers_of(inputs.cu_seqlens_k);
  layout.key_lengths = integers_of(inputs.key_lengths);
  STD_TORCH_CHECK(layout.key_lengths.data == nullptr || layout.key_lengths.size == key.size(0),
                  "attn_ext: key_lengths has another batch size than key");
  if (inputs.key_padding_mask.has_value()) {
    layout.mask = mask_of(*inputs.key_padding_mask, key.size(0), key.size(1));
  }
  layout.max_queries = inputs.max_seqlen_q;
  layout.max_keys = inputs.max_seqlen_k;
  if (inputs.pools) {
    problem.weight_rows = inputs.query_rows();
  }
  if (inputs.exp_key.has_value()) {
    STD_TORCH_CHECK(inputs.key_bound.has_value(), "attn_ext: exp_key comes with key_bound");
    problem.exp_key = rows_of(*inputs.exp_key);
    problem.key_bound = rows_of(*inputs.key_bound);
  }
  problem.weights_layout = inputs.by_key() ? PairLayout::kByKey : PairLayout::kDense;
  problem.scores_layout = inputs.scores_by_key() ? PairLayout::kByKey : PairLayout::kByQuery;
  problem.find_sequences();
  return problem;
}

// Whether forward computes a score for every number of what is kept.
bool fills_scores(const Problem& problem) {
  if (problem.scores_layout == PairLayout::kByKey) {
    return problem.covers_keys;
  }
  const auto& sequences = problem.sequences;
  return problem.covers_queries && std::all_of(sequences.begin(), sequences.end(), [&](auto& each) {
           return each.key_count == problem.layout.longest_key();
         });
}

// Numbers of keys and values from which their gradients, 16 MiB in float32, are streamed: more than
// a core's share of most caches.
constexpr int64_t kSmallestStreamed = int64_t{1} << 22;

// The gradients of grad_mask, given what comes in.
Gradients gradients(const Inputs& inputs, const Problem& problem, BackwardArguments arguments,
                    int64_t grad_mask) {
  const auto& [query, key, value, score_weight] =
      std::tie(inputs.query, inputs.key, inputs.value, inputs.score_weight);
  if (!inputs.gate.has_value()) {
    grad_mask &= ~kGradGate;
  }
  // A gradient and its view, without elements unless it is wanted.
  const auto gradient = [&](const Tensor& like, int64_t bit, bool zeros, Rows& rows) {
    Tensor result = grad_mask & bit
                        ? allocate_large(like, like.scalar_type(), zeros, inputs.deterministic)
                        : nothing(like, like.scalar_type());
    rows = wanted_rows(result);
    return result;
  };
  // What a key-side gradient that gathers over several waves does so in: the compute type.
  const auto gathers = [&](const Tensor& like, const Rows& result, Rows& rows) {
    OptionalTensor sums;
    if (result.data != nullptr && like.scalar_type() != compute_type(like) && !inputs.pools) {
      sums = allocate_large(like, compute_type(like), false, inputs.deterministic);
    }
    rows = sums.has_value() ? rows_of(*sums) : result;
    return sums;
  };
  const bool has_dcontext = arguments.dcontext.data != nullptr;
  const bool leaves_keys = !problem.covers_keys;
  Tensor dquery = gradient(query, kGradQuery, !problem.covers_queries, arguments.dquery);
  Tensor dkey = gradient(key, kGradKey, leaves_keys, arguments.dkey);
  Tensor dvalue = gradient(value, kGradValue, leaves_keys || !has_dcontext, arguments.dvalue);
  Tensor dgate = gradient(inputs.gate.value_or(key), kGradGate, leaves_keys, arguments.dgate);
  const OptionalTensor dkey_sum = gathers(key, arguments.dkey, arguments.dkey_sum);
  const OptionalTensor dvalue_sum = gathers(value, arguments.dvalue, arguments.dvalue_sum);
  Tensor dscore_weight = nothing(score_weight, score_weight.scalar_type());
  if (grad_mask & kGradScoreWeight) {
    dscore_weight = allocate(score_weight, sizes_of(score_weight), score_weight.scalar_type());
    arguments.dscore_weight = score_weight_rows(dscore_weight);
  }
  arguments.problem = &problem;
  arguments.needs_scores |= (grad_mask & ~kGradValue) != 0;
  arguments.needs_weights = (grad_mask & kGradValue) && has_dcontext;
  arguments.streams = key.numel() + value.numel() >= kSmallestStreamed;
  run_backward(arguments);
  return {dquery, dkey, dvalue, dscore_weight, dgate};
}

// A view of scores that forward keeps, without data where it kept none.
Rows score_rows(const Inputs& inputs, const Tensor& scores) {
  return scores.dim() > 1 && inputs.scores_by_key() ? key_score_rows(scores) : wanted_rows(scores);
}

// The incoming gradients and what forward left.
BackwardArguments arguments_of(const Inputs& inputs, const Incoming& incoming) {
  BackwardArguments arguments;
  if (incoming.dcontext.has_value()) {
    arguments.dcontext = rows_of(*incoming.dcontext);
  }
  if (incoming.dweights.has_value()) {
    arguments.dweights = weight_rows(*incoming.dweights, inputs.by_key());
  }
  arguments.stats = rows_of(incoming.stats);
  arguments.scores = score_rows(inputs, incoming.scores);
  return arguments;
}

struct Cpu {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& inputs,
                                                            bool keep_scores) {
    Problem problem = describe(inputs);
    problem.is_short = problem.is_short && !problem.raw_scores;
    const Tensor& key = inputs.key;
    const bool zeros = !problem.covers_queries || problem.raw_scores;
    const ScalarType compute = compute_type(key);
    Tensor context =
        allocate(key, inputs.by_query(problem.value_dim), inputs.value.scalar_type(), zeros);
    Tensor stats = allocate(key, inputs.by_query(2), compute, zeros);
    Tensor weights = allocate_weights(inputs);
    Tensor scores = nothing(key, compute);
    const bool has_weights = inputs.weights_layout != kNoWeights;
    ForwardArguments arguments;
    arguments.problem = &problem;
    arguments.context = rows_of(context);
    arguments.stats = rows_of(stats);
    if (has_weights) {
      arguments.weights = weight_rows(weights, inputs.by_key());
    }
    if (keep_scores || (has_weights && !problem.raw_scores)) {
      scores = allocate(key, inputs.of_scores(), compute, keep_scores && !fills_scores(problem));
      arguments.scores = score_rows(inputs, scores);
    }
    arguments.keeps_scores = keep_scores;
    run_forward(arguments);
    return {context, weights, stats, keep_scores ? scores : nothing(key, compute)};
  }

  static Gradients backward(const Inputs& inputs, const Incoming& incoming) {
    return gradients(inputs, describe(inputs), arguments_of(inputs, incoming), incoming.grad_mask);
  }

  static std::tuple<Tensor, Tensor, Tensor> step_backward(const Inputs& inputs,
                                                          const Incoming& incoming) {
    const Problem problem = describe(inputs);
    const ScalarType compute = compute_type(inputs.key);
    Tensor dscores = allocate(inputs.key, inputs.of_keys(), compute, !problem.covers_keys);
    Tensor weights = allocate(inputs.key, inputs.of_keys(), compute, !problem.covers_keys);
    BackwardArguments arguments = arguments_of(inputs, incoming);
    arguments.step_dscores = key_score_rows(dscores);
    arguments.step_weights = key_score_rows(weights);
    arguments.needs_scores = incoming.grad_mask & (kGradKey | kGradScoreWeight);
    const Gradients result = gradients(inputs, problem, arguments, incoming.grad_mask & kGradQuery);
    return {result.query, dscores, weights};
  }

  static Gradients memory_backward(const Inputs& inputs, const Tensor& dscores,
                                   const Tensor& weights, const Tensor& dcontext,
                                   int64_t grad_mask) {
    BackwardArguments arguments;
    arguments.dcontext = step_rows_of(dcontext);
    arguments.step_dscores = key_score_rows(dscores, 1);
    arguments.step_weights = key_score_rows(weights, 1);
    arguments.from_steps = true;
    return gradients(inputs, describe(inputs), arguments, grad_mask);
  }
};

std::tuple<Tensor, Tensor> additive_attention_prepare(const Tensor& key) {
  const ScalarType compute = compute_type(key);
  Tensor exp_key = allocate_large(key, compute, false, false);
  Tensor key_bound = allocate(key, {key.size(0), key.size(1), key.size(2)}, compute);
  run_prepare(rows_of(key), sizes_of(key), exp_key.data_ptr(), key_bound.data_ptr());
  return {exp_key, key_bound};
}

}  // namespace
}  // namespace attn_ext

STABLE_TORCH_LIBRARY_FRAGMENT(attn_ext, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_use_isa(str name) -> ()");
  m.def("cpu_empty_cache() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&attn_ext::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&attn_ext::cpu_isas));
  m.impl("cpu_use_isa", TORCH_BOX(&attn_ext::use_cpu_isa));
  m.impl("cpu_empty_cache", TORCH_BOX(&attn_ext::release_kept_memory));
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, m) {
  attn_ext::Operations<attn_ext::Cpu>::implement(m);
  m.impl("additive_attention_prepare", TORCH_BOX(&attn_ext::additive_attention_prepare));
}
