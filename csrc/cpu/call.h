// Arguments of the operations and of the per-item kernels, the table of kernels of one instruction
// set, and the memory and threads that they run with.
#pragma once

#include <cstddef>
#include <string>

#include "plan.h"

namespace attn_ext {

// Row length of partial sums: any kernel's padded row fits.
constexpr int64_t padded_columns(int64_t columns) { return (columns + 63) / 64 * 64; }

// The score weights of a head, and what decides whether they may meet factored rows.
template <class T>
struct ScoreWeights {
  const T* data = nullptr;  // [padded_columns(dim)], padded by 0
  double sum = 0;           // of |w|
  double norm = 0;          // root of sum w^2
};

struct ForwardArguments {
  const Problem* problem = nullptr;
  Rows context;
  Rows stats;
  Rows weights;               // data is null unless asked for
  Rows scores;                // in T, for backward or until their row's softmax is known
  bool keeps_scores = false;  // for backward
};

struct BackwardArguments {
  const Problem* problem = nullptr;
  Rows dcontext;  // data is null where it counts as 0
  Rows dweights;
  Rows stats;
  Rows scores;  // in T, what forward kept; data is null where it kept none
  Rows dquery;  // data of a gradient is null unless asked for
  Rows dkey;
  Rows dvalue;
  Rows dgate;
  Rows dscore_weight;  // contiguous [heads, dim], in pooling [heads, branches, dim]
  Rows dkey_sum;       // in T: where rows gather until their last unit
  Rows dvalue_sum;
  Rows step_dscores;  // in T, [.., Nk, H] per step: outputs of a step's backward, inputs of a
                      // memory's
  Rows step_weights;
  bool from_steps = false;     // step_dscores and step_weights are inputs
  bool needs_scores = false;   // s, for dquery, dkey or dscore_weight
  bool needs_weights = false;  // alpha, for dvalue
  bool streams = false;        // the key side's gradients past the caches, which they exceed
};

void run_forward(const ForwardArguments& arguments);
void run_backward(const BackwardArguments& arguments);

// exp(2 key) and the largest magnitude of each row, contiguous and in the compute type; `sizes` are
// those of key, [Bk, Nk, H, D].
void run_prepare(const Rows& key, const std::vector<int64_t>& sizes, void* exp_key,
                 void* key_bound);

template <class T>
struct ForwardCall : ForwardArguments {
  const ScoreWeights<T>* score_weights = nullptr;  // [heads]
  T* partial_sums = nullptr;                       // [partial_rows, padded_columns(value_dim)]
  T* partial_stats = nullptr;                      // [partial_rows, 2]
};

// A row's delta = sum alpha dalpha / sum alpha. The division by what is 1 up to rounding makes sum
// s = 0 hold as well as s allows, which gradients that nearly cancel need.
template <class T>
struct Delta {
  T weighted;
  T total;
};

template <class T>
struct BackwardCall : BackwardArguments {
  const Wave* wave = nullptr;
  const ScoreWeights<T>* score_weights = nullptr;  // [heads]
  T* alpha = nullptr;                              // the wave's scores, [query, key] of each unit
  T* dscores = nullptr;
  Delta<T>* deltas = nullptr;
  T* partial_dquery = nullptr;  // [partial_rows, padded_columns(dim)]
  // In rows of [problem.weight_rows, dim], [wave.weight_rows, ..]; null unless asked for.
  double* partial_dweight = nullptr;
};

template <class T>
struct Kernels {
  // One head of score_weight, and its row of padded_columns(dim); a contiguous [heads, dim] back.
  ScoreWeights<T> (*read_weights)(const Rows& score_weight, int64_t head, int64_t dim, T* row);
  void (*write_weights)(const double* source, int64_t count, const Rows& target);
  void (*forward_item)(const ForwardCall<T>&, const ForwardItem&);
  void (*forward_merge)(const ForwardCall<T>&, const ForwardMerge&);
  void (*score_item)(const BackwardCall<T>&, const UnitBlock&);
  void (*finish_scores)(const BackwardCall<T>&, const UnitBlock&);
  void (*value_item)(const BackwardCall<T>&, const UnitBlock&);
  void (*gradient_item)(const BackwardCall<T>&, const GradientItem&);
  void (*query_merge)(const BackwardCall<T>&, const QueryMerge&);
  // Row `row` (of all batches, heads) of exp_key and key_bound.
  void (*prepare_rows)(const Rows& key, int64_t batch, int64_t row, int64_t heads, int64_t dim,
                       T* exp_key, T* key_bound);
};

// The kernels of one instruction set, by compute type.
struct Isa {
  const char* name;
  Kernels<float> float_kernels;
  Kernels<double> double_kernels;
};

// The kernels for this machine, or those that ATTN_EXT_CPU_ISA names.
template <class T>
const Kernels<T>& kernels();

// Name of the kernels in use: "avx512", "avx2" or "portable".
std::string cpu_isa();

// Names of those that this machine can run, best first, with ", " between.
std::string cpu_isas();

// Has later calls use these kernels; none may be under way. For tests: users set ATTN_EXT_CPU_ISA.
void use_cpu_isa(const std::string& name);

// Whether this machine divides a vector of AVX-512 faster than it refines an estimate of its
// reciprocal: AMD's does, in the time of two multiplications (Zen 4), Intel's takes that of ten.
bool divides_quickly();

// Memory that lasts as long as the object, from what its thread keeps for the next one. Those of a
// thread end in the reverse order of their beginning. What take() returns is undefined, and aligned
// to a cache line.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);

  const size_t block_;  // where the thread's memory was free from
  const size_t used_;
};

}  // namespace attn_ext
