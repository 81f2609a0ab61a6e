// Choice of the instruction set.
#pragma once

#include <string>

#include "call.h"

namespace attn_ext {

// Name of the kernels in use: "avx512", "avx2" or "portable".
const char* cpu_isa();

// Names of those that this machine can run, best first, with ", " between.
std::string cpu_isas();

// Has later calls use these kernels; none may be under way. For tests: users set ATTN_EXT_CPU_ISA.
void use_cpu_isa(const std::string& name);

// Whether this machine divides a vector of AVX-512 faster than it refines an estimate of its
// reciprocal: AMD's does, in the time of two multiplications (Zen 4), Intel's takes that of ten.
bool divides_quickly();

// Of kernels_impl.h.
namespace avx512 {
template <class T>
const Kernels<T>& kernel_table();
}
namespace avx2 {
template <class T>
const Kernels<T>& kernel_table();
}
namespace portable {
template <class T>
const Kernels<T>& kernel_table();
}

}  // namespace attn_ext
