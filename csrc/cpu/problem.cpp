#include "problem.h"

#include <algorithm>

namespace attn_ext {
namespace {

struct Range {
  int64_t begin;
  int64_t count;
};

// Rows of sequence n of a side: all `rows` of it, or where there are offsets those between two.
Range range_of(const Integers& offsets, int64_t n, int64_t rows, int64_t longest) {
  if (offsets.data == nullptr) {
    return {0, rows};
  }
  const int64_t begin = std::clamp<int64_t>(offsets.at(n), 0, rows);
  const int64_t end = std::clamp<int64_t>(offsets.at(n + 1), begin, rows);
  return {begin, std::min(end - begin, std::max<int64_t>(longest, 0))};
}

// Positions of the keys of one sequence that the mask leaves, listed only if they are not
// consecutive.
void apply_mask(const Mask& mask, int64_t rows, Sequence& sequence, std::vector<int64_t>& indices) {
  const bool* row = mask.data + sequence.number * mask.batch;
  const size_t start = indices.size();
  for (int64_t j = 0; j < rows; ++j) {
    if (!row[j * mask.row]) {
      indices.push_back(j);
    }
  }
  sequence.key_count = static_cast<int64_t>(indices.size() - start);
  sequence.first_key = sequence.key_count > 0 ? indices[start] : 0;
  if (sequence.key_count == 0 || indices.back() - indices[start] + 1 == sequence.key_count) {
    indices.resize(start);
  } else {
    sequence.key_index = indices.data() + start;
  }
}

}  // namespace

void Problem::find_sequences() {
  const bool jagged_queries = layout.query_offsets.data != nullptr;
  const bool jagged_keys = layout.key_offsets.data != nullptr;
  const int64_t count = std::max<int64_t>(
      0, std::min(jagged_queries ? layout.query_offsets.size - 1 : layout.query_batch,
                  jagged_keys ? layout.key_offsets.size - 1 : layout.key_batch));
  int64_t query_rows = 0;
  int64_t key_rows = 0;
  sequences.reserve(count);
  if (layout.mask.data != nullptr) {  // all that may be listed, as sequences point there
    key_indices.reserve(layout.key_batch * layout.key_rows);
  }
  for (int64_t n = 0; n < count; ++n) {
    const Range queries = range_of(layout.query_offsets, n, layout.query_rows, layout.max_queries);
    const Range keys = range_of(layout.key_offsets, n, layout.key_rows, layout.max_keys);
    Sequence sequence{};
    sequence.number = n;
    sequence.query_batch = jagged_queries ? 0 : n;
    sequence.query_begin = queries.begin;
    sequence.query_count = queries.count;
    sequence.key_batch = jagged_keys ? 0 : n;
    sequence.key_begin = keys.begin;
    sequence.key_count = keys.count;
    if (layout.key_lengths.data != nullptr) {
      sequence.key_count = std::clamp<int64_t>(layout.key_lengths.at(n), 0, keys.count);
    } else if (layout.mask.data != nullptr) {
      apply_mask(layout.mask, keys.count, sequence, key_indices);
    }
    // Adjoining ranges of the right total leave no row out.
    covers_queries &= sequence.key_count > 0 && (!jagged_queries || queries.begin == query_rows);
    covers_keys &= sequence.query_count > 0 && (!jagged_keys || keys.begin == key_rows);
    query_rows += sequence.query_count;
    key_rows += sequence.key_count;
    sequences.push_back(sequence);
  }
  covers_queries &= query_rows == layout.query_batch * layout.query_rows;
  covers_keys &= key_rows == layout.key_batch * layout.key_rows;
}

}  // namespace attn_ext
