// Additive attention and its gradients as plain loops in any type, and the cases that are checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

// How rows make up sequences. Padded tensors are [B, N, H, D], jagged ones [1, N, H, D].
enum class Kind { kPadded, kLengths, kMask, kJagged };

struct Case {
  std::string name;
  Kind kind;
  std::vector<int64_t> queries;  // a sequence; all equal unless jagged
  std::vector<int64_t> keys;     // that take part; for kMask every third key is left out besides
  int64_t heads;
  int64_t dim;
  int64_t value_dim;
  bool by_steps = false;         // one query after the other, as a decoder has them
  double magnitude = 1;          // of query and key, a power of 2
  double late_keys = magnitude;  // of the second half of the keys
};

// One sequence: its first rows, the number of its queries, and the positions of its keys.
struct Span {
  int64_t query_begin;
  int64_t query_count;
  int64_t key_begin;
  std::vector<int64_t> keys;
};

// Query and dcontext are [Nq, H, .], key and value [Nk, H, .], score_weight is [H, D] and dweights
// [B, longest_query, H, longest_key].
struct Inputs {
  std::vector<double> query, key, value, score_weight, dcontext, dweights;
};

template <class Real>
struct Results {
  std::vector<Real> context, weights, dquery, dkey, dvalue, dscore_weight;
};

// Slope of tanh at x: 1 - tanh^2, as hand-written code and PyTorch have it, or the yardstick's
// 1 / cosh^2, which does not cancel.
enum class Slope { kOfTanh, kExact };

inline int64_t longest(const std::vector<int64_t>& lengths) {
  return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
}

// Everything in Real, one sum after the other; `reverse` adds features, keys and queries from the
// last to the first.
template <class Real>
Results<Real> formula(const Case& c, const std::vector<Span>& spans, const Inputs& in, Slope slope,
                      bool reverse) {
  const int64_t heads = c.heads, dim = c.dim, value_dim = c.value_dim;
  Results<Real> out{
      std::vector<Real>(in.dcontext.size()), std::vector<Real>(in.dweights.size()),
      std::vector<Real>(in.query.size()),    std::vector<Real>(in.key.size()),
      std::vector<Real>(in.value.size()),    std::vector<Real>(in.score_weight.size())};
  const int64_t longest_query = longest(c.queries), longest_key = longest(c.keys);
  const auto turn = [&](int64_t n, int64_t count) { return reverse ? count - 1 - n : n; };
  for (size_t b = 0; b < spans.size(); ++b) {
    const Span& span = spans[b];
    const int64_t keys = static_cast<int64_t>(span.keys.size());
    for (int64_t n = 0; keys > 0 && n < span.query_count * heads; ++n) {
      const int64_t h = n % heads;
      const int64_t query = turn(n / heads, span.query_count);
      const int64_t i = span.query_begin + query;
      const double* q = &in.query[(i * heads + h) * dim];
      const double* w = &in.score_weight[h * dim];
      const double* dc = &in.dcontext[(i * heads + h) * value_dim];
      const int64_t pairs = ((b * longest_query + query) * heads + h) * longest_key;
      const auto position = [&](int64_t j) { return span.keys[turn(j, keys)]; };
      const auto key_row = [&](int64_t j) { return (span.key_begin + position(j)) * heads + h; };
      std::vector<Real> tanhs(keys * dim), alpha(keys), dalpha(keys);
      Real largest = -std::numeric_limits<Real>::infinity();
      for (int64_t j = 0; j < keys; ++j) {
        Real score = 0;
        for (int64_t m = 0; m < dim; ++m) {
          const int64_t d = turn(m, dim);
          const Real sum = Real(q[d]) + Real(in.key[key_row(j) * dim + d]);
          tanhs[j * dim + d] = std::tanh(sum);
          score += Real(w[d]) * tanhs[j * dim + d];
        }
        alpha[j] = score;
        largest = std::max(largest, score);
      }
      Real total = 0;
      for (Real& a : alpha) {
        a = std::exp(a - largest);
        total += a;
      }
      Real delta = 0;
      for (int64_t j = 0; j < keys; ++j) {
        alpha[j] /= total;
        out.weights[pairs + position(j)] = alpha[j];
        dalpha[j] = Real(in.dweights[pairs + position(j)]);
        for (int64_t d = 0; d < value_dim; ++d) {
          const int64_t at = key_row(j) * value_dim + d;
          out.context[(i * heads + h) * value_dim + d] += alpha[j] * Real(in.value[at]);
          out.dvalue[at] += alpha[j] * Real(dc[d]);
          dalpha[j] += Real(dc[d]) * Real(in.value[at]);
        }
        delta += alpha[j] * dalpha[j];
      }
      for (int64_t j = 0; j < keys; ++j) {
        const Real s = alpha[j] * (dalpha[j] - delta);
        for (int64_t d = 0; d < dim; ++d) {
          const Real tanh = tanhs[j * dim + d];
          Real derivative = Real(1) - tanh * tanh;
          if (slope == Slope::kExact) {
            const Real cosh = std::cosh(Real(q[d]) + Real(in.key[key_row(j) * dim + d]));
            derivative = Real(1) / (cosh * cosh);
          }
          const Real gradient = s * Real(w[d]) * derivative;
          out.dquery[(i * heads + h) * dim + d] += gradient;
          out.dkey[key_row(j) * dim + d] += gradient;
          out.dscore_weight[h * dim + d] += s * tanh;
        }
      }
    }
  }
  return out;
}
