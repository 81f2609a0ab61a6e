// Rows of tensors: where they stand, and reading them in any dtype into the compute type and
// writing them back, a vector at a time.
#pragma once

#include "call.h"
#include "vec.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// As many 16-bit numbers, and their 32-bit images, as a vector has floats.
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

ATTN_EXT_INLINE WordBits words_of(Vec<float> value) {
  WordBits result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

ATTN_EXT_INLINE Vec<float> floats_of(WordBits value) {
  Vec<float> result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

struct BFloat16Codec {
  static ATTN_EXT_INLINE Vec<float> decode(HalfBits bits) {
    return floats_of(__builtin_convertvector(bits, WordBits) << 16);
  }

  // Rounds to nearest even.
  static ATTN_EXT_INLINE HalfBits encode(Vec<float> value) {
    const WordBits word = words_of(value);
    const WordBits rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    const WordBits quiet = (word >> 16) | 0x40u;
    return __builtin_convertvector(value == value ? rounded : quiet, HalfBits);
  }
};

struct Float16Codec {
  static ATTN_EXT_INLINE Vec<float> decode(HalfBits bits) {
#if ATTN_EXT_ISA_AVX512
    return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#else
    const WordBits word = __builtin_convertvector(bits, WordBits);
    const WordBits payload = (word & 0x7FFFu) << 13;
    // The exponent bias grows from 15 to 127, subnormals included, by one exact multiplication.
    const WordBits finite = words_of(floats_of(payload) * 0x1p112f);
    const WordBits special = payload | 0x7F800000u;  // infinity and NaN keep their exponent
    const WordBits is_special = (WordBits)(payload >= 0x0F800000u);
    return floats_of(((word & 0x8000u) << 16) | (is_special ? special : finite));
#endif
  }

  // Rounds to nearest even: adding a power of two so chosen that the sum's last bit is the result's
  // does it.
  static ATTN_EXT_INLINE HalfBits encode(Vec<float> value) {
    const WordBits word = words_of(value);
    const WordBits payload = word & 0x7FFFFFFFu;
    const WordBits exponent = payload & 0x7F800000u;
    const WordBits smallest = WordBits{} + 0x38800000u;  // 2^-14, float16's smallest normal
    const WordBits magic = (exponent < smallest ? smallest : exponent) + (13u << 23);
    const Vec<float> sum = floats_of(payload) + floats_of(magic);
    const WordBits units = words_of(sum) - magic;  // multiples of the result's last place
    const WordBits normal = ((exponent - smallest) >> 13) + units;
    const WordBits finite = exponent < smallest ? units : normal;
    const WordBits infinite = WordBits{} + 0x7C00u;
    const WordBits bounded = payload >= 0x477FF000u ? infinite : finite;  // 65520 rounds up
    const WordBits coded = payload > 0x7F800000u ? (WordBits{} + 0x7E00u) : bounded;
    return __builtin_convertvector(coded | ((word >> 16) & 0x8000u), HalfBits);
  }
};

template <class From, class To>
void copy_row(const From* source, int64_t source_stride, int64_t count, To* target,
              int64_t target_stride) {
  if (source_stride == 1 && target_stride == 1) {
    for (int64_t n = 0; n < count; ++n) {
      target[n] = static_cast<To>(source[n]);
    }
  } else {
    for (int64_t n = 0; n < count; ++n) {
      target[n * target_stride] = static_cast<To>(source[n * source_stride]);
    }
  }
}

template <class Codec, class T>
void decode_row(const uint16_t* source, int64_t stride, int64_t count, T* target) {
  constexpr int lanes = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += lanes) {
    const int64_t valid = smaller(lanes, count - begin);
    HalfBits bits{};
    if (stride == 1 && valid == lanes) {
      __builtin_memcpy(&bits, source + begin, sizeof(bits));
    } else {
      for (int64_t lane = 0; lane < valid; ++lane) {
        bits[lane] = source[(begin + lane) * stride];
      }
    }
    const Vec<float> values = Codec::decode(bits);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (valid == lanes) {
        store<float>(target + begin, values);
        continue;
      }
    }
    for (int64_t lane = 0; lane < valid; ++lane) {
      target[begin + lane] = static_cast<T>(values[lane]);
    }
  }
}

