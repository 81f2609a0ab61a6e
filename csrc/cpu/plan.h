// How a call is cut into items of about equal cost. The partition follows from shapes alone, never
// from the number of threads, so that neither do the results.
#pragma once

#include <vector>

#include "problem.h"

namespace attn_ext {

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

// Features [col, col + cols) of units [unit_begin, unit_end) of one head; several units come with
// all their keys.
struct GradientItem {
  int64_t unit_begin;
  int64_t unit_end;
  int64_t col;
  int64_t cols;
  int64_t key;
  int64_t key_count;       // -1: all
  int64_t dquery_partial;  // first row of its partial dquery, or -1 if it covers all keys
  int64_t dweight_row;     // row of its partial dscore_weight
};

// The partial dquery rows of `splits` items over the same unit.
struct QueryMerge {
  int64_t unit;
  int64_t partial;
  int64_t splits;
};

// Partial dscore_weight rows [begin, end) of one head.
struct WeightMerge {
  int64_t head;
  int64_t begin;
  int64_t end;
};

// Units whose scores are in memory together: at most one of each head and sequence.
struct Wave {
  std::vector<Unit> units;
  std::vector<UnitBlock> score_items;
  std::vector<UnitBlock> split_items;  // those of them that have a part of their unit's keys
  std::vector<UnitBlock> value_items;
  std::vector<GradientItem> gradient_items;
  std::vector<QueryMerge> query_merges;
  std::vector<WeightMerge> weight_merges;
  int64_t scores = 0;
  int64_t deltas = 0;
  int64_t partial_rows = 0;
  int64_t weight_rows = 0;
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
