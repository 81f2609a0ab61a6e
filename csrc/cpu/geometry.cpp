#include "geometry.h"

#include <algorithm>

namespace attn_ext {
namespace {

struct Range {
  int64_t begin;
  int64_t count;
};

Range jagged_range(const Integers& offsets, int64_t n, int64_t total, int64_t longest) {
  const int64_t begin = std::clamp<int64_t>(offsets.at(n), 0, total);
  const int64_t end = std::clamp<int64_t>(offsets.at(n + 1), begin, total);
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
  }
}

}  // namespace

Coverage describe_sequences(const Layout& layout, Problem& problem) {
  const bool jagged_queries = layout.query_offsets.data != nullptr;
  const bool jagged_keys = layout.key_offsets.data != nullptr;
  int64_t count =
      jagged_queries ? std::max<int64_t>(layout.query_offsets.size - 1, 0) : layout.query_batch;
  const int64_t key_count =
      jagged_keys ? std::max<int64_t>(layout.key_offsets.size - 1, 0) : layout.key_batch;
  count = std::min(count, key_count);
  Coverage coverage;
  int64_t query_rows = 0;
  int64_t key_rows = 0;
  std::vector<size_t> index_ends;
  problem.sequences.reserve(count);
  for (int64_t n = 0; n < count; ++n) {
    Sequence sequence{};
    sequence.number = n;
    sequence.query_batch = jagged_queries ? 0 : n;
    sequence.key_batch = jagged_keys ? 0 : n;
    const Range queries = jagged_queries ? jagged_range(layout.query_offsets, n, layout.query_rows,
                                                        layout.max_queries)
                                         : Range{0, layout.query_rows};
    const Range keys = jagged_keys
                           ? jagged_range(layout.key_offsets, n, layout.key_rows, layout.max_keys)
                           : Range{0, layout.key_rows};
    sequence.query_begin = queries.begin;
    sequence.query_count = queries.count;
    sequence.key_begin = keys.begin;
    sequence.key_count = keys.count;
    if (layout.key_lengths.data != nullptr) {
      sequence.key_count = std::clamp<int64_t>(layout.key_lengths.at(n), 0, keys.count);
    } else if (layout.mask.data != nullptr) {
      apply_mask(layout.mask, keys.count, sequence, problem.key_indices);
    }
    index_ends.push_back(problem.key_indices.size());
    // Adjoining ranges of the right total leave no row out.
    coverage.queries &= sequence.key_count > 0 && (!jagged_queries || queries.begin == query_rows);
    coverage.keys &= sequence.query_count > 0 && (!jagged_keys || keys.begin == key_rows);
    query_rows += sequence.query_count;
    key_rows += sequence.key_count;
    problem.sequences.push_back(sequence);
  }
  size_t begin = 0;
  for (int64_t n = 0; n < count; ++n) {
    if (index_ends[n] > begin) {
      problem.sequences[n].key_index = problem.key_indices.data() + begin;
    }
    begin = index_ends[n];
  }
  coverage.queries &= query_rows == layout.query_batch * layout.query_rows;
  coverage.keys &= key_rows == layout.key_batch * layout.key_rows;
  return coverage;
}

}  // namespace attn_ext
