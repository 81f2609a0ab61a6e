// What csrc/cuda uses of CUDA, on the host: a test compiles the very same sources against this
// header. The threads of a block are fibers that run one after the other up to the next barrier or
// warp operation. Shared memory that the block has not written is NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define EMULATED_CUDA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static

using std::isfinite;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = struct emulated_stream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace emulation {

// The place of the thread that runs.
extern uint3 thread;
extern uint3 block;
extern uint3 grid;

struct Body {
  void (*call)(void* kernel, void* parameters);
  void* kernel;
  void* parameters;
};
void run(const Body& body, dim3 grid, dim3 threads);
void barrier();
// The bits of every lane of the warp.
void exchange(uint32_t bits, uint32_t (&lanes)[32]);
unsigned lane();
// Whether the environment asks for launches that fail.
bool fails();
// What cudaGetLastError has to tell.
extern cudaError_t last_error;

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define gridDim emulation::grid

inline void __syncthreads() { emulation::barrier(); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// What ex2.approx.ftz and rcp.approx.ftz may return: at most 2 and 1 units in the last place off.
// How many is drawn from the bits. Subnormal results are flushed to 0.
inline float emulated_approximation(float exact, uint32_t units) {
  if (std::fabs(exact) < 0x1p-126f) {
    return std::copysign(0.0f, exact);
  }
  if (!isfinite(exact) || std::fabs(exact) < 0x1p-125f) {
    return exact;
  }
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof(bits));
  const uint32_t draw = (bits * 0x9E3779B1u) >> 16;
  return __uint_as_float(bits + draw % (2 * units + 1) - units);
}

inline float emulated_exp2(float x) { return emulated_approximation(std::exp2(x), 2); }
inline float emulated_reciprocal(float x) { return emulated_approximation(1 / x, 1); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  uint32_t lanes[32];
  emulation::exchange(bits, lanes);
  return __uint_as_float(lanes[emulation::lane() ^ static_cast<unsigned>(mask)]);
}

inline bool __any_sync(unsigned, bool value) {
  uint32_t lanes[32];
  emulation::exchange(value, lanes);
  for (uint32_t other : lanes) {
    if (other) {
      return true;
    }
  }
  return false;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (unsigned n = 0; n < 4; ++n) {
    result |= (bytes >> (selector >> (4 * n) & 7) * 8 & 255) << (8 * n);
  }
  return result;
}

// mma.m16n8k16 of bfloat16: products are aligned to the largest term and cut off 24 bits below its
// first, as is the sum. (Tensor cores are seen to keep at least as many.)
inline void emulated_multiply(const unsigned (&a)[4], const unsigned (&b)[2], float (&sums)[4]) {
  uint32_t left[4][32];
  uint32_t right[2][32];
  for (int n = 0; n < 4; ++n) {
    emulation::exchange(a[n], left[n]);
  }
  for (int n = 0; n < 2; ++n) {
    emulation::exchange(b[n], right[n]);
  }
  const auto half = [](uint32_t word, unsigned k) {
    return static_cast<double>(__uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u));
  };
  for (unsigned n = 0; n < 4; ++n) {
    const unsigned row = emulation::lane() / 4;
    const unsigned column = emulation::lane() % 4 * 2 + n % 2;
    double terms[17] = {sums[n]};
    double largest = std::fabs(terms[0]);
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned lane = k % 8 / 2;
      terms[k + 1] = half(left[n / 2 + k / 8 * 2][row * 4 + lane], k) *
                     half(right[k / 8][column * 4 + lane], k);
      largest = std::fmax(largest, std::fabs(terms[k + 1]));
    }
    double sum = 0;
    const double unit = largest > 0 ? std::ldexp(1, std::ilogb(largest) - 23) : 1;
    for (double term : terms) {
      sum += isfinite(term) && isfinite(unit) ? std::trunc(term / unit) * unit : term;
    }
    sums[n] = static_cast<float>(sum);
    if (isfinite(sum) && std::fabs(sums[n]) > std::fabs(sum)) {
      sums[n] = std::nextafter(sums[n], 0.0f);
    }
  }
}

template <class T>
T __ldg(const T* source) {
  return *source;
}

template <class T>
void __stwb(T* target, T value) {
  *target = value;
}

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 threads, void** parameters, size_t,
                             cudaStream_t) {
  if (emulation::fails() || grid.y > 65535 || grid.z > 65535 || threads.x > 1024) {
    return emulation::last_error = cudaErrorInvalidConfiguration;
  }
  const auto call = [](void* function, void* parameter) {
    reinterpret_cast<void (*)(P)>(function)(*static_cast<P*>(parameter));
  };
  emulation::run({call, reinterpret_cast<void*>(kernel), parameters[0]}, grid, threads);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