template <class Codec, class T>
void encode_row(const T* source, int64_t count, uint16_t* target, int64_t stride) {
  constexpr int lanes = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += lanes) {
    const int64_t valid = smaller(lanes, count - begin);
    const HalfBits bits = Codec::encode(load_some<float>(source + begin, valid));
    if (stride == 1 && valid == lanes) {
      __builtin_memcpy(target + begin, &bits, sizeof(bits));
    } else {
      for (int64_t lane = 0; lane < valid; ++lane) {
        target[(begin + lane) * stride] = bits[lane];
      }
    }
  }
}

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// target[n] = element `offset + n * stride` of `data`.
template <class T>
void read_row(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t count,
              T* target) {
  switch (dtype) {
    case DType::kFloat32:
      return copy_row(static_cast<const float*>(data) + offset, stride, count, target, 1);
    case DType::kFloat64:
      return copy_row(static_cast<const double*>(data) + offset, stride, count, target, 1);
    case DType::kFloat16:
      return decode_row<Float16Codec>(static_cast<const uint16_t*>(data) + offset, stride, count,
                                      target);
    case DType::kBFloat16:
      return decode_row<BFloat16Codec>(static_cast<const uint16_t*>(data) + offset, stride, count,
                                       target);
  }
}

// Element `offset + n * stride` of `data` = source[n].
template <class T>
void write_row(void* data, DType dtype, int64_t offset, int64_t stride, int64_t count,
               const T* source) {
  switch (dtype) {
    case DType::kFloat32:
      return copy_row(source, 1, count, static_cast<float*>(data) + offset, stride);
    case DType::kFloat64:
      return copy_row(source, 1, count, static_cast<double*>(data) + offset, stride);
    case DType::kFloat16:
      return encode_row<Float16Codec>(source, count, static_cast<uint16_t*>(data) + offset, stride);
    case DType::kBFloat16:
      return encode_row<BFloat16Codec>(source, count, static_cast<uint16_t*>(data) + offset,
                                       stride);
  }
}

// A store past the caches: it neither reads the line first nor displaces others. Only aligned.
template <class T>
ATTN_EXT_INLINE void stream(T* target, Vec<T> value) {
#if ATTN_EXT_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)value);
#elif ATTN_EXT_VECTOR_BYTES == 32 && defined(__x86_64__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target), (__m256i)value);
#else
  store<T>(target, value);
#endif
}

