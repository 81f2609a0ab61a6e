// Reading rows of any dtype into the compute type and writing them back, a vector at a time.
#pragma once

#include "problem.h"
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

// The first `count` numbers as floats, then zeros.
ATTN_EXT_INLINE Vec<float> load_floats(const float* source, int64_t count) {
  return count == kLanes<float> ? load<float>(source) : load_partial<float>(source, count);
}

ATTN_EXT_INLINE Vec<float> load_floats(const double* source, int64_t count) {
  float lanes[kLanes<float>] = {};
  copy_row(source, 1, count, lanes, 1);
  return load<float>(lanes);
}

template <class Codec, class T>
void encode_row(const T* source, int64_t count, uint16_t* target, int64_t stride) {
  constexpr int lanes = kLanes<float>;
  for (int64_t begin = 0; begin < count; begin += lanes) {
    const int64_t valid = smaller(lanes, count - begin);
    const HalfBits bits = Codec::encode(load_floats(source + begin, valid));
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

// write_row() of consecutive numbers, streamed where they are whole lines of the compute type.
template <class T>
void stream_row(void* data, DType dtype, int64_t offset, int64_t count, const T* source) {
  T* target = static_cast<T*>(data) + offset;
  constexpr int64_t line = 64;
  if (dtype != kDTypeOf<T> || reinterpret_cast<uintptr_t>(target) % line != 0 ||
      count * static_cast<int64_t>(sizeof(T)) % line != 0) {
    write_row<T>(data, dtype, offset, 1, count, source);
    return;
  }
  for (int64_t n = 0; n < count; n += kLanes<T>) {
    stream<T>(target + n, load<T>(source + n));
  }
}

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
