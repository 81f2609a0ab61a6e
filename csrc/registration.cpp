// The operations of the CPU backend as PyTorch sees them: unpacks tensors, allocates outputs, calls
// the drivers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/driver.h"
#include "cpu/geometry.h"
#include "cpu/gradient_tensor.h"
#include "cpu/isa.h"

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

// What every operation shares: the problem, and which rows of the outputs it will write.
struct Setup {
  Problem problem;
  Coverage coverage;
  int64_t query_batch;
  int64_t query_rows;
  int64_t batch;
  int64_t longest_query;
  int64_t longest_key;

  // Of a tensor with `last` numbers a query and head.
  std::vector<int64_t> by_query(int64_t last) const {
    return {query_batch, query_rows, problem.heads, last};
  }
};

// Fills everything but the sequences and what only some operations have.
void describe_tensors(const Tensor& query, const Tensor& key, const Tensor& value,
                      const Tensor& score_weight, const OptionalTensor& exp_key,
                      const OptionalTensor& key_bound, Problem& problem) {
  problem.heads = query.size(2);
  problem.dim = query.size(3);
  problem.value_dim = value.size(3);
  problem.query = rows_of(query);
  problem.key = rows_of(key);
  problem.value = rows_of(value);
  problem.score_weight = score_weight_rows(score_weight);
  problem.is_short = is_short(query) && is_short(key) && is_short(value) && is_short(score_weight);
  if (exp_key.has_value()) {
    STD_TORCH_CHECK(key_bound.has_value(), "attn_ext: exp_key comes with key_bound");
    problem.exp_key = rows_of(*exp_key);
    problem.key_bound = rows_of(*key_bound);
  }
}

// Adds the sequences.
void describe_layout(const Layout& layout, int64_t weights_layout, Setup& setup) {
  setup.problem.weights_by_key = weights_layout & kWeightsByKey;
  setup.problem.raw_scores = weights_layout & kRaw;
  setup.query_batch = layout.query_batch;
  setup.query_rows = layout.query_rows;
  setup.coverage = describe_sequences(layout, setup.problem);
  setup.batch = static_cast<int64_t>(setup.problem.sequences.size());
  setup.longest_query =
      layout.query_offsets.data != nullptr ? layout.max_queries : layout.query_rows;
  setup.longest_key = layout.key_offsets.data != nullptr ? layout.max_keys : layout.key_rows;
}

// With `step_major`, query is [S, B, H, D]: its rows are the steps.
Setup describe(const Tensor& query, const Tensor& key, const Tensor& value,
               const Tensor& score_weight, const OptionalTensor& exp_key,
               const OptionalTensor& key_bound, const SequenceArguments& sequences,
               double dropout_p, const OptionalTensor& dropout_seed, int64_t weights_layout,
               bool step_major = false) {
  Setup setup;
  const Layout layout =
      layout_of(query.size(step_major ? 1 : 0), query.size(step_major ? 0 : 1), key, sequences);
  describe_tensors(query, key, value, score_weight, exp_key, key_bound, setup.problem);
  if (step_major) {
    setup.problem.query = step_rows_of(query);
  }
  setup.problem.dropout = dropout_of(dropout_p, dropout_seed);
  setup.problem.scores_by_key = !sequences.cu_seqlens_q.has_value() && layout.query_rows == 1;
  describe_layout(layout, weights_layout, setup);
  return setup;
}

// Dropout of pooling: of the factors of the hidden rows, and of weights.
struct PoolDropout {
  double tanh_p;
  double gate_p;
  double weights_p;
  OptionalTensor seed;
};

// Pooling: the K rows of score weights [H, K, D] are the queries of every sequence.
Setup describe_pool(const Tensor& key, const Tensor& value, const Tensor& score_weight,
                    const OptionalTensor& gate, const SequenceArguments& sequences,
                    const PoolDropout& dropout, int64_t weights_layout) {
  Setup setup;
  Problem& problem = setup.problem;
  const int64_t batch = sequences.cu_seqlens_k.has_value()
                            ? std::max<int64_t>(sequences.cu_seqlens_k->size(0) - 1, 0)
                            : key.size(0);
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
  describe_layout(layout_of(batch, score_weight.size(1), key, sequences), weights_layout, setup);
  return setup;
}

