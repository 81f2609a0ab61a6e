// Memory of large gradients, kept for the next call once nobody holds the tensor any more.
//
// PyTorch's CPU allocator gives large tensors back to the operating system, and the next call pays
// for fresh pages: with one query over 100,000 keys they took as long as all of the arithmetic.
// Huge pages are no way out: they are cheap where the kernel has cleared memory at hand, and take
// ten times as long where it, or the host of a virtual machine, has to find some first.
#pragma once

#include <cstddef>

namespace attn_ext {

// In bytes. Smaller ones are what malloc keeps itself.
constexpr size_t kSmallestBlock = size_t{8} << 20;

struct Block {
  void* data;
  size_t bytes;
};

// At least `bytes` of undefined content: a kept block, or new memory. Throws std::bad_alloc.
Block take_block(size_t bytes);

// Takes a block back. Until it is taken again, the kernel may use its memory for something else.
void keep_block(Block block) noexcept;

// Gives all kept blocks back to the operating system.
void release_blocks() noexcept;

}  // namespace attn_ext
