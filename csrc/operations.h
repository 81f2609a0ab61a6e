// The operations whose schemas attn_ext/ops.py defines: what they are given, the shapes of their
// results, and their registration, the same for every backend of the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace attn_ext {

// What attention and pooling are given. Pooling has no query: the K rows of its score weights, [H,
// K, D], are the queries of every sequence.
struct Inputs {
  Tensor query;  // [Bq, Nq, H, D], of steps [S, B, H, D]; of pooling key again
  Tensor key;    // [Bk, Nk, H, D]
  Tensor value;
  Tensor score_weight;  // [H, D]
  OptionalTensor cu_seqlens_q;
  OptionalTensor cu_seqlens_k;
  OptionalTensor key_lengths;
  OptionalTensor key_padding_mask;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  double dropout_p = 0;  // of weights
  OptionalTensor dropout_seed = {};
  int64_t weights_layout = kNoWeights;
  bool deterministic = false;
  OptionalTensor exp_key = {};  // what the backend prepared of key
  OptionalTensor key_bound = {};
  bool steps = false;  // rows of query are steps
  bool pools = false;
  OptionalTensor gate = {};  // of pooling, and dropout of the factors of its hidden rows
  double tanh_p = 0;
  double gate_p = 0;

  void pool(const OptionalTensor& its_gate, double its_tanh_p, double its_gate_p) {
    pools = true;
    gate = its_gate;
    tanh_p = its_tanh_p;
    gate_p = its_gate_p;
  }

  int64_t heads() const { return key.size(2); }
  bool raw() const { return weights_layout & kRaw; }
  bool by_key() const { return weights_layout & kWeightsByKey; }
  int64_t query_rows() const { return pools ? score_weight.size(1) : query.size(steps ? 0 : 1); }
  int64_t query_batch() const {
    if (pools) {
      return cu_seqlens_k.has_value() ? count(cu_seqlens_k, 0) : key.size(0);
    }
    return query.size(steps ? 1 : 0);
  }
  int64_t batch() const {
    return std::min(count(cu_seqlens_q, query_batch()), count(cu_seqlens_k, key.size(0)));
  }
  // Bounds on the rows of a sequence, as the caller gave them.
  int64_t max_queries() const { return cu_seqlens_q.has_value() ? max_seqlen_q : query_rows(); }
  int64_t max_keys() const { return cu_seqlens_k.has_value() ? max_seqlen_k : key.size(1); }
  // Whether kept scores lie by key, as where every sequence has one query.
  bool scores_by_key() const { return pools || (!cu_seqlens_q.has_value() && query_rows() == 1); }

  // Shapes of so many numbers a query and head; of one a key, head and branch; and of kept scores.
  std::vector<int64_t> by_query(int64_t numbers) const {
    return {query_batch(), query_rows(), heads(), numbers};
  }
  std::vector<int64_t> of_keys() const {
    std::vector<int64_t> sizes{key.size(0), key.size(1), heads()};
    if (pools) {
      sizes.push_back(query_rows());
    }
    return sizes;
  }
  std::vector<int64_t> of_scores() const {
    return scores_by_key() ? of_keys() : by_query(max_keys());
  }

 private:
  static int64_t count(const OptionalTensor& offsets, int64_t padded) {
    return offsets.has_value() ? std::max<int64_t>(offsets->size(0) - 1, 0) : padded;
  }
};

// What comes in to a backward, and what forward left for it.
struct Incoming {
  OptionalTensor dcontext;
  OptionalTensor dweights;
  Tensor stats;
  Tensor scores;  // without as many dimensions as scores have, forward kept none
  int64_t grad_mask = 0;
};

struct Gradients {
  Tensor query;
  Tensor key;
  Tensor value;
  Tensor score_weight;
  Tensor gate;
};

// A view of what was asked for.
inline Rows wanted_rows(const Tensor& tensor) {
  return tensor.dim() > 1 ? rows_of(tensor) : Rows{};
}

