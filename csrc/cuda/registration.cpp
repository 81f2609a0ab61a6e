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

// Every sequence's few queries: scores, softmax and weighted sum in one kernel, or two if there are
// too few sequences for a block each.
void run_step(Call& call, ForwardCall step) {
  constexpr int kFewestShift = 6;
  const int64_t processors = cuda::processors();
  const int whole = shift_for(call.longest_key());
  int shift = kMostStepShift - 1;
  if (call.sequences.count * call.heads < 2 * processors) {
    const int64_t keys = worked_on(call.sequences, true).end * call.heads / (4 * processors) + 1;
    shift = std::clamp(shift_for(keys), kFewestShift, kMostStepShift);
  }
  step.key_shift = std::min(whole, shift);
  step.merges = step.key_shift < whole && step.stats.data != nullptr;
  if (step.merges) {
    const int64_t parts = tile_count(call.sequences, true, step.key_shift) * call.heads *
                          call.sequences.query.longest;
    step.partial_sums = call.room<float>({parts, call.value_dim}, ScalarType::Float);
    step.partial_stats = call.room<SoftmaxPart>({parts, 2}, ScalarType::Float);
  }
  launch_step(step, call.stream());
  if (step.merges) {
    launch_step_merge(step, call.stream());
  }
}

// Of the wave's queries.
void compute_scores(Call& call) {
  if (!call.few_queries) {
    return launch_scores(call, call.stream());
  }
  ForwardCall step{call};
  step.stats = {};
  run_step(call, step);
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

// Keys of a block of the gradient kernel, as a shift: so few that the blocks fill the device and
// none is much longer than the others, as far as there is room for the partial gradients of the
// `rows` queries of a wave.
int gradient_shift(const Call& call, bool wants_query, int64_t rows) {
  constexpr int kMostShift = 10;
  constexpr int kFewestShift = 6;
  const int64_t chunks = (call.dim + kGradientFeatures - 1) / kGradientFeatures;
  const int64_t blocks = std::max<int64_t>(call.sequences.count * call.heads * chunks, 1);
  const int64_t splits = 12 * processors() / blocks + 1;
  const int64_t bytes = rows * call.heads * call.dim * 4;
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

// The gradients of grad_mask, and room for what kernels leave of waves of `rows` queries.
Gradients allocate_gradients(Call& call, int64_t grad_mask, int64_t waves, int64_t rows) {
  const Inputs& inputs = call.inputs;
  const bool wants_query = grad_mask & kGradQuery;
  const bool wants_gate = inputs.gate.has_value() && (grad_mask & kGradGate);
  const bool zeros = call.leaves_rows();
  Gradients result;
  result.query = gradient_like(inputs.query, wants_query, zeros);
  result.key = gradient_like(inputs.key, grad_mask & kGradKey, zeros);
  result.value =
      gradient_like(inputs.value, grad_mask & kGradValue, zeros || call.dcontext.data == nullptr);
  result.gate = gradient_like(inputs.gate.value_or(inputs.key), wants_gate, zeros);
  result.score_weight = gradient_like(inputs.score_weight, grad_mask & kGradScoreWeight, false);
  call.dquery = wanted_rows(result.query);
  call.dkey = wanted_rows(result.key);
  call.dvalue = wanted_rows(result.value);
  call.dgate = wanted_rows(result.gate);
  call.dkey_sums = wanted_rows(call.hold(sums_of(result.key, waves > 1)));
  call.dvalue_sums = wanted_rows(call.hold(sums_of(result.value, waves > 1)));
  call.key_shift = call.keys_alone ? kPoolShift : gradient_shift(call, wants_query, rows);
  const int64_t splits = ((call.longest_key() - 1) >> call.key_shift) + 1;
  call.merges = splits > 1;
  if (wants_query && call.longest_key() > kGradientKeys) {
    call.dquery_sums = rows_of(call.hold(call.floats({splits, rows, call.heads, call.dim})));
  }
  if (grad_mask & kGradScoreWeight) {
    const Tensor& weight = result.score_weight;  // [H, D], or [H, K, D]
    call.dscore_weight = view(weight, 0, 0, weight.stride(weight.dim() - 2), 1);
    // Without a wave nobody fills them.
    call.partial_rows = waves > 0 ? tile_count(call.sequences, true, call.key_shift) : 0;
    call.branches = call.keys_alone ? inputs.query_rows() : 1;
    call.partial_dweight = call.room<float>(
        {call.partial_rows, call.heads, call.branches, call.dim}, ScalarType::Float);
  }
  return result;
}

// alpha and s of the wave's queries.
void gradient_of_scores(Call& call) {
  if (call.has_dalpha && call.few_queries && !call.keys_alone) {
    ForwardCall step{call};  // products with values are scores without a query
    step.query = {};
    step.key = call.value;
    step.score_weight = call.dcontext;
    step.dim = call.value_dim;
    step.scores = call.dscores;
    step.stats = {};
    run_step(call, step);
  } else if (call.has_dalpha) {
    launch_product(call, call.stream());
  }
  launch_softmax_gradient(call, call.stream());
}

// From s and alpha of the wave's queries.
void run_gradients(const Call& call) {
  const bool wants_query = call.dquery.data != nullptr;
  if (wants_query || call.dkey.data != nullptr || call.dgate.data != nullptr ||
      call.partial_dweight != nullptr) {
    const auto run = call.keys_alone ? launch_pool_gradient : launch_gradient;
    run(call, call.stream());
  }
  if (wants_query && call.merges) {
    launch_merge_dquery(call, call.stream());
  }
  if (call.dvalue.data != nullptr && call.dcontext.data != nullptr) {
    launch_value_gradient(call, call.stream());
  }
}

// After the last wave.
void finish_gradients(const Call& call) {
  if (call.dscore_weight.data != nullptr) {
    launch_merge_dweight(call, call.stream());
  }
}

struct Cuda {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Inputs& given, bool keep_scores) {
    Call call(given);
    const Inputs& inputs = call.inputs;
    const bool zeros = call.leaves_rows() || call.raw_scores;
    Tensor context =
        allocate(inputs.key, inputs.by_query(call.value_dim), inputs.value.scalar_type(), zeros);
    Tensor stats = call.floats(inputs.by_query(2), zeros);
    const Tensor weights = allocate_weights(inputs);
    if (inputs.weights_layout != kNoWeights) {
      call.weights = weight_scores(weights, inputs.by_key());
    }
    if (call.raw_scores) {
      call.scores = call.weights;
      compute_scores(call);
      return {context, weights, stats, call.floats({0})};
    }
    const bool whole = keep_scores || call.few_queries;
    const int64_t rows = whole ? std::max<int64_t>(call.query_rows(), 1) : call.wave_rows(1);
    const Tensor scores = whole ? call.floats(inputs.of_scores(),
                                              keep_scores && call.few_queries && call.leaves_rows())
                                : call.floats({1, rows, call.heads, call.longest_key()});
    call.scores = call.few_queries ? key_scores(scores) : dense_scores(scores);
    call.context = rows_of(context);
    call.stats = rows_of(stats);
    if (call.few_queries) {
      run_step(call, {call});
    }
    for (int64_t first = 0; !call.few_queries && first < call.query_rows(); first += rows) {
      call.begin_wave(first, rows);
      compute_scores(call);
      launch_context(call, call.stream());
    }
    return {context, weights, stats, keep_scores ? scores : call.floats({0})};
  }

  static Gradients backward(const Inputs& given, const Incoming& incoming) {
    Call call(given, incoming);
    const bool raw = call.raw_scores;
    const bool is_long = call.sequences.query.longest > kMostQueries;
    const bool kept = incoming.scores.dim() > 1 && !is_long;
    const int64_t rows = call.few_queries || kept
                             ? std::max<int64_t>(call.query_rows(), 1)
                             : std::min(call.wave_rows(2), is_long ? kMostQueries : INT64_MAX);
    const int64_t waves = (call.query_rows() + rows - 1) / rows;
    const Gradients result = allocate_gradients(call, incoming.grad_mask, waves, rows);
    if (raw) {
      call.dscores = call.dweights;
    } else {
      const auto view = [&](const Tensor& scores) {
        return call.few_queries ? key_scores(scores) : dense_scores(scores);
      };
      const std::vector<int64_t> sizes =
          call.few_queries ? call.inputs.of_keys()
                           : std::vector<int64_t>{1, rows, call.heads, call.longest_key()};
      call.alpha = view(call.hold(call.floats(sizes)));
      call.dscores = view(call.hold(call.floats(sizes)));
      call.scores = kept ? view(incoming.scores) : call.alpha;
    }
    for (int64_t wave = 0; wave < waves; ++wave) {
      call.begin_wave(wave * rows, rows);
      if (!raw && !kept) {
        compute_scores(call);
      }
      if (!raw) {
        gradient_of_scores(call);
      }
      run_gradients(call);
    }
    finish_gradients(call);
    return result;
  }

  static std::tuple<Tensor, Tensor, Tensor> step_backward(const Inputs& given,
                                                          const Incoming& incoming) {
    Call call(given, incoming);
    const std::vector<int64_t> sizes = call.inputs.of_keys();
    const Tensor dscores = call.floats(sizes, call.leaves_rows());
    const Tensor weights = call.floats(sizes, call.leaves_rows() || call.raw_scores);
    const bool kept = incoming.scores.dim() > 1;
    call.alpha = key_scores(weights);
    call.dscores = key_scores(dscores);
    call.scores = kept ? key_scores(incoming.scores) : call.alpha;
    if (!call.raw_scores && !kept) {
      compute_scores(call);
    }
    gradient_of_scores(call);
    const Gradients result =
        allocate_gradients(call, incoming.grad_mask & kGradQuery, 1, call.query_rows());
    run_gradients(call);
    return {result.query, dscores, weights};
  }

  static Gradients memory_backward(const Inputs& given, const Tensor& dscores,
                                   const Tensor& weights, const Tensor& dcontext,
                                   int64_t grad_mask) {
    Call call(given);
    call.dcontext = step_rows_of(call.hold(usable("dcontext", dcontext)));
    call.alpha = key_scores(weights, 1);
    call.dscores = key_scores(dscores, 1);
    const Gradients result = allocate_gradients(call, grad_mask, 1, call.query_rows());
    run_gradients(call);
    finish_gradients(call);
    return result;
  }
};

}  // namespace
}  // namespace attn_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(attn_ext_cuda, ATTN_EXT_CUDA_KEY, m) {
  attn_ext::Operations<attn_ext::cuda::Cuda>::implement(m);
}
