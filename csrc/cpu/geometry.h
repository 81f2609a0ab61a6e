// From offsets, lengths and masks to the rows of every sequence.
#pragma once

#include "problem.h"

namespace attn_ext {

// A vector of int32 or int64; data is null where the argument was not given.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t size = 0;
  int64_t stride = 1;

  int64_t at(int64_t n) const {
    return wide ? static_cast<const int64_t*>(data)[n * stride]
                : static_cast<const int32_t*>(data)[n * stride];
  }
};

struct Mask {
  const bool* data = nullptr;  // [B, Nk], true = ignore
  int64_t batch = 0;
  int64_t row = 0;
};

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
};

struct Coverage {
  bool queries = true;  // every query row belongs to a sequence with keys
  bool keys = true;     // every key row takes part in a sequence with queries
};

// Fills problem.sequences. Offsets and lengths are clamped into the tensors, whatever they hold.
Coverage describe_sequences(const Layout& layout, Problem& problem);

}  // namespace attn_ext