Tensor allocate_weights(const Setup& setup, const Tensor& key, const Tensor& value,
                        int64_t weights_layout) {
  const ScalarType dtype = setup.problem.raw_scores ? compute_type(key) : value.scalar_type();
  if (weights_layout == kNoWeights) {
    return nothing(value, dtype);
  }
  const int64_t heads = setup.problem.heads;
  std::vector<int64_t> sizes{setup.batch, heads, setup.longest_query, setup.longest_key};
  if (setup.problem.weights_by_key) {
    sizes = {key.size(1), heads};
    if (setup.problem.keys_alone) {
      sizes.push_back(setup.query_rows);
    }
  }
  return torch::stable::fill_(
      allocate(value, sizes, dtype),
      setup.problem.raw_scores ? -std::numeric_limits<double>::infinity() : 0);
}

// Whether forward computes a score for every number of allocate_scores().
bool fills_scores(const Setup& setup) {
  if (setup.problem.scores_by_key) {
    return setup.coverage.keys;
  }
  const auto& sequences = setup.problem.sequences;
  return setup.coverage.queries && std::all_of(sequences.begin(), sequences.end(), [&](auto& each) {
           return each.key_count == setup.longest_key;
         });
}

// [.., Nk, H] where each sequence has one query, [.., Nk, H, Nq] in pooling, else [.., Nq, H,
// max_seqlen_k].
Tensor allocate_scores(const Setup& setup, const Tensor& key, bool zeros) {
  std::vector<int64_t> sizes = setup.by_query(setup.longest_key);
  if (setup.problem.scores_by_key) {
    sizes = {key.size(0), key.size(1), key.size(2)};
    if (setup.problem.keys_alone) {
      sizes.push_back(setup.query_rows);
    }
  }
  return allocate(key, sizes, compute_type(key), zeros);
}

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
ForwardResults forward(const Setup& setup, const Tensor& key, const Tensor& value,
                       int64_t weights_layout, bool keep_scores) {
  const bool zeros = !setup.coverage.queries || setup.problem.raw_scores;
  const ScalarType compute = compute_type(key);
  Tensor context = allocate(key, setup.by_query(value.size(3)), value.scalar_type(), zeros);
  Tensor stats = allocate(key, setup.by_query(2), compute, zeros);
  Tensor weights = allocate_weights(setup, key, value, weights_layout);
  const bool needs_scores =
      keep_scores || (weights_layout != kNoWeights && !setup.problem.raw_scores);
  Tensor scores = nothing(key, compute);
  ForwardCall<T> call;
  call.problem = &setup.problem;
  call.context = rows_of(context);
  call.stats = rows_of(stats);
  if (weights_layout != kNoWeights) {
    call.weights = weight_rows(weights, setup.problem.weights_by_key);
  }
  if (needs_scores) {
    scores = allocate_scores(setup, key, keep_scores && !fills_scores(setup));
    call.scores = rows_of(scores);
  }
  call.keeps_scores = keep_scores;
  run_forward<T>(call);
  if (needs_scores && !keep_scores) {
    scores = nothing(key, compute);
  }
  return {context, weights, stats, scores};
}

