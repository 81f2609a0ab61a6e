// From offsets, lengths and masks to the rows of every sequence.
#pragma once

#include "problem.h"

namespace attn_ext {

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
