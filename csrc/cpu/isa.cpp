#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace attn_ext {
namespace {

constexpr const char* kVariable = "ATTN_EXT_CPU_ISA";

struct Isa {
  std::string name;
  const Kernels<float>* float_kernels;
  const Kernels<double>* double_kernels;
};

// What this machine can run, best first.
std::vector<Isa> available_isas() {
  std::vector<Isa> result;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    result.push_back({"avx512", &avx512_kernels_float(), &avx512_kernels_double()});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    result.push_back({"avx2", &avx2_kernels_float(), &avx2_kernels_double()});
  }
#endif
  result.push_back({"portable", &portable_kernels_float(), &portable_kernels_double()});
  return result;
}

Isa choose_isa() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') {
    return available.front();
  }
  std::string names;
  for (const Isa& isa : available) {
    if (isa.name == wanted) {
      return isa;
    }
    names += (names.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error(std::string(kVariable) + "=" + wanted +
                           " names no instruction set of this machine; available: " + names);
}

// A choice that throws is made again at the next call.
const Isa& chosen_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace

const char* cpu_isa() { return chosen_isa().name.c_str(); }

template <>
const Kernels<float>& kernels() {
  return *chosen_isa().float_kernels;
}

template <>
const Kernels<double>& kernels() {
  return *chosen_isa().double_kernels;
}

}  // namespace attn_ext
