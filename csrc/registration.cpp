// The operations of the CPU backend: describes tensors, allocates outputs, calls the drivers.
#include <algorithm>

#include "cpu/driver.h"
#include "cpu/geometry.h"
#include "cpu/gradient_tensor.h"
#include "cpu/isa.h"
#include "operations.h"

namespace attn_ext {
namespace {

struct Setup {
  Problem problem;
  Coverage coverage;  // which rows of the outputs will be written
};

Layout layout_of(const Inputs& inputs) {
  const Tensor& key = inputs.key;
  const SequenceArguments& arguments = inputs.sequences;
  Layout layout;
  layout.query_batch = inputs.query_batch();
  layout.query_rows = inputs.query_rows();
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

Setup describe(const Inputs& inputs) {
  Setup setup;
  Problem& problem = setup.problem;
  describe_operands(inputs, problem);
  if (inputs.pools) {
    problem.weight_rows = inputs.query_rows();
  }
  if (inputs.exp_key.has_value()) {
    STD_TORCH_CHECK(inputs.key_bound.has_value(), "attn_ext: exp_key comes with key_bound");
    problem.exp_key = rows_of(*inputs.exp_key);
    problem.key_bound = rows_of(*inputs.key_bound);
  }
  problem.weights_by_key = inputs.by_key();
  problem.scores_by_key = inputs.scores_by_key();
  setup.coverage = describe_sequences(layout_of(inputs), problem);
  return setup;
}

// Whether forward computes a score for every number of what is kept.
bool fills_scores(const Inputs& inputs, const Setup& setup) {
  if (setup.problem.scores_by_key) {
    return setup.coverage.keys;
  }
  const auto& sequences = setup.problem.sequences;
  return setup.coverage.queries && std::all_of(sequences.begin(), sequences.end(), [&](auto& each) {
           return each.key_count == inputs.max_keys();
         });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& inputs, bool keep_scores) {
  Setup setup = describe(inputs);
  Problem& problem = setup.problem;
  problem.is_short = problem.is_short && !problem.raw_scores;
  const Tensor& key = inputs.key;
  const bool zeros = !setup.coverage.queries || problem.raw_scores;
  const ScalarType compute = compute_type(key);
  Tensor context =
      allocate(key, inputs.by_query(problem.value_dim), inputs.value.scalar_type(), zeros);
  Tensor stats = allocate(key, inputs.by_query(2), compute, zeros);
  Tensor weights = allocate_weights(inputs);
  const bool has_weights = inputs.weights_layout != kNoWeights;
  const bool needs_scores = keep_scores || (has_weights && !problem.raw_scores);
  Tensor scores = nothing(key, compute);
  ForwardCall<T> call;
  call.problem = &problem;
  call.context = rows_of(context);
  call.stats = rows_of(stats);
  if (has_weights) {
    call.weights = weight_rows(weights, problem.weights_by_key);
  }
  if (needs_scores) {
    scores =
        allocate(key, inputs.of_scores(), compute, keep_scores && !fills_scores(inputs, setup));
    call.scores = rows_of(scores);
  }
  call.keeps_scores = keep_scores;
  run_forward<T>(call);
  return {context, weights, stats, keep_scores ? scores : nothing(key, compute)};
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

  void set(Rows& target, Rows& gathered) const {
    target = wanted_rows(result);
    gathered = sums.has_value() ? rows_of(*sums) : target;
  }
};

// Numbers of keys and values from which their gradients, 16 MiB in float32, are streamed: more than
// a core's share of most caches.
constexpr int64_t kSmallestStreamed = int64_t{1} << 22;

template <class T>
Gradients backward(const Inputs& inputs, const Setup& setup, BackwardCall<T> call,
                   int64_t grad_mask, bool from_steps = false) {
  const auto& [query, key, value, score_weight] =
      std::tie(inputs.query, inputs.key, inputs.value, inputs.score_weight);
  const bool wants_query = grad_mask & kGradQuery;
  const bool wants_key = grad_mask & kGradKey;
  const bool wants_value = grad_mask & kGradValue;
  const bool wants_weight = grad_mask & kGradScoreWeight;
  const bool wants_gate = inputs.gate.has_value() && (grad_mask & kGradGate);
  const bool deterministic = inputs.deterministic;
  const bool has_dcontext = call.dcontext.data != nullptr;
  const bool gathers = !inputs.pools;
  const bool leaves_keys = !setup.coverage.keys;
  Tensor dquery = wants_query ? allocate_gradient(query, query.scalar_type(),
                                                  !setup.coverage.queries, deterministic)
                              : nothing(query, query.scalar_type());
  const KeyGradient dkey(wants_key, key, gathers, leaves_keys, deterministic);
  const KeyGradient dvalue(wants_value, value, gathers, leaves_keys || !has_dcontext,
                           deterministic);
  const KeyGradient dgate(wants_gate, inputs.gate.value_or(key), false, leaves_keys, deterministic);
  Tensor dscore_weight =
      wants_weight ? allocate(score_weight, sizes_of(score_weight), score_weight.scalar_type())
                   : nothing(score_weight, score_weight.scalar_type());
  Rows no_sums;
  call.dquery = wanted_rows(dquery);
  dkey.set(call.dkey, call.dkey_sum);
  dvalue.set(call.dvalue, call.dvalue_sum);
  dgate.set(call.dgate, no_sums);
  call.problem = &setup.problem;
  call.needs_scores = call.needs_scores || wants_query || wants_key || wants_weight || wants_gate;
  call.needs_weights = wants_value && has_dcontext;
  call.streams = key.numel() + value.numel() >= kSmallestStreamed;
  run_backward<T>(call, from_steps, wants_weight ? score_weight_rows(dscore_weight) : Rows{});
  return {dquery, dkey.result, dvalue.result, dscore_weight, dgate.result};
}

// The incoming gradients and what forward left.
template <class T>
BackwardCall<T> incoming_call(const Incoming& incoming, bool by_key) {
  BackwardCall<T> call;
  if (incoming.dcontext.has_value()) {
    call.dcontext = rows_of(*incoming.dcontext);
  }
  if (incoming.dweights.has_value()) {
    call.dweights = weight_rows(*incoming.dweights, by_key);
  }
  call.stats = rows_of(incoming.stats);
  call.scores = wanted_rows(incoming.scores);
  return call;
}

template <class T>
struct Of {
  using type = T;
};

// Calls function(Of<float>()), or of double where that is computed in.
template <class Function>
auto in_compute_type(const Inputs& inputs, const Function& function) {
  return computes_in_double(inputs.key) ? function(Of<double>()) : function(Of<float>());
}

struct Cpu {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& inputs,
                                                            bool keep_scores) {
    return in_compute_type(inputs, [&](auto type) {
      return attn_ext::forward<typename decltype(type)::type>(inputs, keep_scores);
    });
  }

  static Gradients backward(const Inputs& inputs, const Incoming& incoming) {
    const Setup setup = describe(inputs);
    return in_compute_type(inputs, [&](auto type) {
      using T = typename decltype(type)::type;
      return attn_ext::backward(inputs, setup, incoming_call<T>(incoming, inputs.by_key()),
                                incoming.grad_mask);
    });
  }

  static std::tuple<Tensor, Tensor, Tensor> step_backward(const Inputs& inputs,
                                                          const Incoming& incoming) {
    const Setup setup = describe(inputs);
    const ScalarType compute = compute_type(inputs.key);
    Tensor dscores = allocate(inputs.key, inputs.of_keys(), compute, !setup.coverage.keys);
    Tensor weights = allocate(inputs.key, inputs.of_keys(), compute, !setup.coverage.keys);
    const Gradients gradients = in_compute_type(inputs, [&](auto type) {
      auto call = incoming_call<typename decltype(type)::type>(incoming, inputs.by_key());
      call.step_dscores = rows_of(dscores);
      call.step_weights = rows_of(weights);
      call.needs_scores = incoming.grad_mask & (kGradKey | kGradScoreWeight);
      return attn_ext::backward(inputs, setup, call, incoming.grad_mask & kGradQuery);
    });
    return {gradients.query, dscores, weights};
  }

  static Gradients memory_backward(const Inputs& inputs, const Tensor& dscores,
                                   const Tensor& weights, const Tensor& dcontext,
                                   int64_t grad_mask) {
    const Setup setup = describe(inputs);
    return in_compute_type(inputs, [&](auto type) {
      BackwardCall<typename decltype(type)::type> call;
      call.dcontext = step_rows_of(dcontext);
      call.step_dscores = step_score_rows_of(dscores);
      call.step_weights = step_score_rows_of(weights);
      return attn_ext::backward(inputs, setup, call, grad_mask, true);
    });
  }
};

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
  attn_ext::Operations<attn_ext::Cpu>::implement(m);
  m.impl("additive_attention_prepare", TORCH_BOX(&attn_ext::additive_attention_prepare));
}
