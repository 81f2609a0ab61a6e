// The CPU kernels, called without PyTorch: results and gradients of csrc/cpu
// against plain loops. kernels.py builds this for the machine at hand and for
// aarch64, which qemu emulates.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <random>

#include "cpu/call.h"
#include "formula.h"

using namespace attn_ext;

namespace {

// A type that tensors are stored in; epsilon is the distance from 1 to the next
// number. Inputs of magnitude 1 are multiples of `grid` up to 2, which the type
// holds exactly.
struct Storage {
  const char* name;
  DType dtype;
  double epsilon;
  double grid;
};

constexpr Storage kStorages[] = {
    {"float64", DType::kFloat64, 0x1p-52, 0x1p-40},
    {"float32", DType::kFloat32, 0x1p-23, 0x1p-20},
    {"float16", DType::kFloat16, 0x1p-10, 0x1p-9},
    {"bfloat16", DType::kBFloat16, 0x1p-7, 0x1p-6},
};

const std::vector<Case> kCases = {
    {"one query, one key", Kind::kPadded, {1}, {1}, 1, 1, 1},
    {"no keys at all", Kind::kPadded, {3, 3}, {0, 0}, 1, 5, 3},
    {"no features of values", Kind::kPadded, {2}, {3}, 1, 4, 0},
    {"odd sizes", Kind::kPadded, {5, 5, 5}, {7, 7, 7}, 1, 13, 11},
    {"whole vectors", Kind::kPadded, {16, 16}, {64, 64}, 1, 64, 64},
    {"lengths and heads", Kind::kLengths, {3, 3, 3, 3}, {9, 0, 1, 4}, 2, 17, 5},
    {"mask with holes, 3 heads", Kind::kMask, {4, 4}, {17, 2}, 3, 9, 8},
    {"jagged, empty ones too", Kind::kJagged, {0, 1, 5, 3, 2}, {4, 1, 0, 33, 2}, 2, 31, 7},
    {"no sequence", Kind::kJagged, {}, {}, 1, 4, 4},
    {"keys shared by several items", Kind::kJagged, {1, 2}, {9001, 3}, 1, 40, 6},
    {"several blocks of queries", Kind::kPadded, {150}, {37}, 1, 65, 10},
    {"several units of queries", Kind::kPadded, {150}, {1100}, 1, 3, 2},
    {"tiny", Kind::kLengths, {4, 4}, {5, 3}, 1, 24, 4, false, 0.0625},
    {"tiny and other keys", Kind::kPadded, {5}, {200}, 1, 24, 4, false, 0.0625, 1},
    {"saturated", Kind::kJagged, {3, 4}, {11, 6}, 1, 24, 4, false, 32},
    {"by steps, lengths", Kind::kLengths, {6, 6, 6}, {19, 1, 0}, 1, 21, 9, true},
    {"by steps, heads", Kind::kMask, {3, 3}, {40, 12}, 2, 16, 16, true},
};

// A contiguous tensor of one dtype.
class Tensor {
 public:
  Tensor(const Storage& storage, size_t count)
      : dtype_(storage.dtype), width_(size_of(storage.dtype)), bytes_(count * width_) {}

  // Inputs are exact in the dtype, see Storage.
  Tensor(const Storage& storage, const std::vector<double>& values)
      : Tensor(storage, values.size()) {
    for (size_t n = 0; n < values.size(); ++n) {
      set(n, values[n]);
    }
  }

  void fill(double value) {
    for (size_t n = 0; n < bytes_.size() / width_; ++n) {
      set(n, value);
    }
  }

  void set(size_t n, double value) {
    switch (dtype_) {
      case DType::kFloat64:
        return put(n, value);
      case DType::kFloat32:
        return put(n, static_cast<float>(value));
      case DType::kBFloat16:  // the front of a float
        return put(n, static_cast<uint16_t>(bits_of(value) >> 16));
      case DType::kFloat16: {  // whose exponent has a bias of 15 instead of 127
        const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
        const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
        const uint32_t finite = magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13;
        return put(n, static_cast<uint16_t>(sign | (value == value ? finite : 0x7E00u)));
      }
    }
  }

