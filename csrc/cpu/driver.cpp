// Runs the items of a plan phase by phase.
#include <algorithm>

#include "call.h"
#include "runtime.h"

namespace attn_ext {
namespace {

constexpr int64_t kPrepareRows = 64;  // rows of an item of run_prepare
constexpr double kExpCost = 4;  // of an exponential read from and written to memory, in triples

// The score weights of all heads, and the rows that they point to.
template <class T>
struct AllScoreWeights {
  Buffer<T> rows;
  Buffer<ScoreWeights<T>> heads;

  // Of pooling there are none: its rows are the queries.
  explicit AllScoreWeights(const Problem& problem)
      : rows(problem.heads * padded_columns(problem.dim)), heads(problem.heads) {
    for (int64_t head = 0; !problem.keys_alone && head < problem.heads; ++head) {
      T* row = rows.get() + head * padded_columns(problem.dim);
      heads.get()[head] = kernels<T>().read_weights(problem.score_weight, head, problem.dim, row);
    }
  }
};

// Runs function(call, item) for each item.
template <class Call, class Item>
void run_phase(const Call& call, const std::vector<Item>& items, double cost,
               void (*function)(const Call&, const Item&)) {
  for_each_item(static_cast<int64_t>(items.size()), cost,
                [&](int64_t n) { function(call, items[n]); });
}

// Buffers that one wave after the other uses.
template <class T>
struct WaveBuffers {
  Buffer<T> alpha;
  Buffer<T> dscores;
  Buffer<Delta<T>> deltas;
  Buffer<T> partial_dquery;
  Buffer<double> partial_dweight;

  // Makes room for a wave.
  void fit(const Wave& wave, BackwardCall<T>& call) {
    const int64_t dim = call.problem->dim;
    alpha.fit(wave.scores);
    dscores.fit(wave.scores);
    deltas.fit(wave.deltas);
    call.alpha = alpha.get();
    call.dscores = dscores.get();
    call.deltas = deltas.get();
    if (call.dquery.data != nullptr) {
      partial_dquery.fit(wave.partial_rows * padded_columns(dim));
      call.partial_dquery = partial_dquery.get();
    }
    if (call.dscore_weight.data != nullptr) {
      partial_dweight.fit(wave.weight_rows * call.problem->weight_rows * dim);
      call.partial_dweight = partial_dweight.get();
    }
  }
};

template <class T>
void run_wave(const BackwardCall<T>& call) {
  const Kernels<T>& kernel = kernels<T>();
  const Wave& wave = *call.wave;
  // A number read costs about what a triple of scores does.
  run_phase(call, wave.score_items, call.from_steps ? 2.0 * wave.scores : wave.score_cost,
            kernel.score_item);
  if (!call.from_steps && !call.problem->raw_scores) {
    run_phase(call, wave.split_items, wave.score_cost, kernel.finish_scores);
  }
  const int64_t values = call.needs_weights ? static_cast<int64_t>(wave.value_items.size()) : 0;
  const bool has_gradients = call.dquery.data != nullptr || call.dkey.data != nullptr ||
                             call.dgate.data != nullptr || call.dscore_weight.data != nullptr;
  const int64_t gradients = has_gradients ? static_cast<int64_t>(wave.gradient_items.size()) : 0;
  for_each_item(gradients + values, wave.gradient_cost, [&](int64_t n) {
    if (n < gradients) {
      kernel.gradient_item(call, wave.gradient_items[n]);
    } else {
      kernel.value_item(call, wave.value_items[n - gradients]);
    }
  });
  if (call.dquery.data != nullptr) {
    run_phase(call, wave.query_merges, wave.gradient_cost, kernel.query_merge);
  }
}

// totals += the wave's partial rows of dscore_weight, one head after the other, in their order.
template <class T>
void merge_weights(const BackwardCall<T>& call, double* totals) {
  const int64_t numbers = call.problem->weight_rows * call.problem->dim;
  for (const WeightMerge& merge : call.wave->weight_merges) {
    double* total = totals + merge.head * numbers;
    for (int64_t row = merge.begin; row < merge.end; ++row) {
      const double* partial = call.partial_dweight + row * numbers;
      for (int64_t c = 0; c < numbers; ++c) {
        total[c] += partial[c];
      }
    }
  }
}

template <class T>
void forward(const ForwardArguments& arguments) {
  const Problem& problem = *arguments.problem;
  const Kernels<T>& kernel = kernels<T>();
  const ForwardPlan plan = plan_forward(problem);
  const AllScoreWeights<T> score_weights(problem);
  Buffer<T> partial_sums(plan.partial_rows * padded_columns(problem.value_dim));
  Buffer<T> partial_stats(plan.partial_rows * 2);
  const ForwardCall<T> call{arguments, score_weights.heads.get(), partial_sums.get(),
                            partial_stats.get()};
  run_phase(call, plan.items, plan.cost, kernel.forward_item);
  if (!problem.raw_scores) {
    run_phase(call, plan.merges, plan.cost, kernel.forward_merge);
  }
}

template <class T>
void backward(const BackwardArguments& arguments) {
  const Problem& problem = *arguments.problem;
  const AllScoreWeights<T> score_weights(problem);
  const int64_t weights = problem.heads * problem.weight_rows * problem.dim;
  Buffer<double> dscore_weight(weights);
  std::fill_n(dscore_weight.get(), weights, 0.0);
  BackwardCall<T> call{arguments};
  call.score_weights = score_weights.heads.get();
  WaveBuffers<T> buffers;
  const std::vector<Unit> units = plan_units(problem);
  for (size_t next = 0; next < units.size();) {
    const Wave wave = plan_wave(problem, units, next);
    call.wave = &wave;
    buffers.fit(wave, call);
    run_wave(call);
    if (call.partial_dweight != nullptr) {
      merge_weights(call, dscore_weight.get());
    }
  }
  if (call.dscore_weight.data != nullptr) {
    kernels<T>().write_weights(dscore_weight.get(), weights, call.dscore_weight);
  }
}

template <class T>
void prepare(const Rows& key, const std::vector<int64_t>& sizes, T* exp_key, T* key_bound) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t rows = sizes[1];
  const int64_t heads = sizes[2];
  const int64_t dim = sizes[3];
  const int64_t total = sizes[0] * rows;
  const int64_t items = (total + kPrepareRows - 1) / kPrepareRows;
  for_each_item(items, kExpCost * static_cast<double>(total * heads * dim), [&](int64_t item) {
    const int64_t end = std::min(total, (item + 1) * kPrepareRows);
    for (int64_t n = item * kPrepareRows; n < end; ++n) {
      kernel.prepare_rows(key, n / rows, n % rows, heads, dim, exp_key + n * heads * dim,
                          key_bound + n * heads);
    }
  });
}

}  // namespace

void run_forward(const ForwardArguments& arguments) {
  arguments.problem->computes_in_double() ? forward<double>(arguments) : forward<float>(arguments);
}

void run_backward(const BackwardArguments& arguments) {
  arguments.problem->computes_in_double() ? backward<double>(arguments)
                                          : backward<float>(arguments);
}

void run_prepare(const Rows& key, const std::vector<int64_t>& sizes, void* exp_key,
                 void* key_bound) {
  if (key.dtype == DType::kFloat64) {
    prepare(key, sizes, static_cast<double*>(exp_key), static_cast<double*>(key_bound));
  } else {
    prepare(key, sizes, static_cast<float*>(exp_key), static_cast<float*>(key_bound));
  }
}

}  // namespace attn_ext