// All but the geometry of the sequences.
inline void describe_operands(const Inputs& inputs, Operands& operands) {
  const Tensor& weight = inputs.score_weight;
  operands.heads = inputs.heads();
  operands.dim = inputs.key.size(3);
  operands.value_dim = inputs.value.size(3);
  operands.key = rows_of(inputs.key);
  operands.value = rows_of(inputs.value);
  operands.keys_alone = inputs.pools;
  if (inputs.pools) {
    operands.query = view(weight, 0, weight.stride(1), weight.stride(0), weight.stride(2));
    operands.gate = inputs.gate.has_value() ? rows_of(*inputs.gate) : Rows{};
  } else {
    operands.query = inputs.steps ? step_rows_of(inputs.query) : rows_of(inputs.query);
    operands.score_weight = score_weight_rows(weight);
  }
  operands.dropout = dropout_of(inputs.dropout_p, inputs.dropout_seed);
  operands.feature_dropout[0] = dropout_of(inputs.tanh_p, inputs.dropout_seed);
  operands.feature_dropout[1] = dropout_of(inputs.gate_p, inputs.dropout_seed);
  operands.raw_scores = inputs.raw();
  operands.is_short =
      is_short(inputs.query) && is_short(inputs.key) && is_short(inputs.value) && is_short(weight);
}

// What is returned as weights, with what they are for absent keys; empty unless asked for.
inline Tensor allocate_weights(const Inputs& inputs) {
  const ScalarType dtype = inputs.raw() ? compute_type(inputs.key) : inputs.value.scalar_type();
  if (inputs.weights_layout == kNoWeights) {
    return nothing(inputs.value, dtype);
  }
  std::vector<int64_t> sizes{inputs.batch(), inputs.heads(), inputs.max_queries(),
                             inputs.max_keys()};
  if (inputs.by_key()) {
    sizes = inputs.of_keys();
    sizes.erase(sizes.begin());
  }
  Tensor weights = allocate(inputs.value, sizes, dtype, !inputs.raw());
  return inputs.raw() ? torch::stable::fill_(weights, -std::numeric_limits<double>::infinity())
                      : weights;
}

// The operations by the functions of a backend.
template <class Backend>
struct Operations {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  static constexpr auto kNone = std::nullopt;

  static Forward attention_forward(
      const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_weight,
      const OptionalTensor& exp_key, const OptionalTensor& key_bound,
      const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
      const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask,
      int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
      const OptionalTensor& dropout_seed, int64_t weights_layout, bool keep_scores,
      bool deterministic, const std::string& /*backend*/) {
    const Inputs inputs{query,          key,           value,       score_weight,
                        cu_seqlens_q,   cu_seqlens_k,  key_lengths, key_padding_mask,
                        max_seqlen_q,   max_seqlen_k,  dropout_p,   dropout_seed,
                        weights_layout, deterministic, exp_key,     key_bound};
    return Backend::forward(inputs, keep_scores);
  }