ForwardResults additive_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& exp_key, const OptionalTensor& key_bound,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, bool keep_scores, bool /*deterministic*/,
    const std::string& /*backend*/) {
  Setup setup = describe(
      query, key, value, score_weight, exp_key, key_bound,
      {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
      dropout_p, dropout_seed, weights_layout);
  setup.problem.is_short = setup.problem.is_short && !setup.problem.raw_scores;
  const auto run = computes_in_double(query) ? forward<double> : forward<float>;
  return run(setup, key, value, weights_layout, keep_scores);
}

ForwardResults additive_pool_forward(const Tensor& key, const Tensor& value,
                                     const Tensor& score_weight, const OptionalTensor& gate,
                                     const OptionalTensor& cu_seqlens_k,
                                     const OptionalTensor& key_lengths,
                                     const OptionalTensor& key_padding_mask, int64_t max_seqlen_k,
                                     double tanh_dropout_p, double gate_dropout_p, double dropout_p,
                                     const OptionalTensor& dropout_seed, int64_t weights_layout,
                                     bool keep_scores, bool /*deterministic*/,
                                     const std::string& /*backend*/) {
  const Setup setup =
      describe_pool(key, value, score_weight, gate,
                    {{}, cu_seqlens_k, key_lengths, key_padding_mask, 0, max_seqlen_k},
                    {tanh_dropout_p, gate_dropout_p, dropout_p, dropout_seed}, weights_layout);
  const auto run = computes_in_double(key) ? forward<double> : forward<float>;
  return run(setup, key, value, weights_layout, keep_scores);
}

// Key-side gradients that gather over several waves do so in the compute type.
struct KeyGradient {
  Tensor result;
  OptionalTensor sums;

  KeyGradient(bool wanted, const Tensor& like, bool gathers, bool zeros, bool deterministic)
      : result(wanted ? allocate_gradient(like, like.scalar_type(), zeros, deterministic)
                      : nothing(like, like.scalar_type())) {
    if (wanted && gathers && like.scalar_type() != compute_type(like)) {
      sums = allocate_gradient(like, compute_type(like), false, deterministic);
    }
  }

  void set(bool wanted, Rows& target, Rows& gathered) const {
    if (wanted) {
      target = rows_of(result);
      gathered = sums.has_value() ? rows_of(*sums) : target;
    }
  }
};

Tensor weight_gradient(bool wanted, const Tensor& score_weight) {
  return wanted ? allocate(score_weight, sizes_of(score_weight), score_weight.scalar_type(), false)
                : nothing(score_weight, score_weight.scalar_type());
}

// Numbers of keys and values from which their gradients, 16 MiB in float32, are streamed: more than
// a core's share of most caches.
constexpr int64_t kSmallestStreamed = int64_t{1} << 22;

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Setup& setup, BackwardCall<T> call,
                                                    const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& score_weight,
                                                    int64_t grad_mask, bool deterministic,
                                                    bool from_steps) {
  const bool wants_query = grad_mask & kGradQuery;
  const bool wants_key = grad_mask & kGradKey;
  const bool wants_value = grad_mask & kGradValue;
  const bool wants_weight = grad_mask & kGradScoreWeight;
  Tensor dquery = wants_query ? allocate_gradient(query, query.scalar_type(),
                                                  !setup.coverage.queries, deterministic)
                              : nothing(query, query.scalar_type());
  const bool has_dcontext = call.dcontext.data != nullptr;
  const bool gathers = !setup.problem.keys_alone;
  const KeyGradient dkey(wants_key, key, gathers, !setup.coverage.keys, deterministic);
  const KeyGradient dvalue(wants_value, value, gathers, !setup.coverage.keys || !has_dcontext,
                           deterministic);
  Tensor dscore_weight = weight_gradient(wants_weight, score_weight);
  if (wants_query) {
    call.dquery = rows_of(dquery);
  }
  dkey.set(wants_key, call.dkey, call.dkey_sum);
  dvalue.set(wants_value, call.dvalue, call.dvalue_sum);
  call.problem = &setup.problem;
  call.needs_scores = call.needs_scores || wants_query || wants_key || wants_weight;
  call.needs_weights = wants_value && has_dcontext;
  call.streams = key.numel() + value.numel() >= kSmallestStreamed;
  run_backward<T>(call, from_steps, wants_weight ? score_weight_rows(dscore_weight) : Rows{});
  return {dquery, dkey.result, dvalue.result, dscore_weight};
}

