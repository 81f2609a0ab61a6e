#include "plan.h"

#include <algorithm>
#include <utility>

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

namespace {

// Work is counted in query-key-feature triples; AVX-512 does about ten a nanosecond.
constexpr double kItemCost = 1 << 21;        // where an item is cut, about 0.2 ms
constexpr double kGroupCost = 1 << 18;       // up to which small gradient items are joined
constexpr int64_t kLargestQueryBlock = 128;  // queries that share the exponentials of a key
constexpr int64_t kBlockNumbers = 1 << 17;   // their exponentials, 512 KiB of float, stay in L2
constexpr int64_t kSmallestUnitBlock = 256;  // an item's keys, to outweigh its partial results
constexpr int64_t kWaveScores = 1 << 20;     // numbers in each of a wave's two score buffers
constexpr int64_t kUnitScores = 1 << 17;     // of a unit with few keys
constexpr int64_t kLargestUnit = 2048;       // queries
constexpr int64_t kFeatureUnit = 64;         // whole steps on any machine
constexpr int64_t kSmallestFeatureBlock = 128;
constexpr int64_t kWaveWeightSums = 1 << 22;  // numbers in a wave's partial dscore_weight
// Reading a key or a value costs as much as this many queries against it.
constexpr int64_t kReadCost = 3;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t query_block(int64_t dim) {
  const int64_t fitting = kBlockNumbers / std::max<int64_t>(dim, 1) / 4 * 4;
  return std::clamp<int64_t>(fitting, 16, kLargestQueryBlock);
}

double forward_cost(const Problem& problem, int64_t queries, int64_t keys) {
  return static_cast<double>(keys) *
         (static_cast<double>(queries + kReadCost) * problem.dim +
          static_cast<double>(queries / 8 + kReadCost) * problem.value_dim + 64);
}

// Keys of the equal ranges, whole multiples of 64, that the keys of an item are cut into so that
// each costs about kItemCost, yet the partial rows of all `queries` that have some at a time are no
// more than queries and keys.
int64_t key_range(double cost, int64_t queries, int64_t keys) {
  const int64_t wanted = static_cast<int64_t>(cost / kItemCost) + 1;
  const int64_t affordable = (queries + keys) / queries;
  const int64_t splits = std::min({wanted, affordable, keys / kSmallestUnitBlock});
  return std::max<int64_t>(1, divide_up(divide_up(keys, std::max<int64_t>(splits, 1)), 64) * 64);
}

// Costly items first, so that the last items to be taken are short.
template <class Item, class Cost>
void sort_by_cost(std::vector<Item>& items, Cost cost) {
  std::stable_sort(items.begin(), items.end(),
                   [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
}

// Row length of a unit's scores: whole vectors of any machine.
int64_t padded_keys(int64_t keys) { return divide_up(keys, 16) * 16; }

// Queries of a unit: a block, or more of them where keys are few and a block is little work, yet no
// more than leave the unit's scores within a wave's buffers. In pooling all of them, of which
// forward kept scores anyway.
int64_t unit_queries(const Problem& problem, const Sequence& sequence) {
  if (problem.keys_alone) {
    return std::max<int64_t>(1, sequence.query_count);
  }
  const int64_t keys = std::max<int64_t>(1, sequence.key_count);
  const int64_t block = query_block(problem.dim);
  const int64_t fitting = std::max<int64_t>(4, kWaveScores / keys / 4 * 4);
  const int64_t wanted = std::clamp(kUnitScores / keys / block * block, block, kLargestUnit);
  return std::min(fitting, wanted);
}

void plan_unit(const Problem& problem, Unit unit, Wave& wave) {
  const int64_t index = static_cast<int64_t>(wave.units.size());
  const int64_t keys = unit.key_count;
  const int64_t block = query_block(problem.dim);
  const double cost = forward_cost(problem, std::min(block, unit.query_count), keys);
  const int64_t range = key_range(cost, unit.query_count, keys);
  unit.ld = padded_keys(keys);
  unit.scores = wave.scores;
  unit.deltas = wave.deltas;
  unit.chunks = divide_up(keys, range);
  for (int64_t query = 0; query < unit.query_count; query += block) {
    const int64_t queries = std::min(block, unit.query_count - query);
    for (int64_t key = 0; key < keys; key += range) {
      wave.score_items.push_back(
          {index, query, queries, key / range, key, std::min(range, keys - key)});
      if (unit.chunks > 1) {
        wave.split_items.push_back(wave.score_items.back());
      }
    }
  }
  for (int64_t key = 0; key < keys; key += kValueTile) {
    wave.value_items.push_back(
        {index, 0, unit.query_count, 0, key, std::min(kValueTile, keys - key)});
  }
  wave.scores += unit.query_count * unit.ld;
  wave.deltas += unit.query_count * unit.chunks;
  wave.score_cost += forward_cost(problem, unit.query_count, keys);
  wave.units.push_back(unit);
}

// Features of a gradient item: as many as keep the exponentials and the gradients of its queries
// and of a tile of its keys in L2 and its cost within bounds.
int64_t gradient_columns(const Problem& problem, const Unit& unit) {
  const int64_t rows = 2 * (unit.query_count + std::min(unit.key_count, kGradientTile));
  const double cost = 2.0 * static_cast<double>(unit.query_count + kReadCost) *
                      static_cast<double>(std::min(unit.key_count, kSmallestUnitBlock));
  const int64_t fitting = std::min(kBlockNumbers / rows, static_cast<int64_t>(kItemCost / cost));
  const int64_t columns = std::max(fitting / kFeatureUnit * kFeatureUnit, kSmallestFeatureBlock);
  return std::max<int64_t>(1, std::min(columns, problem.dim));
}

double gradient_cost(const Problem& problem, const Unit& unit) {
  return 2.0 * static_cast<double>(unit.query_count + kReadCost) *
         static_cast<double>(unit.key_count * gradient_columns(problem, unit));
}

// Gradient items of units [begin, end), all of one head; several units are small and not cut.
void plan_gradient_group(const Problem& problem, int64_t begin, int64_t end, Wave& wave) {
  const Unit& unit = wave.units[begin];
  const int64_t block = gradient_columns(problem, unit);
  const int64_t range =
      end - begin == 1 ? key_range(gradient_cost(problem, unit), unit.query_count, unit.key_count)
                       : INT64_MAX;
  const bool is_cut = range < unit.key_count;
  if (is_cut) {
    wave.query_merges.push_back({begin, wave.partial_rows, divide_up(unit.key_count, range)});
  }
  for (int64_t key = 0; key < unit.key_count; key += range) {
    const int64_t row = static_cast<int64_t>(wave.weight_heads.size());
    for (int64_t col = 0; col < problem.dim; col += block) {
      wave.gradient_items.push_back({begin, end, col, std::min(block, problem.dim - col), key,
                                     range, is_cut ? wave.partial_rows : -1, row});
    }
    wave.weight_heads.push_back(unit.head);
    wave.partial_rows += is_cut ? unit.query_count : 0;
  }
}

void plan_gradients(const Problem& problem, Wave& wave) {
  const int64_t units = static_cast<int64_t>(wave.units.size());
  for (int64_t begin = 0, end = 0; begin < units; begin = end) {
    const Unit& first = wave.units[begin];
    const int64_t columns = gradient_columns(problem, first);
    double cost = 0;
    do {
      cost += gradient_cost(problem, wave.units[end++]);
    } while (end < units && wave.units[end].head == first.head &&
             gradient_columns(problem, wave.units[end]) == columns &&
             cost + gradient_cost(problem, wave.units[end]) <= kGroupCost);
    wave.gradient_cost += cost * problem.dim / columns;
    plan_gradient_group(problem, begin, end, wave);
  }
}

// Whether a unit of this size still fits into a wave.
bool fits(const Problem& problem, const Unit& unit, const Wave& wave) {
  const int64_t units = static_cast<int64_t>(wave.units.size());
  return units == 0 ||
         (unit.round == wave.units[0].round &&
          wave.scores + unit.query_count * padded_keys(unit.key_count) <= kWaveScores &&
          (units + 1) * problem.weight_rows * problem.dim <= kWaveWeightSums);
}

}  // namespace

ForwardPlan plan_forward(const Problem& problem) {
  ForwardPlan plan;
  const int64_t block = query_block(problem.dim);
  for (size_t n = 0; n < problem.sequences.size(); ++n) {
    const Sequence& sequence = problem.sequences[n];
    const int64_t keys = sequence.key_count;
    for (int64_t head = 0; keys > 0 && head < problem.heads; ++head) {
      for (int64_t query = 0; query < sequence.query_count; query += block) {
        const int64_t queries = std::min(block, sequence.query_count - query);
        const double cost = forward_cost(problem, queries, keys);
        const int64_t range = key_range(cost, sequence.query_count, keys);
        const bool is_cut = range < keys;
        const ForwardItem whole{static_cast<int64_t>(n), head, query, queries, 0, keys,
                                plan.partial_rows};
        plan.cost += cost;
        if (is_cut) {
          plan.merges.push_back({whole, divide_up(keys, range)});
        }
        for (int64_t key = 0; key < keys; key += range) {
          plan.items.push_back(whole);
          plan.items.back().key = key;
          plan.items.back().key_count = std::min(range, keys - key);
          plan.items.back().partial = is_cut ? plan.partial_rows : -1;
          plan.partial_rows += is_cut ? queries : 0;
        }
      }
    }
  }
  sort_by_cost(plan.items, [](const ForwardItem& item) {
    return (item.query_count + kReadCost) * item.key_count;
  });
  return plan;
}

std::vector<Unit> plan_units(const Problem& problem) {
  std::vector<Unit> units;
  bool is_last_round = false;
  for (int64_t round = 0; !is_last_round; ++round) {
    is_last_round = true;
    for (int64_t head = 0; head < problem.heads; ++head) {
      for (size_t n = 0; n < problem.sequences.size(); ++n) {
        const Sequence& sequence = problem.sequences[n];
        const int64_t block = unit_queries(problem, sequence);
        const int64_t query = round * block;
        if (sequence.key_count == 0 || query >= sequence.query_count) {
          continue;
        }
        Unit unit{};
        unit.sequence = static_cast<int64_t>(n);
        unit.head = head;
        unit.query = query;
        unit.query_count = std::min(block, sequence.query_count - query);
        unit.key_count = sequence.key_count;
        unit.round = round;
        unit.first = round == 0;
        unit.last = query + unit.query_count == sequence.query_count;
        units.push_back(unit);
        is_last_round &= unit.last;
      }
    }
  }
  return units;
}

Wave plan_wave(const Problem& problem, const std::vector<Unit>& units, size_t& next) {
  Wave wave;
  for (; next < units.size() && fits(problem, units[next], wave); ++next) {
    plan_unit(problem, units[next], wave);
  }
  plan_gradients(problem, wave);
  sort_by_cost(wave.score_items,
               [](const UnitBlock& item) { return item.query_count * item.key_count; });
  return wave;
}

}  // namespace attn_ext