  double get(size_t n) const {
    switch (dtype_) {
      case DType::kFloat64:
        return take<double>(n);
      case DType::kFloat32:
        return take<float>(n);
      case DType::kBFloat16: {
        const uint32_t bits = static_cast<uint32_t>(take<uint16_t>(n)) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
      }
      case DType::kFloat16: {
        const int exponent = take<uint16_t>(n) >> 10 & 31;
        const double fraction = take<uint16_t>(n) & 1023;
        const double magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                                 : exponent == 0 ? std::ldexp(fraction, -24)
                                                 : std::ldexp(1024 + fraction, exponent - 25);
        return take<uint16_t>(n) & 0x8000u ? -magnitude : magnitude;
      }
    }
    return NAN;
  }

  // Strides in elements of (batch, row, head, col), from element `offset` on.
  Rows rows(int64_t batch, int64_t row, int64_t head, int64_t col, int64_t offset = 0) {
    Rows result;
    result.data = bytes_.data() + offset * width_;
    result.dtype = dtype_;
    result.batch = batch;
    result.row = row;
    result.head = head;
    result.col = col;
    return result;
  }

  size_t size() const { return bytes_.size() / width_; }

 private:
  static size_t size_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  }

  static uint32_t bits_of(double value) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    return bits;
  }

  template <class Number>
  void put(size_t n, Number number) {
    std::memcpy(&bytes_[n * width_], &number, sizeof(number));
  }

  template <class Number>
  Number take(size_t n) const {
    Number number;
    std::memcpy(&number, &bytes_[n * width_], sizeof(number));
    return number;
  }

  DType dtype_;
  size_t width_;
  std::vector<unsigned char> bytes_;
};

// A case as the kernels and the formula see it.
struct Setting {
  Layout layout;
  std::vector<int64_t> query_offsets{0}, key_offsets{0}, lengths;
  std::unique_ptr<bool[]> mask;
  std::vector<Span> spans;
  int64_t longest_query, longest_key;
  int64_t query_rows = 0, key_rows = 0;  // of all sequences
  bool jagged;

  explicit Setting(const Case& c)
      : longest_query(longest(c.queries)),
        longest_key(longest(c.keys)),
        jagged(c.kind == Kind::kJagged) {
    const int64_t batch = static_cast<int64_t>(c.keys.size());
    for (int64_t b = 0; b < batch; ++b) {
      Span span{query_rows, c.queries[b], key_rows, {}};
      for (int64_t j = 0; j < c.keys[b]; ++j) {
        if (c.kind != Kind::kMask || j % 3 != 1) {
          span.keys.push_back(j);
        }
      }
      spans.push_back(span);
      query_rows += jagged ? c.queries[b] : longest_query;
      key_rows += jagged ? c.keys[b] : longest_key;
      query_offsets.push_back(query_rows);
      key_offsets.push_back(key_rows);
    }
    const int64_t strangers = jagged ? 2 : 0;  // rows past the last offset belong to nobody
    query_rows += strangers;
    key_rows += strangers;
    layout.query_batch = jagged ? 1 : batch;
    layout.query_rows = jagged ? query_rows : longest_query;
    layout.key_batch = jagged ? 1 : batch;
    layout.key_rows = jagged ? key_rows : longest_key;
    layout.max_queries = longest_query;
    layout.max_keys = longest_key;
    if (jagged) {
      layout.query_offsets = {query_offsets.data(), true, batch + 1, 1};
      layout.key_offsets = {key_offsets.data(), true, batch + 1, 1};
    } else if (c.kind == Kind::kLengths) {
      lengths = c.keys;
      layout.key_lengths = {lengths.data(), true, batch, 1};
    } else if (c.kind == Kind::kMask) {
      mask = std::make_unique<bool[]>(key_rows);
      std::fill_n(mask.get(), key_rows, true);
      for (const Span& span : spans) {
        for (const int64_t j : span.keys) {
          mask[span.key_begin + j] = false;
        }
      }
      layout.mask = {mask.get(), longest_key, 1};
    }
  }
};

