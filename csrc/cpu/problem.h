// Plain description of one attention call, shared by the drivers and the kernels: pointers, strides
// in elements, and the geometry of every sequence. Nothing here depends on the instruction set.
#pragma once

#include <vector>

#include "../view.h"

namespace attn_ext {

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
  std::vector<Sequence> sequences;
  std::vector<int64_t> key_indices;  // storage behind Sequence::key_index
  int64_t weight_rows = 1;           // of score weights, a head
  Rows exp_key;                      // optional: exp(2 key), in the compute type
  Rows key_bound;                    // with exp_key: the largest |key| of each row
  bool weights_by_key = false;  // weights are [Nk, H, Nq]; else [B, H, max_seqlen_q, max_seqlen_k]
  bool scores_by_key = false;   // kept scores are [.., Nk, H, Nq]; else [.., Nq, H, max_seqlen_k]
};

}  // namespace attn_ext
