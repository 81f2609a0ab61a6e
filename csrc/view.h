// What host and device are told of a call: plain views of tensors. Strides count elements.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace attn_ext {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// Bits of an operation's grad_mask.
enum GradMask : int64_t {
  kGradQuery = 1,
  kGradKey = 2,
  kGradValue = 4,
  kGradScoreWeight = 8,
  kGradGate = 16
};

// How returned weights lie, dense [B, H, max_seqlen_q, max_seqlen_k] or by key [Nk, H], and whether
// they are scores instead, as they are before the softmax: then the gradient of weights is theirs,
// and context, value and what forward leaves for backward mean nothing.
enum WeightsLayout : int64_t { kNoWeights = 0, kDenseWeights = 1, kWeightsByKey = 2, kRaw = 4 };

// A strided view of element (batch, row, head, col).
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
  int64_t col = 0;
  bool vectors = false;  // whether 16-byte loads of every 8th element on are aligned
};

// A vector of int32 or int64; data is null where the argument was not given.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t size = 0;
  int64_t stride = 1;

  ATTN_EXT_HOST_DEVICE int64_t at(int64_t n) const {
    return wide ? static_cast<const int64_t*>(data)[n * stride]
                : static_cast<const int32_t*>(data)[n * stride];
  }
};

// A key_padding_mask [B, Nk], true = ignore.
struct Mask {
  const bool* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
};

struct Dropout {
  bool active = false;
  const int64_t* seed = nullptr;
  double threshold = 0;   // p * 2^24
  double keep_scale = 1;  // 1 / (1 - p)

  ATTN_EXT_HOST_DEVICE bool keeps(int64_t key, int64_t query, int64_t head,
                                  int64_t sequence) const {
    return dropout_keeps(key, query, head, sequence, philox_key(), threshold);
  }

  ATTN_EXT_HOST_DEVICE PhiloxKey philox_key() const {
    const uint64_t bits = static_cast<uint64_t>(*seed);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  }
};

// The tensors of a call, and what is asked of them.
struct Operands {
  int64_t heads = 0;
  int64_t dim = 0;
  int64_t value_dim = 0;
  Rows query;
  Rows key;
  Rows value;
  Rows score_weight;           // head, col
  bool keys_alone = false;     // pooling: rows of score weights are the queries
  Rows gate;                   // then; data is null without one
  Dropout feature_dropout[2];  // of its tanh and of its sigmoid
  Dropout dropout;
  bool raw_scores = false;  // weights are the scores, and their gradient the scores'
  bool is_short = false;    // query, key, value and score weights are of 16 bits
};

}  // namespace attn_ext
