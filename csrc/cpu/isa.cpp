// Choice of the instruction set.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "call.h"

namespace attn_ext {

// Of kernels_impl.h.
namespace avx512 {
extern const Isa kIsa;
}
namespace avx2 {
extern const Isa kIsa;
}
namespace portable {
extern const Isa kIsa;
}

namespace {

constexpr const char* kVariable = "ATTN_EXT_CPU_ISA";

// What this machine can run, best first.
std::vector<const Isa*> available_isas() {
  std::vector<const Isa*> result;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    result.push_back(&avx512::kIsa);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    result.push_back(&avx2::kIsa);
  }
#endif
  result.push_back(&portable::kIsa);
  return result;
}

// The instruction set of that name, which `source` asks for.
const Isa* isa_named(const std::string& name, const std::string& source) {
  for (const Isa* isa : available_isas()) {
    if (isa->name == name) {
      return isa;
    }
  }
  throw std::runtime_error(source + name +
                           " names no instruction set of this machine; available: " + cpu_isas());
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& chosen_isa() {
  const Isa* isa = chosen.load(std::memory_order_acquire);
  if (isa == nullptr) {
    const char* wanted = std::getenv(kVariable);
    isa = wanted == nullptr || *wanted == '\0' ? available_isas().front()
                                               : isa_named(wanted, std::string(kVariable) + "=");
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

std::string cpu_isa() { return chosen_isa().name; }

std::string cpu_isas() {
  std::string names;
  for (const Isa* isa : available_isas()) {
    names += std::string(names.empty() ? "" : ", ") + isa->name;
  }
  return names;
}

void use_cpu_isa(const std::string& name) {
  chosen.store(isa_named(name, "attn_ext: "), std::memory_order_release);
}

bool divides_quickly() {
#if defined(__x86_64__)
  static const bool result = __builtin_cpu_is("amd") != 0;
  return result;
#else
  return false;
#endif
}

template <>
const Kernels<float>& kernels() {
  return chosen_isa().float_kernels;
}

template <>
const Kernels<double>& kernels() {
  return chosen_isa().double_kernels;
}

}  // namespace attn_ext
