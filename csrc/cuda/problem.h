// What the kernels are told: the geometry of the sequences, and where scores lie. Plain data,
// filled by registration.cpp and read on the device.
#pragma once

#include "../view.h"

namespace attn_ext {
namespace cuda {

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
  const int32_t* key_index = nullptr;  // [count, key.rows]: the keys that a mask leaves
  const int32_t* key_count = nullptr;  // [count]: how many they are
  int64_t first_row = 0;               // only queries first_row <= row < last_row are worked on
  int64_t last_row = 0;
};

// A number for each query and key: those of the keys of a query side by side, rows of queries
// counted from Sequences::first_row; or `by_key`, where rows of queries count from the first of
// their sequence, and keys have the places that they have in the key tensor or in dense weights.
struct Scores {
  float* data = nullptr;
  bool by_key = false;
  int64_t batch = 0;  // by sequence
  int64_t query = 0;
  int64_t key = 0;
  int64_t begin = 0;  // by rows before a jagged sequence: as `key`, but 0 in dense weights
  int64_t head = 0;
};

// Attention weights as the caller sees them: [B, H, max_seqlen_q, max_seqlen_k], or by key [Nk, H],
// of more than one query [Nk, H, Nq].
struct Weights {
  Rows rows;  // row: query, col: key
  bool by_key = false;
};

// What every kernel needs.
struct Problem {
  Sequences sequences;
  int64_t heads = 0;
  int64_t dim = 0;
  int64_t value_dim = 0;
  Rows query;
  Rows key;
  Rows value;
  Rows score_weight;  // head, col
  Dropout dropout;
  bool raw_scores = false;  // weights are the scores, and their gradient the scores'
  // Whether all inputs are of 16 bits and the scores are not returned: roundings of the inputs
  // exceed those of the factored form.
  bool is_short = false;
};

}  // namespace cuda
}  // namespace attn_ext
