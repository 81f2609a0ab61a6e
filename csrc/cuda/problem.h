// What the kernels are told: the geometry of the sequences, and where scores lie. Plain data,
// filled by call.h and read on the device.
#pragma once

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
  int32_t* key_index = nullptr;  // [count, key.rows]: the keys that a mask leaves
  int32_t* key_count = nullptr;  // [count]: how many they are
  int32_t* order = nullptr;      // [count]: those with most pairs first
  int64_t first_row = 0;         // only queries first_row <= row < last_row are worked on
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

// What every kernel needs.
struct Problem : Operands {
  Sequences sequences;
};

}  // namespace attn_ext::cuda
