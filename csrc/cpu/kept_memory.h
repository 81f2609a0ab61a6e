// Memory of large gradients, kept for the next call once nobody holds the tensor any more.
//
// PyTorch's CPU allocator gives large tensors back to the operating system, and the next call pays
// for fresh pages: with one query over 100,000 keys they took as long as all of the arithmetic.
// Asking for huge pages is no way out: they are cheap where the kernel has free ones that the
// machine really holds, and take ten times as long where it, or the host of a virtual machine, has
// to find some first.
#pragma once

#include <cstddef>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attn_ext {

#if defined(MADV_FREE) && !defined(__SANITIZE_ADDRESS__)  // which would miss reads of kept memory
constexpr bool kKeepsMemory = true;
#else
constexpr bool kKeepsMemory = false;
#endif

constexpr size_t kSmallestKept = size_t{8} << 20;  // bytes; malloc keeps smaller ones itself

struct Memory {
  void* data;  // null: there is none
  size_t bytes;
};

// At least `bytes` of undefined content, kept or new; none if the system has none left.
Memory take_memory(size_t bytes);

// Keeps memory for a later call, which may be of another thread. Until then the kernel may use its
// pages for something else.
void keep_memory(Memory memory) noexcept;

// Gives all that is kept back to the operating system.
void release_kept_memory() noexcept;

}  // namespace attn_ext