Inputs draw(const Case& c, const Setting& setting, const Storage& storage) {
  std::mt19937 generator(1);
  const auto numbers = [&](int64_t count, double magnitude) {
    std::uniform_real_distribution<double> uniform(-2, 2);
    std::vector<double> result(count);
    for (double& number : result) {
      number = std::nearbyint(uniform(generator) / storage.grid) * storage.grid * magnitude;
    }
    return result;
  };
  const int64_t pairs =
      static_cast<int64_t>(c.keys.size()) * setting.longest_query * c.heads * setting.longest_key;
  Inputs in{numbers(setting.query_rows * c.heads * c.dim, c.magnitude),
            numbers(setting.key_rows * c.heads * c.dim, c.magnitude),
            numbers(setting.key_rows * c.heads * c.value_dim, 1),
            numbers(c.heads * c.dim, 1),
            numbers(setting.query_rows * c.heads * c.value_dim, 1),
            numbers(pairs, 1)};
  for (size_t n = in.key.size() / 2; n < in.key.size(); ++n) {
    in.key[n] *= c.late_keys / c.magnitude;
  }
  return in;
}

// Calls the kernels as csrc/registration.cpp does. Outputs start as NaN, or as
// 0 where rows belong to nobody.
template <class T>
class Attention {
 public:
  Attention(const Case& c, const Setting& setting, const Storage& storage, const Inputs& in)
      : case_(c),
        setting_(setting),
        compute_(kStorages[sizeof(T) == sizeof(double) ? 0 : 1]),
        is_short_(storage.dtype == DType::kFloat16 || storage.dtype == DType::kBFloat16),
        query_(storage, in.query),
        key_(storage, in.key),
        value_(storage, in.value),
        score_weight_(storage, in.score_weight),
        dcontext_(storage, in.dcontext),
        dweights_(storage, in.dweights),
        context(storage, in.dcontext.size()),
        weights(storage, in.dweights.size()),
        dquery(storage, in.query.size()),
        dkey(storage, in.key.size()),
        dvalue(storage, in.value.size()),
        dscore_weight(storage, in.score_weight.size()),
        stats_(compute_, setting.query_rows * c.heads * 2),
        scores_(compute_, setting.query_rows * c.heads * setting.longest_key),
        dkey_sum_(compute_, in.key.size()),
        dvalue_sum_(compute_, in.value.size()) {}

  void run() {
    Problem problem = describe(case_.by_steps ? 1 : setting_.layout.query_rows, 0);
    context.fill(problem.covers_queries ? NAN : 0);
    stats_.fill(problem.covers_queries ? NAN : 0);
    dquery.fill(problem.covers_queries ? NAN : 0);
    dkey.fill(problem.covers_keys ? NAN : 0);
    dvalue.fill(problem.covers_keys ? NAN : 0);
    weights.fill(0);
    for (Tensor* tensor : {&scores_, &dkey_sum_, &dvalue_sum_, &dscore_weight}) {
      tensor->fill(NAN);
    }
    if (case_.by_steps) {
      run_steps(problem.covers_keys);
      return;
    }
    run_forward(forward_arguments(problem, 0));
    BackwardArguments arguments = backward_arguments(problem, 0);
    arguments.dquery = query_rows(dquery, case_.dim, 0);
    arguments.dscore_weight = weight_rows(dscore_weight);
    set_key_side(arguments);
    arguments.needs_scores = true;
    run_backward(arguments);
  }

