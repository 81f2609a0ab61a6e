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

#if defined(__x86_64__)
const Kernels<float>& avx512_kernels_float();
const Kernels<double>& avx512_kernels_double();
const Kernels<float>& avx2_kernels_float();
const Kernels<double>& avx2_kernels_double();
#endif
const Kernels<float>& portable_kernels_float();
const Kernels<double>& portable_kernels_double();

}  // namespace attn_ext
