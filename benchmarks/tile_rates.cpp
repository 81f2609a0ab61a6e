// What the register tiles of csrc/cpu reach alone: see bench_tiles.py, which
// compiles this.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include "cpu/gradient_tiles.h"

using namespace attn_ext;
using namespace attn_ext::ATTN_EXT_ISA;

namespace {

constexpr int kRounds = 200;
constexpr int kCalls = 20;  // a round: one is as short as the clock's resolution
constexpr int64_t kFeatures = 512;
constexpr int64_t kSteps = kFeatures / kStep<float>;

// Seconds a call of the fastest of many rounds: what other processes disturb is
// not the tile's.
template <class Function>
double fastest(const Function& function) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int call = 0; call < kCalls; ++call) {
      function();
      asm volatile("" ::: "memory");
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count() / kCalls);
  }
  return best;
}

// Numbers of which no operation gets slow.
struct Numbers {
  std::vector<float> memory;
  float* data;

  explicit Numbers(int64_t count) : memory(count + 16) {
    for (size_t n = 0; n < memory.size(); ++n) {
      memory[n] = 0.5f + 0.001f * static_cast<float>(n * 7919 % 1000);
    }
    data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4;
  }
};

void report(const char* name, double operations, double seconds) {
  std::printf("%s %.3f\n", name, operations / seconds * 1e-9);
}

// Fused multiply-adds that do not wait for each other: the processor's peak.
void multiply_add() {
  constexpr int kChains = 12;
  constexpr int kTurns = 1000;
  report("peak", double{kChains} * kTurns * kLanes<float>, fastest([] {
           const Vec<float> y = splat<float>(0.999f);
           Vec<float> x[kChains];
           Vec<float> sum{};
#pragma GCC unroll 12
           for (int n = 0; n < kChains; ++n) {
             x[n] = splat<float>(static_cast<float>(n));
           }
           for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 12
             for (int n = 0; n < kChains; ++n) {
               x[n] = x[n] * y + y;
             }
           }
#pragma GCC unroll 12
           for (int n = 0; n < kChains; ++n) {
             sum += x[n];
           }
           asm volatile("" : : "x"(sum));
         }));
}

// `rows` queries against as many keys, as an item of forward scores them.
template <template <class> class Rule>
void scores(const char* name, int64_t rows) {
  const int64_t width = 2 * kStep<float>;
  const int64_t query_step = step_stride<float>(rows, width);
  const int64_t key_step = step_stride<float>(kTileCols);
  const Numbers queries(kSteps * query_step);
  const Numbers keys(rows / kTileCols * kSteps * key_step);
  const Numbers weights(kFeatures);
  Numbers out(rows * rows);
  report(name, static_cast<double>(rows * rows * kFeatures), fastest([&] {
           for (int64_t j = 0; j < rows; j += kTileCols) {
             const Panel<float> block{keys.data + j / kTileCols * kSteps * key_step, kStep<float>,
                                      key_step};
             for (int64_t i = 0; i < rows; i += kTileRows) {
               const Panel<float> some{queries.data + i * width, width, query_step};
               inner_products<float, Rule>(some, kTileRows, block, kTileCols, kSteps, weights.data,
                                           out.data + i * rows + j, rows);
             }
           }
         }));
}

// `queries` against `keys` over some of the features, as an item of backward
// has them.
void gradient(const char* name, int64_t queries, int64_t keys, int64_t steps) {
  const int64_t query_step = step_stride<float>(queries);
  const int64_t key_step = step_stride<float>(keys);
  const int64_t row = step_stride<float>(steps);
  const Numbers a(steps * query_step);
  const Numbers b(steps * key_step);
  const Numbers s(queries * keys);
  Numbers dq(queries * row);
  Numbers dk(keys * row);
  Numbers dw(steps * kStep<float>);
  const GradientOperands<float> operands{{a.data, kStep<float>, query_step},
                                         {b.data, kStep<float>, key_step},
                                         s.data,
                                         keys,
                                         queries,
                                         keys,
                                         steps,
                                         dq.data,
                                         dk.data,
                                         dw.data,
                                         row};
  report(name, static_cast<double>(queries * keys * steps * kStep<float>),
         fastest([&] { gradient_products<float, FactoredSlope>(true, true, operands); }));
}

}  // namespace

int main() {
  multiply_add();
  // As divides_quickly() in csrc/cpu/isa.cpp chooses.
  const auto score = __builtin_cpu_is("amd") ? scores<DividedScore> : scores<FactoredScore>;
  score("score-alone", kTileRows);
  score("score", 32);
  gradient("gradient-alone", 32, kGradientKeys, 2);
  gradient("gradient", 32, 32, kSteps);
}