// The incoming gradients and what forward left.
template <class T>
BackwardCall<T> incoming(const OptionalTensor& dcontext, const OptionalTensor& dweights,
                         const Tensor& stats, const Tensor& scores, bool by_key) {
  BackwardCall<T> call;
  if (dcontext.has_value()) {
    call.dcontext = rows_of(*dcontext);
  }
  if (dweights.has_value()) {
    call.dweights = weight_rows(*dweights, by_key);
  }
  call.stats = rows_of(stats);
  if (scores.dim() > 1) {  // else forward kept none
    call.scores = rows_of(scores);
  }
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& score_weight, const Tensor& stats,
    const Tensor& scores, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double dropout_p, const OptionalTensor& dropout_seed,
    int64_t weights_layout, int64_t grad_mask, bool deterministic, const std::string& /*backend*/) {
  const Setup setup = describe(
      query, key, value, score_weight, {}, {},
      {cu_seqlens_q, cu_seqlens_k, key_lengths, key_padding_mask, max_seqlen_q, max_seqlen_k},
      dropout_p, dropout_seed, weights_layout);
  const auto run = [&](auto call) {
    return backward(setup, call, query, key, value, score_weight, grad_mask, deterministic, false);
  };
  const bool by_key = setup.problem.weights_by_key;
  return computes_in_double(query)
             ? run(incoming<double>(dcontext, dweights, stats, scores, by_key))
             : run(incoming<float>(dcontext, dweights, stats, scores, by_key));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_pool_backward(
    const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& key,
    const Tensor& value, const Tensor& score_weight, const OptionalTensor& gate,
    const Tensor& stats, const Tensor& scores, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask, int64_t max_seqlen_k,
    double tanh_dropout_p, double gate_dropout_p, double dropout_p,
    const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
    bool deterministic, const std::string& /*backend*/) {
  const Setup setup =
      describe_pool(key, value, score_weight, gate,
                    {{}, cu_seqlens_k, key_lengths, key_padding_mask, 0, max_seqlen_k},
                    {tanh_dropout_p, gate_dropout_p, dropout_p, dropout_seed}, weights_layout);
  const bool wants_gate = gate.has_value() && (grad_mask & kGradGate);
  const KeyGradient dgate(wants_gate, gate.value_or(key), false, !setup.coverage.keys,
                          deterministic);
  const auto run = [&](auto call) {
    call.needs_scores = wants_gate;
    Rows no_sums;
    dgate.set(wants_gate, call.dgate, no_sums);
    // There is no query, and grad_mask asks for no gradient of one.
    return backward(setup, call, key, key, value, score_weight, grad_mask, deterministic, false);
  };
  const bool by_key = setup.problem.weights_by_key;
  const auto [dquery, dkey, dvalue, dscore_weight] =
      computes_in_double(key) ? run(incoming<double>(dcontext, dweights, stats, scores, by_key))
                              : run(incoming<float>(dcontext, dweights, stats, scores, by_key));
  return {dkey, dvalue, dscore_weight, dgate.result};
}

std::tuple<Tensor, Tensor> additive_attention_prepare(const Tensor& key) {
  const ScalarType compute = compute_type(key);
  Tensor exp_key = allocate(key, sizes_of(key), compute, false);
  Tensor key_bound = allocate(key, {key.size(0), key.size(1), key.size(2)}, compute, false);
  const Rows rows = rows_of(key);
  if (computes_in_double(key)) {
    run_prepare(rows, sizes_of(key), static_cast<double*>(exp_key.data_ptr()),
                static_cast<double*>(key_bound.data_ptr()));
  } else {
    run_prepare(rows, sizes_of(key), static_cast<float*>(exp_key.data_ptr()),
                static_cast<float*>(key_bound.data_ptr()));
  }
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
  const Setup setup =
      describe(query, key, value, score_weight, exp_key, key_bound,
               {{}, cu_seqlens_k, key_lengths, key_padding_mask, query.size(1), max_seqlen_k},
               dropout_p, dropout_seed, weights_layout);
  const std::vector<int64_t> sizes{key.size(0), key.size(1), key.size(2)};
  Tensor dscores = allocate(key, sizes, compute_type(query), !setup.coverage.keys);
  Tensor weights = allocate(key, sizes, compute_type(query), !setup.coverage.keys);
  const auto run = [&](auto call) {
    call.step_dscores = rows_of(dscores);
    call.step_weights = rows_of(weights);
    call.needs_scores = grad_mask & (kGradKey | kGradScoreWeight);
    const int64_t now = grad_mask & kGradQuery;
    return std::get<0>(
        backward(setup, call, query, key, value, score_weight, now, deterministic, false));
  };
  const bool by_key = setup.problem.weights_by_key;
  Tensor dquery = computes_in_double(query)
                      ? run(incoming<double>(dcontext, dweights, stats, scores, by_key))
                      : run(incoming<float>(dcontext, dweights, stats, scores, by_key));
  return {dquery, dscores, weights};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_memory_backward(
    const Tensor& query, const Tensor& dscores, const Tensor& weights, const Tensor& dcontext,
    const Tensor& key, const Tensor& value, const Tensor& score_weight,
    const OptionalTensor& exp_key, const OptionalTensor& key_bound,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, int64_t grad_mask,
    bool deterministic, const std::string& /*backend*/) {
  const Setup setup =
      describe(query, key, value, score_weight, exp_key, key_bound,
               {{}, cu_seqlens_k, key_lengths, key_padding_mask, query.size(0), max_seqlen_k}, 0,
               {}, 0, true);
  const auto run = [&](auto call) {
    call.dcontext = step_rows_of(dcontext);
    call.step_dscores = step_score_rows_of(dscores);
    call.step_weights = step_score_rows_of(weights);
    return backward(setup, call, query, key, value, score_weight, grad_mask & ~kGradQuery,
                    deterministic, true);
  };
  const auto [dquery, dkey, dvalue, dscore_weight] =
      computes_in_double(query) ? run(BackwardCall<double>{}) : run(BackwardCall<float>{});
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
