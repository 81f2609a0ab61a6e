// What the kernels are told, and their launchers. Each puts one kernel on `stream` and throws if
// the launch fails; none allocates or waits, so that they can be captured in a graph.
#pragma once

#include <cuda_runtime.h>

#include "../view.h"

namespace attn_ext::cuda {

// The rows of all queries, or of all keys: jagged by offsets, else `rows` for each sequence. Rows
// are numbered through all sequences.
struct Side {
  Integers offsets;
  int64_t rows = 0;
  int64_t longest = 0;  // a bound on the rows of a sequence
};

struct Sequences {
  int64_t count = 0;
  Side query;
  Side key;
  Integers key_lengths;
  Mask mask;                     // data is null without one
  int32_t* key_index = nullptr;  // [count, key.rows]: the keys that a mask leaves
  int32_t* key_count = nullptr;  // [count]: how many they are
  int32_t* order = nullptr;      // [count]: those with most pairs first
  int64_t first_row = 0;         // only queries first_row <= row < last_row are worked on: a wave's
  int64_t last_row = 0;
};

// A number for each query, the row, and key, the column: those of the keys of a query side by side,
// rows of queries counted from Sequences::first_row; or `by_key`, where rows of queries count from
// the first of their sequence, and keys have the places that they have in the key tensor or in
// dense weights. Of float32 but for weights, which may be of the type of values.
struct Scores {
  Rows rows;
  bool by_key = false;
  int64_t begin = 0;  // by rows before a jagged sequence: as rows.col, but 0 in dense weights
};

// Data of what is not there, or not asked for, is null, here and below.
struct ForwardCall : Operands {
  Sequences sequences;
  bool few_queries = false;  // one a sequence, or those of pooling: bound by memory
  Scores scores;
  Rows context;
  Rows stats;      // of the softmax: largest score, sum of exponentials
  Scores weights;  // alpha after dropout
  // Of kernels whose blocks have 2^key_shift keys:
  int key_shift = 0;
  bool merges = false;                   // whether a sequence may have more than one block
  float* partial_sums = nullptr;         // [blocks, queries, heads, value_dim] of few queries
  SoftmaxPart* partial_stats = nullptr;  // [blocks, queries, heads]
};

struct BackwardCall : ForwardCall {
  Rows dcontext;
  Scores dweights;
  Scores alpha;             // after dropout; may take the place of scores
  Scores dscores;           // dalpha = dcontext . value, then s = alpha (dalpha - sum alpha dalpha)
  bool has_dalpha = false;  // else it counts as 0
  Rows dquery;
  Rows dkey;
  Rows dvalue;
  Rows dgate;  // of pooling
  Rows dscore_weight;
  Rows dkey_sums;  // float32, where dkey gathers over waves
  Rows dvalue_sums;
  Rows dquery_sums;                  // [blocks, rows of the wave, heads, dim], float32, where
                                     // sequences may have more than kGradientKeys
  float* partial_dweight = nullptr;  // [blocks, heads, branches, dim], gathers over waves
  int64_t partial_rows = 0;          // blocks
  int64_t branches = 1;
};

// Scores of all pairs of queries and keys; inner products of all dcontext with values.
void launch_scores(const ForwardCall& call, cudaStream_t stream);
void launch_product(const BackwardCall& call, cudaStream_t stream);

// Scores, softmax and context of few queries, and the last two from the parts of blocks. Without
// stats scores are all that is wanted.
constexpr int kMostStepShift = 10;  // of key_shift
void launch_step(const ForwardCall& call, cudaStream_t stream);
void launch_step_merge(const ForwardCall& call, cudaStream_t stream);

// context_i = sum_j alpha_ij value_j, where alpha is the softmax of scores, which is computed here.
void launch_context(const ForwardCall& call, cudaStream_t stream);

// alpha and s from scores, stats and dalpha; of raw scores s is dweights.
void launch_softmax_gradient(const BackwardCall& call, cudaStream_t stream);

// dvalue_j = sum_i alpha_ij dcontext_i.
void launch_value_gradient(const BackwardCall& call, cudaStream_t stream);

// dquery, dkey and partial sums of dscore_weight from s.
constexpr int kGradientFeatures = 64;  // of a block
constexpr int kGradientKeys = 28;      // that it takes at a time
void launch_gradient(const BackwardCall& call, cudaStream_t stream);
void launch_merge_dquery(const BackwardCall& call, cudaStream_t stream);
// The same of pooling, whose blocks have 2^kPoolShift keys.
constexpr int kPoolShift = 6;
void launch_pool_gradient(const BackwardCall& call, cudaStream_t stream);
void launch_merge_dweight(const BackwardCall& call, cudaStream_t stream);

// Fills the sequences' key_index and key_count; their order.
void launch_compact_mask(const Sequences& sequences, cudaStream_t stream);
void launch_order(const Sequences& sequences, cudaStream_t stream);

// Multiprocessors of the current device.
int64_t processors();

}  // namespace attn_ext::cuda