  static Forward pool_forward(const Tensor& key, const Tensor& value, const Tensor& score_weight,
                              const OptionalTensor& gate, const OptionalTensor& cu_seqlens_k,
                              const OptionalTensor& key_lengths,
                              const OptionalTensor& key_padding_mask, int64_t max_seqlen_k,
                              double tanh_p, double gate_p, double dropout_p,
                              const OptionalTensor& dropout_seed, int64_t weights_layout,
                              bool keep_scores, bool deterministic,
                              const std::string& /*backend*/) {
    Inputs inputs{key,
                  key,
                  value,
                  score_weight,
                  kNone,
                  cu_seqlens_k,
                  key_lengths,
                  key_padding_mask,
                  0,
                  max_seqlen_k,
                  dropout_p,
                  dropout_seed,
                  weights_layout,
                  deterministic};
    inputs.pool(gate, tanh_p, gate_p);
    return Backend::forward(inputs, keep_scores);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
      const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
      const Tensor& key, const Tensor& value, const Tensor& score_weight, const Tensor& stats,
      const Tensor& scores, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
      const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask,
      int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
      const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
      bool deterministic, const std::string& /*backend*/) {
    const Inputs inputs{query,          key,          value,       score_weight,
                        cu_seqlens_q,   cu_seqlens_k, key_lengths, key_padding_mask,
                        max_seqlen_q,   max_seqlen_k, dropout_p,   dropout_seed,
                        weights_layout, deterministic};
    const Gradients gradients =
        Backend::backward(inputs, {dcontext, dweights, stats, scores, grad_mask});
    return {gradients.query, gradients.key, gradients.value, gradients.score_weight};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> pool_backward(
      const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& key,
      const Tensor& value, const Tensor& score_weight, const OptionalTensor& gate,
      const Tensor& stats, const Tensor& scores, const OptionalTensor& cu_seqlens_k,
      const OptionalTensor& key_lengths, const OptionalTensor& key_padding_mask,
      int64_t max_seqlen_k, double tanh_p, double gate_p, double dropout_p,
      const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
      bool deterministic, const std::string& /*backend*/) {
    Inputs inputs{key,
                  key,
                  value,
                  score_weight,
                  kNone,
                  cu_seqlens_k,
                  key_lengths,
                  key_padding_mask,
                  0,
                  max_seqlen_k,
                  dropout_p,
                  dropout_seed,
                  weights_layout,
                  deterministic};
    inputs.pool(gate, tanh_p, gate_p);
    const Gradients gradients =
        Backend::backward(inputs, {dcontext, dweights, stats, scores, grad_mask & ~kGradQuery});
    return {gradients.key, gradients.value, gradients.score_weight, gradients.gate};
  }

  static std::tuple<Tensor, Tensor, Tensor> step_backward(
      const OptionalTensor& dcontext, const OptionalTensor& dweights, const Tensor& query,
      const Tensor& key, const Tensor& value, const Tensor& score_weight,
      const OptionalTensor& exp_key, const OptionalTensor& key_bound, const Tensor& stats,
      const Tensor& scores, const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
      const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, double dropout_p,
      const OptionalTensor& dropout_seed, int64_t weights_layout, int64_t grad_mask,
      bool deterministic, const std::string& /*backend*/) {
    const Inputs inputs{query,          key,           value,       score_weight,
                        kNone,          cu_seqlens_k,  key_lengths, key_padding_mask,
                        query.size(1),  max_seqlen_k,  dropout_p,   dropout_seed,
                        weights_layout, deterministic, exp_key,     key_bound};
    return Backend::step_backward(inputs, {dcontext, dweights, stats, scores, grad_mask});
  }

  static std::tuple<Tensor, Tensor, Tensor> memory_backward(
      const Tensor& query, const Tensor& dscores, const Tensor& weights, const Tensor& dcontext,
      const Tensor& key, const Tensor& value, const Tensor& score_weight,
      const OptionalTensor& exp_key, const OptionalTensor& key_bound,
      const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
      const OptionalTensor& key_padding_mask, int64_t max_seqlen_k, int64_t grad_mask,
      bool deterministic, const std::string& /*backend*/) {
    const Inputs inputs{query,         key,           value,       score_weight,
                        kNone,         cu_seqlens_k,  key_lengths, key_padding_mask,
                        query.size(0), max_seqlen_k,  0.0,         kNone,
                        kNoWeights,    deterministic, exp_key,     key_bound,
                        true};
    const Gradients gradients =
        Backend::memory_backward(inputs, dscores, weights, dcontext, grad_mask & ~kGradQuery);
    return {gradients.key, gradients.value, gradients.score_weight};
  }

  template <class Library>
  static void implement(Library& library) {
    library.impl("additive_attention_forward", TORCH_BOX(&attention_forward));
    library.impl("additive_attention_backward", TORCH_BOX(&attention_backward));
    library.impl("additive_attention_step_backward", TORCH_BOX(&step_backward));
    library.impl("additive_attention_memory_backward", TORCH_BOX(&memory_backward));
    library.impl("additive_pool_forward", TORCH_BOX(&pool_forward));
    library.impl("additive_pool_backward", TORCH_BOX(&pool_backward));
  }
};

}  // namespace attn_ext