 private:
  // As AttentionMemory does: keys are prepared once, each step leaves its
  // scores' gradients and its weights, and one pass at the end takes those to
  // the gradients of the key side.
  void run_steps(bool covers_keys) {
    const int64_t heads = case_.heads;
    const int64_t steps = setting_.longest_query;
    const int64_t key_batch = setting_.layout.key_batch;
    const int64_t keys = setting_.layout.key_rows;
    const int64_t of_step = key_batch * keys * heads;
    std::vector<T> exp_key(of_step * case_.dim), key_bound(of_step);
    run_prepare(key_rows(key_, case_.dim), {key_batch, keys, heads, case_.dim}, exp_key.data(),
                key_bound.data());
    Tensor dscores(compute_, steps * of_step), step_weights(compute_, steps * of_step);
    dscores.fill(covers_keys ? NAN : 0);
    step_weights.fill(covers_keys ? NAN : 0);
    const auto prepared = [&](Problem problem) {
      problem.exp_key = key_rows(key_, case_.dim);
      problem.exp_key.data = exp_key.data();
      problem.exp_key.dtype = compute_.dtype;
      problem.key_bound = {key_bound.data(), compute_.dtype, keys * heads, heads, 1, 0};
      return problem;
    };
    for (int64_t step = 0; step < steps; ++step) {
      const Problem problem = prepared(describe(1, step));
      run_forward(forward_arguments(problem, step));
      BackwardArguments arguments = backward_arguments(problem, step);
      arguments.dquery = query_rows(dquery, case_.dim, step);
      arguments.step_dscores = dscores.rows(keys * heads, 0, 1, heads, step * of_step);
      arguments.step_weights = step_weights.rows(keys * heads, 0, 1, heads, step * of_step);
      arguments.needs_scores = true;
      run_backward(arguments);
    }
    const Problem problem = prepared(describe(steps, 0));
    BackwardArguments arguments;
    arguments.problem = &problem;
    arguments.dcontext = query_rows(dcontext_, case_.value_dim, 0);
    arguments.dscore_weight = weight_rows(dscore_weight);
    arguments.step_dscores = dscores.rows(keys * heads, of_step, 1, heads);
    arguments.step_weights = step_weights.rows(keys * heads, of_step, 1, heads);
    arguments.from_steps = true;
    set_key_side(arguments);
    arguments.needs_scores = true;
    run_backward(arguments);
  }

  Problem describe(int64_t queries, int64_t first_query) {
    Problem problem;
    problem.layout = setting_.layout;
    problem.layout.query_rows = queries;
    problem.heads = case_.heads;
    problem.dim = case_.dim;
    problem.value_dim = case_.value_dim;
    problem.query = query_rows(query_, case_.dim, first_query);
    problem.key = key_rows(key_, case_.dim);
    problem.value = key_rows(value_, case_.value_dim);
    problem.score_weight = weight_rows(score_weight_);
    problem.is_short = is_short_;
    problem.find_sequences();
    return problem;
  }

  ForwardArguments forward_arguments(const Problem& problem, int64_t first_query) {
    ForwardArguments arguments;
    arguments.problem = &problem;
    arguments.context = query_rows(context, case_.value_dim, first_query);
    arguments.stats = query_rows(stats_, 2, first_query);
    arguments.weights = pair_rows(weights, first_query);
    arguments.scores = query_rows(scores_, setting_.longest_key, first_query);
    arguments.keeps_scores = keeps_scores();
    return arguments;
  }

  BackwardArguments backward_arguments(const Problem& problem, int64_t first_query) {
    BackwardArguments arguments;
    arguments.problem = &problem;
    arguments.dcontext = query_rows(dcontext_, case_.value_dim, first_query);
    arguments.dweights = pair_rows(dweights_, first_query);
    arguments.stats = query_rows(stats_, 2, first_query);
    if (keeps_scores()) {
      arguments.scores = query_rows(scores_, setting_.longest_key, first_query);
    }
    return arguments;
  }

  // Else backward computes them again.
  bool keeps_scores() const { return case_.heads % 2 == 1; }

  void set_key_side(BackwardArguments& arguments) {
    arguments.dkey = key_rows(dkey, case_.dim);
    arguments.dkey_sum = key_rows(dkey_sum_, case_.dim);
    arguments.dvalue = key_rows(dvalue, case_.value_dim);
    arguments.dvalue_sum = key_rows(dvalue_sum_, case_.value_dim);
    arguments.needs_weights = true;
  }

  Rows query_rows(Tensor& tensor, int64_t columns, int64_t first) {
    const int64_t row = case_.heads * columns;
    return tensor.rows(setting_.layout.query_rows * row, row, columns, 1, first * row);
  }

  Rows key_rows(Tensor& tensor, int64_t columns) {
    const int64_t row = case_.heads * columns;
    return tensor.rows(setting_.layout.key_rows * row, row, columns, 1);
  }

