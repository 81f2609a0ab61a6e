// The kernels' launchers. Each puts one kernel on `stream` and throws if the launch fails; none
// allocates or waits, so that they can be captured in a graph.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace attn_ext {
namespace cuda {

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
// For one query a sequence.
void launch_step_scores(const InnerCall& call, cudaStream_t stream);
void launch_step_product(const InnerCall& call, cudaStream_t stream);

// From scores alpha after dropout, which may take their place; and s = alpha (dalpha - sum alpha
// dalpha) in place of dalpha. Of raw scores dalpha becomes dweights, which is s.
struct SoftmaxGradientCall {
  Problem problem;
  Scores scores;
  Scores alpha;
  Scores dalpha;
  bool has_dalpha = false;  // else it counts as 0
  Rows stats;
  Weights dweights;       // data is null without
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
  Rows sums;        // by key: float32, where out gathers over waves
  Rows stats;       // by query: for the statistics of the softmax
  Weights weights;  // by query: for alpha after dropout; data is null unless asked for
};
void launch_weighted(const WeightedCall& call, cudaStream_t stream);

// Features that a block of the gradient kernel works on, and the most queries at a time.
constexpr int kGradientFeatures = 64;
constexpr int kGradientQueries = 48;

// dquery, dkey and partial sums of dscore_weight from s. Data of what is not wanted is null.
struct GradientCall {
  Problem problem;
  Scores dscores;
  Rows dquery;
  Rows dkey;
  Rows dkey_sums;         // float32, where dkey gathers over tiles of queries
  bool one_step = false;  // one query a sequence: bound by memory, so exact throughout
  int key_shift = 0;      // a block has 2^key_shift keys
  // With more than one block of keys a sequence: [splits, rows of the wave, heads, dim], float32,
  // and [splits, rows of the wave, heads, chunks] of what the sums leave out (see gradient.cu).
  Rows partial_dquery;
  float2* left_out = nullptr;
  float* partial_dweight = nullptr;  // [tiles of keys, heads, dim], gathers over waves
};
void launch_gradient(const GradientCall& call, cudaStream_t stream);
void launch_merge_dquery(const GradientCall& call, cudaStream_t stream);
// dscore_weight from the partial sums [tiles, heads, dim].
void launch_merge_dweight(const float* partial, int64_t tiles, int64_t heads, int64_t dim,
                          const Rows& dscore_weight, cudaStream_t stream);

// Context and statistics for one query a sequence, or with `scored` for the few of pooling.
struct StepCall {
  Problem problem;
  Rows context;
  Rows stats;
  Weights weights;                       // data is null unless asked for
  int key_shift = 0;                     // a block has 2^key_shift keys
  bool merges = false;                   // whether a sequence may have more than one block; then
  Scores scores;                         // with weights: where scores wait for their softmax
  bool scored = false;                   // whether they stand there already
  float* partial_sums = nullptr;         // [tiles of keys, queries, heads, value_dim]
  SoftmaxPart* partial_stats = nullptr;  // [tiles of keys, queries, heads]
};
constexpr int kMostStepShift = 10;  // of key_shift
void launch_step(const StepCall& call, cudaStream_t stream);
void launch_step_merge(const StepCall& call, cudaStream_t stream);

// Keys that are scored without a query: the rows of the score weights, which are problem.query and
// the same for every sequence, meet hidden rows (see pool.cu).
struct PoolCall {
  Problem problem;
  Rows gate;                   // by key; data is null without
  Dropout feature_dropout[2];  // of the tanh, and of the gate
  Scores scores;               // or in backward s
  Rows dkey;                   // data of what is not wanted is null
  Rows dgate;
  float* partial_dweight = nullptr;  // [tiles of keys, heads, queries, dim]
};
constexpr int kPoolShift = 6;  // a block has 2^kPoolShift keys
void launch_pool_scores(const PoolCall& call, cudaStream_t stream);
void launch_pool_gradient(const PoolCall& call, cudaStream_t stream);

// Positions of the keys that a mask of `rows` keys for each of `count` sequences leaves, in order.
void launch_compact_mask(const Mask& mask, int64_t count, int64_t rows, int32_t* key_index,
                         int32_t* key_count, cudaStream_t stream);

void clear(void* data, int64_t bytes, cudaStream_t stream);
// Multiprocessors of the current device.
int64_t processors();

}  // namespace cuda
}  // namespace attn_ext
