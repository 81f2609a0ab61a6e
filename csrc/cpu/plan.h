// One call: pointers, strides in elements, the geometry of every sequence, and how the call is cut
// into items of about equal cost. The partition follows from shapes alone, never from the number of
// threads, so that neither do the results. Nothing here depends on the instruction set.
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

// How numbers of queries and keys lie: [B, H, max_seqlen_q, max_seqlen_k], [.., Nq, H,
// max_seqlen_k] or [.., Nk, H, Nq].
enum class PairLayout { kDense, kByQuery, kByKey };

struct Problem : Operands {
  Layout layout;
  // Of the layout, by find_sequences().
  std::vector<Sequence> sequences;
  std::vector<int64_t> key_indices;  // storage behind Sequence::key_index
  bool covers_queries = true;        // every query row belongs to a sequence with keys
  bool covers_keys = true;           // every key row takes part in a sequence with queries

  int64_t weight_rows = 1;  // of score weights, a head
  Rows exp_key;             // optional: exp(2 key), in the compute type
  Rows key_bound;           // with exp_key: the largest |key| of each row
  PairLayout weights_layout = PairLayout::kDense;
  PairLayout scores_layout = PairLayout::kByQuery;  // of those that forward keeps

  // Whether the compute type, "T" everywhere, is double rather than float.
  bool computes_in_double() const { return key.dtype == DType::kFloat64; }

  // Offsets and lengths are clamped into the tensors, whatever they hold.
  void find_sequences();
};

// Keys of a tile of a gradient item, and values that are multiplied at once.
constexpr int64_t kGradientTile = 64;
constexpr int64_t kValueTile = 64;

// Queries [query, query + query_count) of one head of one sequence against keys [key, key +
// key_count).
struct ForwardItem {
  int64_t sequence;
  int64_t head;
  int64_t query;
  int64_t query_count;
  int64_t key;
  int64_t key_count;
  int64_t partial;  // first row of its partial sums, or -1 if it covers all keys
};

// The partial sums of `splits` items over the same queries.
struct ForwardMerge {
  ForwardItem whole;
  int64_t splits;
};

struct ForwardPlan {
  std::vector<ForwardItem> items;
  std::vector<ForwardMerge> merges;
  int64_t partial_rows = 0;
  double cost = 0;
};

ForwardPlan plan_forward(const Problem& problem);

// A block of queries of one head of one sequence in backward, against all of its keys.
struct Unit {
  int64_t sequence;
  int64_t head;
  int64_t query;
  int64_t query_count;
  int64_t key_count;
  int64_t ld;      // row stride of its scores
  int64_t scores;  // where they begin in the wave's buffers
  int64_t deltas;  // where its rows' sums, one a row and key chunk, begin
  int64_t chunks;  // number of ranges its keys are cut into
  int64_t round;
  bool first;  // of its head and sequence
  bool last;
};

// Queries [query, query + query_count) of a unit, counted from its first, against keys [key, key +
// key_count).
struct UnitBlock {
  int64_t unit;
  int64_t query;
  int64_t query_count;
  int64_t chunk;  // number of the range of keys
  int64_t key;
  int64_t key_count;
};

// Features [col, col + cols) of units [unit_begin, unit_end) of one head, with up to key_count of
// their keys; several units come with all of them.
struct GradientItem {
  int64_t unit_begin;
  int64_t unit_end;
  int64_t col;
  int64_t cols;
  int64_t key;
  int64_t key_count;
  int64_t dquery_partial;  // first row of its partial dquery, or -1 if it covers all keys
  int64_t dweight_row;     // row of its partial dscore_weight
};

// The partial dquery rows of `splits` items over the same unit.
struct QueryMerge {
  int64_t unit;
  int64_t partial;
  int64_t splits;
};

// Units whose scores are in memory together: at most one of each head and sequence.
struct Wave {
  std::vector<Unit> units;
  std::vector<UnitBlock> score_items;
  std::vector<UnitBlock> split_items;  // those of them that have a part of their unit's keys
  std::vector<UnitBlock> value_items;
  std::vector<GradientItem> gradient_items;
  std::vector<QueryMerge> query_merges;
  std::vector<int64_t> weight_heads;  // of its rows of partial dscore_weight
  int64_t scores = 0;
  int64_t deltas = 0;
  int64_t partial_rows = 0;
  double score_cost = 0;
  double gradient_cost = 0;
};

// All units, without their places in a wave, round by round: each sequence's first block of
// queries, then its second ...
std::vector<Unit> plan_units(const Problem& problem);

// The wave of those units from `next` on that fit into one; `next` is then the first of the others.
// The items of all waves together would be as large as all scores.
Wave plan_wave(const Problem& problem, const std::vector<Unit>& units, size_t& next);

}  // namespace attn_ext
