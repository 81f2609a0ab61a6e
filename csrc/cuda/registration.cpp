// The operations of the CUDA backend: allocates outputs and buffers, and puts the kernels in order.
// attn_ext/ops.py hands CUDA tensors on to them.
#include <algorithm>

#include "call.h"

// Tests register the same operations for CPU tensors, over kernels that the host runs.
#ifndef ATTN_EXT_CUDA_KEY
#define ATTN_EXT_CUDA_KEY CUDA
#endif

namespace attn_ext::cuda {
namespace {

constexpr int64_t kPartialBytes = int64_t{1} << 28;  // of sums of queries over some of the keys

// The smallest shift with 2^shift >= count.
int shift_for(int64_t count) {
  int shift = 0;
  while ((int64_t{1} << shift) < count) {
    ++shift;
  }
  return shift;
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

InnerCall inner_call(const Call& call, const Rows& left, const Rows& right, int64_t dim,
                     const Scores& out) {
  return {call.problem, left, right, dim, out};
}

// Every sequence's only query: scores, softmax and weighted sum in one kernel, or two if there are
// too few sequences for a block each. Pooling has few queries, whose scores are there.
void run_step(const Call& call, StepCall step, bool wants_scores) {
  constexpr int kFewestShift = 6;
  const Problem& problem = call.problem;
  const int64_t processors = cuda::processors();
  step.problem = problem;
  const int whole = shift_for(call.longest_key());
  int shift = kMostStepShift - 1;
  if (problem.sequences.count * problem.heads < 2 * processors) {
    const int64_t keys =
        worked_on(problem.sequences, true).end * problem.heads / (4 * processors) + 1;
    shift = std::clamp(shift_for(keys), kFewestShift, kMostStepShift);
  }
  step.key_shift = std::min(whole, shift);
  step.merges = step.key_shift < whole;
  if (!wants_scores && !(step.merges && step.weights.rows.data != nullptr)) {
    step.scores = {};
  }
  if (!step.merges || step.stats.data == nullptr) {
    launch_step(step, call.stream());
    return;
  }
  const int64_t parts = tile_count(problem.sequences, true, step.key_shift) * problem.heads *
                        problem.sequences.query.longest;
  const Tensor sums = call.floats({parts, problem.value_dim});
  const Tensor stats = call.floats({parts, 2});
  step.partial_sums = floats_of(sums);
  step.partial_stats = static_cast<SoftmaxPart*>(stats.data_ptr());
  launch_step(step, call.stream());
  launch_step_merge(step, call.stream());
}

// Of the wave's queries.
void compute_scores(const Call& call, const Scores& scores) {
  const Problem& problem = call.problem;
  if (call.one_step()) {
    StepCall step;
    step.scores = scores;
    run_step(call, step, true);
  } else {
    const auto run = problem.keys_alone ? launch_pool_scores : launch_scores;
    run(inner_call(call, problem.query, problem.key, problem.dim, scores), call.stream());
  }
}

// A gradient, without elements unless it is wanted.
Tensor gradient_like(const Tensor& like, bool wanted, bool zeros) {
  return wanted ? allocate(like, sizes_of(like), like.scalar_type(), zeros)
                : nothing(like, like.scalar_type());
}

// Where a gradient gathers over waves, in float32: where it is, if it is of that type.
Tensor sums_of(const Tensor& gradient, bool gathers) {
  const bool in_place = !gathers || gradient.scalar_type() == ScalarType::Float;
  return in_place ? gradient : allocate(gradient, sizes_of(gradient), ScalarType::Float);
}

void value_gradient(const Call& call, const Tensor& dvalue, const Tensor& sums,
                    const Rows& dcontext, const Scores& alpha) {
  WeightedCall weighted;
  weighted.problem = call.problem;
  weighted.by_key = true;
  weighted.alpha = alpha;
  weighted.rows = dcontext;
  weighted.out = rows_of(dvalue);
  weighted.sums = rows_of(sums);
  launch_weighted(weighted, call.stream());
}

// Keys of a block of the gradient kernel, as a shift: so few that the blocks fill the device and
// none is much longer than the others, as far as there is room for the partial gradients of the
// `rows` queries of a wave.
int gradient_shift(const Call& call, bool wants_query, int64_t rows) {
  constexpr int kMostShift = 10;
  constexpr int kFewestShift = 6;
  const Problem& problem = call.problem;
  const int64_t chunks = (problem.dim + kGradientFeatures - 1) / kGradientFeatures;
  const int64_t blocks = std::max<int64_t>(problem.sequences.count * problem.heads * chunks, 1);
  const int64_t splits = 12 * processors() / blocks + 1;
  const int64_t bytes = rows * problem.heads * problem.dim * 4;
  const int whole = shift_for(call.longest_key());
  int shift = std::clamp(shift_for(call.longest_key() / splits), kFewestShift, kMostShift);
  while (wants_query && shift < whole &&
         ((call.longest_key() >> shift) + 1) * bytes > kPartialBytes) {
    ++shift;
  }
  return std::min(shift, whole);
}

// The most queries that a gradient of keys sums in one go: the roundings of more would add up.
constexpr int64_t kMostQueries = 4096;

// The gradients of queries, keys and score weights, and of gates, from those of scores.
class GradientPhase {
 public:
  GradientPhase(const Call& call, int64_t grad_mask, int64_t waves, int64_t rows) : call_(call) {
    const Problem& problem = call.problem;
    const Inputs& inputs = call.inputs;
    const bool wants_query = grad_mask & kGradQuery;
    const bool wants_gate = inputs.gate.has_value() && (grad_mask & kGradGate);
    result.query = gradient_like(inputs.query, wants_query, call.leaves_rows());
    result.key = gradient_like(inputs.key, grad_mask & kGradKey, call.leaves_rows());
    result.gate = gradient_like(inputs.gate.value_or(inputs.key), wants_gate, call.leaves_rows());
    result.score_weight = gradient_like(inputs.score_weight, grad_mask & kGradScoreWeight, false);
    gradient_.dquery = wanted_rows(result.query);
    gradient_.dkey = wanted_rows(result.key);
    gradient_.dgate = wanted_rows(result.gate);
    dkey_sums_ = sums_of(result.key, waves > 1);
    gradient_.dkey_sums = wanted_rows(*dkey_sums_);
    gradient_.one_step = call.one_step();
    gradient_.key_shift = problem.keys_alone ? kPoolShift : gradient_shift(call, wants_query, rows);
    const int64_t splits = ((call.longest_key() - 1) >> gradient_.key_shift) + 1;
    gradient_.merges = splits > 1;
    if (wants_query && call.longest_key() > kGradientKeys) {
      dquery_sums_ = call.floats({splits, rows, problem.heads, problem.dim});
      gradient_.dquery_sums = rows_of(*dquery_sums_);
    }
    if (grad_mask & kGradScoreWeight) {
      // Without a wave nobody fills them.
      tiles_ = waves > 0 ? tile_count(problem.sequences, true, gradient_.key_shift) : 0;
      branches_ = problem.keys_alone ? inputs.query_rows() : 1;
      partial_dweight_ = call.floats({tiles_, problem.heads, branches_, problem.dim});
      gradient_.partial_dweight = floats_of(*partial_dweight_);
    }
    wants_scores = grad_mask & (kGradQuery | kGradKey | kGradScoreWeight) || wants_gate;
  }

  // Of the queries of a wave.
  void run(const Scores& dscores) {
    if (!wants_scores) {
      return;
    }
    gradient_.problem = call_.problem;
    gradient_.dscores = dscores;
    if (call_.problem.keys_alone) {
      launch_pool_gradient(gradient_, call_.stream());
      return;
    }
    launch_gradient(gradient_, call_.stream());
    if (gradient_.merges && gradient_.dquery.data != nullptr) {
      launch_merge_dquery(gradient_, call_.stream());
    }
  }

  void finish() const {
    if (partial_dweight_.has_value()) {
      const Tensor& weight = result.score_weight;  // [H, D], or [H, K, D]
      const int64_t row = weight.stride(weight.dim() - 2);
      launch_merge_dweight(gradient_.partial_dweight, tiles_, call_.problem.heads * branches_,
                           call_.problem.dim, view(weight, 0, 0, row, 1), call_.stream());
    }
  }

  Gradients result;  // but for that of values
  bool wants_scores;

 private:
  const Call& call_;
  GradientCall gradient_;
  OptionalTensor dkey_sums_;
  OptionalTensor dquery_sums_;
  OptionalTensor partial_dweight_;
  int64_t tiles_ = 0;
  int64_t branches_ = 1;
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
  softmax.few_rows = call.inputs.scores_by_key();
  if (incoming.dweights.has_value()) {
    softmax.dweights = weight_scores(*incoming.dweights, call.inputs.by_key());
  }
  if (incoming.dcontext.has_value() && wants_scores) {
    const auto run = call.one_step() ? launch_step_product : launch_product;
    softmax.has_dalpha = true;
    run(inner_call(call, rows_of(*incoming.dcontext), problem.value, problem.value_dim, dscores),
        call.stream());
  }
  launch_softmax_gradient(softmax, call.stream());
}

Incoming usable_incoming(Incoming incoming) {
  if (incoming.dcontext.has_value()) {
    incoming.dcontext = usable("dcontext", *incoming.dcontext);
  }
  if (incoming.dweights.has_value()) {
    STD_TORCH_CHECK(incoming.dweights->scalar_type() != ScalarType::Double,
                    "attn_ext: dweights: backend 'cuda' expects float32, float16 or bfloat16, got "
                    "float64; use backend='reference'");
  }
  return incoming;
}

struct Cuda {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& given, bool keep_scores) {
    Call call(given);
    const Inputs& inputs = call.inputs;
    const Problem& problem = call.problem;
    const bool zeros = call.leaves_rows() || problem.raw_scores;
    Tensor context =
        allocate(inputs.key, inputs.by_query(problem.value_dim), inputs.value.scalar_type(), zeros);
    Tensor stats = call.floats(inputs.by_query(2), zeros);
    const Tensor weights = allocate_weights(inputs);
    const Scores returned =
        inputs.weights_layout == kNoWeights ? Scores{} : weight_scores(weights, inputs.by_key());
    Tensor scores = call.floats({0});
    if (problem.raw_scores) {
      compute_scores(call, returned);
      return {context, weights, stats, scores};
    }
    const bool by_key = inputs.scores_by_key();
    const int64_t rows = keep_scores ? std::max<int64_t>(call.query_rows(), 1) : call.wave_rows(1);
    if (keep_scores || inputs.pools || (by_key && returned.rows.data != nullptr)) {
      scores = call.floats(inputs.of_scores(), by_key && call.leaves_rows());
    } else if (!by_key) {
      scores = call.floats({1, rows, problem.heads, call.longest_key()});
    }
    if (by_key) {
      StepCall step;
      step.scores = scores.dim() > 1 ? key_scores(scores) : Scores{};
      step.scored = inputs.pools;
      step.context = rows_of(context);
      step.stats = rows_of(stats);
      step.weights = returned;
      if (step.scored) {
        compute_scores(call, step.scores);
      }
      run_step(call, step, keep_scores || step.scored);
    }
    for (int64_t first = 0; !by_key && first < call.query_rows(); first += rows) {
      call.begin_wave(first, rows);
      compute_scores(call, dense_scores(scores));
      WeightedCall weighted;
      weighted.problem = problem;
      weighted.alpha = dense_scores(scores);
      weighted.rows = problem.value;
      weighted.out = rows_of(context);
      weighted.stats = rows_of(stats);
      weighted.weights = returned;
      launch_weighted(weighted, call.stream());
    }
    return {context, weights, stats, keep_scores ? scores : call.floats({0})};
  }

  static Gradients backward(const Inputs& given, const Incoming& given_incoming) {
    Call call(given);
    const Incoming incoming = usable_incoming(given_incoming);
    const Inputs& inputs = call.inputs;
    const bool raw = call.problem.raw_scores;
    const bool has_dcontext = incoming.dcontext.has_value() && !raw;
    const bool by_key = inputs.scores_by_key();
    const bool is_long = call.problem.sequences.query.longest > kMostQueries;
    const bool kept = incoming.scores.dim() > 1 && !is_long;
    const int64_t rows = by_key || kept
                             ? std::max<int64_t>(call.query_rows(), 1)
                             : std::min(call.wave_rows(2), is_long ? kMostQueries : INT64_MAX);
    const int64_t waves = (call.query_rows() + rows - 1) / rows;
    const bool wants_value = incoming.grad_mask & kGradValue;
    GradientPhase phase(call, incoming.grad_mask, waves, rows);
    Tensor dvalue = gradient_like(inputs.value, wants_value, call.leaves_rows() || !has_dcontext);
    const Tensor dvalue_sums = sums_of(dvalue, waves > 1);
    // Of raw scores s is what comes in.
    const std::vector<int64_t> sizes =
        raw      ? std::vector<int64_t>{0, 0, 0, 0}
        : by_key ? inputs.of_keys()
                 : std::vector<int64_t>{1, rows, inputs.heads(), call.longest_key()};
    const Tensor alpha_room = call.floats(sizes);
    const Tensor dscores_room = call.floats(sizes);
    const auto view = [&](const Tensor& room) {
      return by_key ? key_scores(room) : dense_scores(room);
    };
    const Scores alpha = view(alpha_room);
    const Scores dscores =
        raw ? weight_scores(*incoming.dweights, inputs.by_key()) : view(dscores_room);
    for (int64_t wave = 0; wave < waves; ++wave) {
      call.begin_wave(wave * rows, rows);
      if (!raw && !kept) {
        compute_scores(call, alpha);
      }
      if (!raw) {
        gradient_of_scores(call, incoming, phase.wants_scores, kept ? view(incoming.scores) : alpha,
                           alpha, dscores);
      }
      phase.run(dscores);
      if (has_dcontext && wants_value) {
        value_gradient(call, dvalue, dvalue_sums, rows_of(*incoming.dcontext), alpha);
      }
    }
    phase.finish();
    phase.result.value = dvalue;
    return phase.result;
  }

  static std::tuple<Tensor, Tensor, Tensor> step_backward(const Inputs& given,
                                                          const Incoming& given_incoming) {
    Call call(given);
    const Incoming incoming = usable_incoming(given_incoming);
    const std::vector<int64_t> sizes = call.inputs.of_keys();
    const Tensor dscores = call.floats(sizes, call.leaves_rows());
    const Tensor weights = call.floats(sizes, call.leaves_rows() || call.problem.raw_scores);
    const Scores alpha = key_scores(weights);
    const bool kept = incoming.scores.dim() > 1;
    if (!call.problem.raw_scores && !kept) {
      compute_scores(call, alpha);
    }
    gradient_of_scores(call, incoming,
                       incoming.grad_mask & (kGradQuery | kGradKey | kGradScoreWeight),
                       kept ? key_scores(incoming.scores) : alpha, alpha, key_scores(dscores));
    GradientPhase phase(call, incoming.grad_mask & kGradQuery, 1, call.query_rows());
    phase.run(key_scores(dscores));
    return {phase.result.query, dscores, weights};
  }

  static Gradients memory_backward(const Inputs& given, const Tensor& dscores,
                                   const Tensor& weights, const Tensor& given_dcontext,
                                   int64_t grad_mask) {
    const Call call(given);
    const Tensor dcontext = usable("dcontext", given_dcontext);
    GradientPhase phase(call, grad_mask, 1, call.query_rows());
    phase.run(key_scores(dscores, 1));
    phase.finish();
    phase.result.value =
        gradient_like(call.inputs.value, grad_mask & kGradValue, call.leaves_rows());
    if (grad_mask & kGradValue) {
      value_gradient(call, phase.result.value, phase.result.value, step_rows_of(dcontext),
                     key_scores(weights, 1));
    }
    return phase.result;
  }
};

}  // namespace
}  // namespace attn_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(attn_ext_cuda, ATTN_EXT_CUDA_KEY, m) {
  attn_ext::Operations<attn_ext::cuda::Cuda>::implement(m);
}