  // [B, longest query, H, longest key]
  Rows pair_rows(Tensor& tensor, int64_t first_query) {
    const int64_t row = case_.heads * setting_.longest_key;
    return tensor.rows(setting_.longest_query * row, row, setting_.longest_key, 1,
                       first_query * row);
  }

  Rows weight_rows(Tensor& tensor) { return tensor.rows(0, 0, case_.dim, 1); }

  const Case& case_;
  const Setting& setting_;
  const Storage& compute_;
  const bool is_short_;
  Tensor query_, key_, value_, score_weight_, dcontext_, dweights_;

 public:
  Tensor context, weights, dquery, dkey, dvalue, dscore_weight;

 private:
  Tensor stats_, scores_, dkey_sum_, dvalue_sum_;
};

// The error budget of tests/helpers.py: a multiple of the error that plain
// loops in the compute type make, the larger one of two orders of summation,
// and some of the results' scale. The multiple is one more for float64 there
// too.
template <class T>
bool within_budget(const char* name, const Storage& storage, const Tensor& actual,
                   const std::vector<long double>& exact, const std::vector<T>& eager,
                   const std::vector<T>& reversed) {
  const bool is_double = storage.dtype == DType::kFloat64;
  const bool is_half = storage.epsilon > 0x1p-23;
  long double scale = 0, eager_error = 0, error = 0;
  bool finite = true;
  for (size_t n = 0; n < exact.size(); ++n) {
    scale = std::max(scale, std::fabs(exact[n]));
    for (const long double value : {eager[n], reversed[n]}) {
      eager_error = std::max(eager_error, std::fabs(value - exact[n]));
    }
    error = std::max(error, std::fabs(actual.get(n) - exact[n]));
    finite &= std::isfinite(actual.get(n));
  }
  const int factor = (name[0] == 'd' ? 3 : 2) + is_double;
  // Rounding to 16 bits is half a unit of the last place.
  const long double relative = (is_double ? 1e-6L * 0x1p-29L : 1e-6L) +
                               (is_half ? static_cast<long double>(storage.epsilon) / 2 : 0);
  const long double smallest = is_half ? 0x1p-24L : 0;  // of float16's subnormal numbers
  const long double budget = factor * eager_error + relative * scale + smallest;
  if (finite && error <= budget) {
    return true;
  }
  std::printf("    %s: error %.3Le exceeds %.3Le (plain loops %.3Le, scale %.3Le)%s\n", name, error,
              budget, eager_error, scale, finite ? "" : ", not finite");
  return false;
}

template <class T>
bool check(const Case& c, const Storage& storage) {
  const Setting setting(c);
  const Inputs in = draw(c, setting, storage);
  Attention<T> attention(c, setting, storage, in);
  attention.run();
  const auto exact = formula<long double>(c, setting.spans, in, Slope::kExact, false);
  const auto eager = formula<T>(c, setting.spans, in, Slope::kOfTanh, false);
  const auto reversed = formula<T>(c, setting.spans, in, Slope::kOfTanh, true);
  bool passed = true;
#define COMPARE(name) \
  passed &= within_budget<T>(#name, storage, attention.name, exact.name, eager.name, reversed.name)
  COMPARE(context);
  COMPARE(weights);
  COMPARE(dquery);
  COMPARE(dkey);
  COMPARE(dvalue);
  COMPARE(dscore_weight);
#undef COMPARE
  return passed;
}

}  // namespace

int main() try {
  int passed = 0, failed = 0;
  for (const Case& c : kCases) {
    for (const Storage& storage : kStorages) {
      const bool is_right =
          storage.dtype == DType::kFloat64 ? check<double>(c, storage) : check<float>(c, storage);
      (is_right ? passed : failed) += 1;
      if (!is_right) {
        std::printf("FAILED %s, %s\n", c.name.c_str(), storage.name);
      }
    }
  }
  // As pytest has it, after the instruction set.
  std::printf("%s: ", cpu_isa().c_str());
  if (failed > 0) {
    std::printf("%d failed, ", failed);
  }
  std::printf("%d passed\n", passed);
  return failed > 0;
} catch (const std::exception& error) {  // of an instruction set that the machine lacks, say
  std::printf("%s\n", error.what());
  return 2;
}