// Orders the streamed stores of this thread before what it does next.
ATTN_EXT_INLINE void finish_streams() {
#if ATTN_EXT_VECTOR_BYTES > 16 && defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
constexpr DType kDTypeOf = sizeof(T) == sizeof(float) ? DType::kFloat32 : DType::kFloat64;

// Rows j = 0, 1, ... of one head of one sequence, in a tensor.
struct RowSource {
  void* data;
  DType dtype;
  int64_t base;
  int64_t row;
  int64_t col;
  int64_t first;         // position of row 0
  const int64_t* index;  // or the position of every row

  ATTN_EXT_INLINE int64_t position(int64_t j) const { return index ? index[j] : first + j; }
  ATTN_EXT_INLINE int64_t offset(int64_t j) const { return base + position(j) * row; }

  // Column c of row j where columns adjoin and are of the compute type.
  template <class T>
  ATTN_EXT_INLINE T* at(int64_t j, int64_t c = 0) const {
    return static_cast<T*>(data) + offset(j) + c;
  }

  // Whether rows can be read where they are, of the compute type.
  template <class T>
  ATTN_EXT_INLINE bool has_vectors() const {
    return dtype == kDTypeOf<T> && col == 1;
  }
};

inline RowSource query_rows(const Rows& view, const Sequence& sequence, int64_t head) {
  const int64_t base = sequence.query_batch * view.batch + sequence.query_begin * view.row;
  return {view.data, view.dtype, base + head * view.head, view.row, view.col, 0, nullptr};
}

inline RowSource key_rows(const Rows& view, const Sequence& sequence, int64_t head) {
  const int64_t base = sequence.key_batch * view.batch + sequence.key_begin * view.row;
  return {view.data, view.dtype,         base + head * view.head, view.row,
          view.col,  sequence.first_key, sequence.key_index};
}

// One query's numbers for keys, of a view of (batch, query, head, key); key j's is row j.
inline RowSource pair_row(const Rows& view, PairLayout layout, const Sequence& sequence,
                          int64_t head, int64_t query) {
  const int64_t base = layout == PairLayout::kByKey
                           ? sequence.key_batch * view.batch + sequence.key_begin * view.col
                       : layout == PairLayout::kByQuery
                           ? sequence.query_batch * view.batch + sequence.query_begin * view.row
                           : sequence.number * view.batch;
  return {view.data,         view.dtype, base + query * view.row + head * view.head,
          view.col,          1,          sequence.first_key,
          sequence.key_index};
}

// Columns [begin, begin + count) of row j: in place if they lie there in the compute type, else in
// `copy`.
template <class T>
ATTN_EXT_INLINE const T* row_values(const RowSource& source, int64_t j, int64_t begin,
                                    int64_t count, T* copy) {
  if (source.has_vectors<T>()) {
    return source.at<T>(j, begin);
  }
  read_row<T>(source.data, source.dtype, source.offset(j) + begin * source.col, source.col, count,
              copy);
  return copy;
}

// Columns [begin, begin + count) of row j = values, unless those are what stands there; past the
// caches, if it `streams` and they are whole lines of the compute type.
template <class T>
void write_columns(const RowSource& target, int64_t j, int64_t begin, int64_t count,
                   const T* values, bool streams = false) {
  constexpr int64_t line = 64;
  T* const row = target.has_vectors<T>() ? target.at<T>(j, begin) : nullptr;
  if (row == values) {
    return;
  }
  if (streams && row != nullptr && reinterpret_cast<uintptr_t>(row) % line == 0 &&
      count * static_cast<int64_t>(sizeof(T)) % line == 0) {
    for (int64_t n = 0; n < count; n += kLanes<T>) {
      stream<T>(row + n, load<T>(values + n));
    }
    return;
  }
  write_row<T>(target.data, target.dtype, target.offset(j) + begin * target.col, target.col, count,
               values);
}

// Rows [first, first + count) of one column, as of pair_row().
template <class T>
void read_along_keys(const RowSource& source, int64_t first, int64_t count, T* values) {
  const int64_t run = source.index == nullptr ? count : 1;
  for (int64_t j = 0; j < count; j += run) {
    read_row<T>(source.data, source.dtype, source.offset(first + j), source.row, run, values + j);
  }
}

template <class T>
void write_along_keys(const RowSource& target, int64_t first, int64_t count, const T* values) {
  const int64_t run = target.index == nullptr ? count : 1;
  for (int64_t j = 0; j < count; j += run) {
    write_row<T>(target.data, target.dtype, target.offset(first + j), target.row, run, values + j);
  }
}

// row[begin .. end) = value.
template <class T>
ATTN_EXT_INLINE void pad_row(T* row, int64_t begin, int64_t end, T value) {
  for (int64_t n = begin; n < end; ++n) {
    row[n] = value;
  }
}

template <class T>
ATTN_EXT_INLINE void scale_row(T* row, int64_t count, T scale) {
  for (int64_t n = 0; n < count; n += kLanes<T>) {
    store<T>(row + n, load<T>(row + n) * scale);
  }
}

// Counters c[0 .. 3][n] of Philox, whose rounds are vectors of operations, become its words.
constexpr int kPhiloxGroup = 16;
inline void make_philox_words(uint32_t (&c)[4][kPhiloxGroup], PhiloxKey key) {
  for (int round = 0; round < 10; ++round, key = next_key(key)) {
    for (int n = 0; n < kPhiloxGroup; ++n) {
      philox_round(c[0][n], c[1][n], c[2][n], c[3][n], key);
    }
  }
}

// Dropout keeps what it has a word for whose first 24 bits are at least `least_bits`.
ATTN_EXT_INLINE uint32_t least_bits(const Dropout& dropout) {
  return static_cast<uint32_t>(__builtin_ceil(dropout.threshold));
}
ATTN_EXT_INLINE bool keeps_word(uint32_t word, uint32_t least_bits) {
  return (word >> 8) >= least_bits;
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
