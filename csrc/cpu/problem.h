// Plain description of one attention call, shared by the drivers and the kernels: pointers, strides
// in elements, and the geometry of every sequence. Nothing here depends on the instruction set.
#pragma once

#include <vector>

#include "../view.h"

namespace attn_ext {

// Which rows make up which sequence.
struct Layout {
  int64_t query_batch = 0;  // extents of query and key
  int64_t query_rows = 0;
  int64_t key_batch = 0;
  int64_t key_rows = 0;
  Integers query_offsets;
  Integers key_offsets;
  Integers key_lengths;
  Mask mask;
  int64_t max_queries = 0;  // bounds on jagged lengths
  int64_t max_keys = 0;

  int64_t longest_key() const { return key_offsets.data != nullptr ? max_keys : key_rows; }
};

// One sequence: where its rows start and which of its keys take part.
struct Sequence {
  int64_t number;  // in the batch
  int64_t query_batch;
  int64_t query_begin;
  int64_t query_count;
  int64_t key_batch;
  int64_t key_begin;
  int64_t key_count;         // keys that take part
  int64_t first_key;         // position of the first of them, if they are consecutive
  const int64_t* key_index;  // their positions if they are not, else null
};

struct Problem : Operands {
  Layout layout;
  // Of the layout, by find_sequences().
  std::vector<Sequence> sequences;
  std::vector<int64_t> key_indices;  // storage behind Sequence::key_index
  bool covers_queries = true;        // every query row belongs to a sequence with keys
  bool covers_keys = true;           // every key row takes part in a sequence with queries

  int64_t weight_rows = 1;      // of score weights, a head
  Rows exp_key;                 // optional: exp(2 key), in the compute type
  Rows key_bound;               // with exp_key: the largest |key| of each row
  bool weights_by_key = false;  // weights are [Nk, H, Nq]; else [B, H, max_seqlen_q, max_seqlen_k]
  bool scores_by_key = false;   // kept scores are [.., Nk, H, Nq]; else [.., Nq, H, max_seqlen_k]

  // Whether the compute type, "T" everywhere, is double rather than float.
  bool computes_in_double() const { return key.dtype == DType::kFloat64; }

  // Offsets and lengths are clamped into the tensors, whatever they hold.
  void find_sequences();
};

}  // namespace attn_ext
