// The kernels' launchers. Each puts one kernel on `stream` and throws if the launch fails; none
// allocates or waits, so that they can be captured in a graph.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace attn_ext::cuda {

// out = sum_d w_d tanh(left_id + right_jd) of queries and keys, or the inner products of dcontext
// and values.
struct InnerCall {
  Problem problem;
  Rows left;   // by query
  Rows right;  // by key
  int64_t dim = 0;
  Scores out;
};
void launch_scores(const InnerCall& call, cudaStream_t stream);
void launch_product(const InnerCall& call, cudaStream_t stream);
void launch_step_product(const InnerCall& call, cudaStream_t stream);  // of one query a sequence
void launch_pool_scores(const InnerCall& call, cudaStream_t stream);   // of hidden rows: pool.cu

// From scores alpha after dropout, which may take their place; and s = alpha (dalpha - sum alpha
// dalpha) in place of dalpha. Of raw scores dalpha becomes dweights, which is s.
struct SoftmaxGradientCall {
  Problem problem;
  Scores scores;
  Scores alpha;
  Scores dalpha;
  bool has_dalpha = false;  // else it counts as 0
  Rows stats;
  Scores dweights;        // data is null without
  bool few_rows = false;  // but long
};
void launch_softmax_gradient(const SoftmaxGradientCall& call, cudaStream_t stream);

// out_i = sum_j alpha_ij rows_j over the keys, where alpha is the softmax of scores, which is
// computed here; or by_key: out_j = sum_i alpha_ij rows_i.
struct WeightedCall {
  Problem problem;
  bool by_key = false;
  Scores alpha;  // by query: the scores
  Rows rows;
  Rows out;
  Rows sums;       // by key: float32, where out gathers over waves
  Rows stats;      // by query: for the statistics of the softmax
  Scores weights;  // by query: for alpha after dropout; data is null unless asked for
};
void launch_weighted(const WeightedCall& call, cudaStream_t stream);

constexpr int kGradientFeatures = 64;  // of a block of the gradient kernel
constexpr int kGradientKeys = 28;      // that it takes at a time

// dquery, dkey and partial sums of dscore_weight from s. Data of what is not wanted is null.
struct GradientCall {
  Problem problem;
  Scores dscores;
  Rows dquery;
  Rows dkey;
  Rows dgate;                        // of pooling
  Rows dkey_sums;                    // float32, where dkey gathers over waves
  bool one_step = false;             // one query a sequence: bound by memory, so exact throughout
  int key_shift = 0;                 // a block has 2^key_shift keys
  bool merges = false;               // whether a sequence may have more than one block
  Rows dquery_sums;                  // [blocks, rows of the wave, heads, dim], float32, where
                                     // sequences may have more than kGradientKeys
  float* partial_dweight = nullptr;  // [blocks, heads, branches, dim], gathers over waves
};
void launch_gradient(const GradientCall& call, cudaStream_t stream);
void launch_merge_dquery(const GradientCall& call, cudaStream_t stream);
// Of pooling, whose blocks have 2^kPoolShift keys.
constexpr int kPoolShift = 6;
void launch_pool_gradient(const GradientCall& call, cudaStream_t stream);
// dscore_weight from the partial sums [tiles, heads, dim].
void launch_merge_dweight(const float* partial, int64_t tiles, int64_t heads, int64_t dim,
                          const Rows& dscore_weight, cudaStream_t stream);

// Scores, context and statistics for one query a sequence, or with `scored` the last two for the
// few of pooling.
struct StepCall {
  Problem problem;
  Scores scores;        // data is null unless asked for, or needed by weights
  bool scored = false;  // whether they stand there already
  Rows context;
  Rows stats;                            // data is null where scores are all that is wanted
  Scores weights;                        // data is null unless asked for
  int key_shift = 0;                     // a block has 2^key_shift keys
  bool merges = false;                   // whether a sequence may have more than one block
  float* partial_sums = nullptr;         // then: [blocks, queries, heads, value_dim]
  SoftmaxPart* partial_stats = nullptr;  // [blocks, queries, heads]
};
constexpr int kMostStepShift = 10;  // of key_shift
void launch_step(const StepCall& call, cudaStream_t stream);
void launch_step_merge(const StepCall& call, cudaStream_t stream);

// Fills the sequences' key_index and key_count; their order.
void launch_compact_mask(const Mask& mask, const Sequences& sequences, cudaStream_t stream);
void launch_order(const Sequences& sequences, cudaStream_t stream);

// Multiprocessors of the current device.
int64_t processors();

}  // namespace attn_ext::cuda
