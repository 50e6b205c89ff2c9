// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Vectors of W floats for the codec, as wide as the including file may use. Everything is in an anonymous namespace:
// each file that includes this is compiled for other instructions and must keep its own version.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t b16 __attribute__((vector_size(16)));

// Packed: what stands in a page of bytes need not be aligned.
struct __attribute__((packed)) bf16 {
  static constexpr int16_t kInfinity = 0x7f80;
  uint16_t bits;
};
struct __attribute__((packed)) f16 {
  static constexpr int16_t kInfinity = 0x7c00;
  uint16_t bits;
};

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <class To, class From>
INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
INLINE V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class V>
INLINE void store_raw(void* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

INLINE vf splat(float x) { return x - vf{}; }

// The smaller (larger) one; the second if one is NaN.
INLINE vf least(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

INLINE vf most(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

INLINE float least_lane(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps(x);
#else
  float low = x[0];
  for (int i = 1; i < W; ++i) low = x[i] < low ? x[i] : low;
  return low;
#endif
}

INLINE float most_lane(vf x) { return -least_lane(-x); }

// Two-byte floats as whole numbers in the same order, and back.
template <class V>
INLINE V ordered(V x) {
  return x ^ ((x >> 15) & int16_t(0x7fff));
}

INLINE vs least(vs a, vs b) {
#if defined(__AVX512BW__)
  return bits_as<vs>(_mm512_min_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<vs>(_mm256_min_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  return a < b ? a : b;
#endif
}

INLINE vs most(vs a, vs b) {
#if defined(__AVX512BW__)
  return bits_as<vs>(_mm512_max_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<vs>(_mm256_max_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

INLINE int16_t least_lane(vs x) {
#if defined(__AVX2__)
  __m128i parts[sizeof(vs) / 16];
  std::memcpy(parts, &x, sizeof(x));
  __m128i low = parts[0];
  for (size_t i = 1; i < sizeof(vs) / 16; ++i) low = _mm_min_epi16(low, parts[i]);
  // The instruction compares numbers without a sign.
  const __m128i sign = _mm_set1_epi16(int16_t(0x8000));
  return int16_t(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(low, sign)), 0) ^ 0x8000);
#else
  int16_t low = x[0];
  for (int i = 1; i < 2 * W; ++i) low = x[i] < low ? x[i] : low;
  return low;
#endif
}

#if defined(__AVX2__)
// c + a * b and c - a * b, rounded once.
INLINE vf plus_product(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#else
  return _mm256_fmadd_ps(a, b, c);
#endif
}

INLINE vf less_product(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#else
  return _mm256_fnmadd_ps(a, b, c);
#endif
}
#endif

// float16 to float32 and back, the latter to the nearest, ties to even; without instructions for it.
[[maybe_unused]] INLINE float widen_one(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // As float32 the exponent is 112 too small; the product is exact, for subnormal numbers too.
  const float scaled = bits_as<float>(magnitude << 13) * bits_as<float>(uint32_t(239) << 23);
  return bits_as<float>(bits_as<uint32_t>(scaled) | sign);
}

[[maybe_unused]] INLINE uint16_t narrow_one(float x) {
  const uint32_t all = bits_as<uint32_t>(x), magnitude = all & 0x7fffffff;
  const uint16_t sign = uint16_t(all >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {
    // Below 2^-14 the step is 2^-24, that of float32 between 0.5 and 1: the sum is rounded where we need it.
    const float sum = bits_as<float>(magnitude) + 0.5f;
    return sign | uint16_t(bits_as<uint32_t>(sum) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | uint16_t((rounded >> 13) - (112 << 10));
}

// Conversions between widths. With the compiler's own, GCC 12 takes vectors apart.
INLINE vu wide(vh x) {
#if defined(__AVX512F__)
  return bits_as<vu>(_mm512_cvtepu16_epi32(bits_as<__m256i>(x)));
#elif defined(__AVX2__)
  return bits_as<vu>(_mm256_cvtepu16_epi32(bits_as<__m128i>(x)));
#else
  return __builtin_convertvector(x, vu);
#endif
}

INLINE vu wide(vb x) {
#if defined(__AVX512F__)
  return bits_as<vu>(_mm512_cvtepu8_epi32(bits_as<__m128i>(x)));
#elif defined(__AVX2__)
  return bits_as<vu>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(x))));
#else
  return __builtin_convertvector(x, vu);
#endif
}

INLINE vh to_16_bits(vu x) {  // of numbers below 2^16
#if defined(__AVX512F__)
  return bits_as<vh>(_mm512_cvtepi32_epi16(bits_as<__m512i>(x)));
#elif defined(__AVX2__)
  return bits_as<vh>(_mm_packus_epi32(_mm256_castsi256_si128(bits_as<__m256i>(x)),
                                      _mm256_extracti128_si256(bits_as<__m256i>(x), 1)));
#else
  return __builtin_convertvector(x, vh);
#endif
}

INLINE vb to_8_bits(vu x) {  // the lowest of each
#if defined(__AVX512F__)
  return bits_as<vb>(_mm512_cvtepi32_epi8(bits_as<__m512i>(x)));
#elif defined(__AVX2__)
  const __m128i words = bits_as<__m128i>(to_16_bits(x & 255));
  return bits_as<vb>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(x, vb);
#endif
}

INLINE vf widen(f16, vh x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bits_as<__m256i>(x));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(bits_as<__m128i>(x));
#else
  vf wide;
  for (int i = 0; i < W; ++i) wide[i] = widen_one(x[i]);
  return wide;
#endif
}

INLINE vf widen(bf16, vh x) { return bits_as<vf>(wide(x) << 16); }

INLINE vh narrow(f16, vf x) {
#if defined(__AVX512F__)
  return bits_as<vh>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return bits_as<vh>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  vh half;
  for (int i = 0; i < W; ++i) half[i] = narrow_one(x[i]);
  return half;
#endif
}

// To the nearest, ties to even. NaN is set apart: rounding could carry its bits into the sign. The instruction would
// make subnormal numbers 0, but sums and products of float16 parameters are never that small.
INLINE vh narrow(bf16, vf x) {
#if defined(__AVX512BF16__)
  return bits_as<vh>(_mm512_cvtneps_pbh(x));
#else
  const vu bits = bits_as<vu>(x);
  const vu nan = bits_as<vu>(x != x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return to_16_bits((rounded & ~nan) | (nan & 0x7fc0));
#endif
}

// W numbers of kind T as float32.
template <class T>
INLINE vf load(const T* from) {
  return widen(T{}, load_raw<vh>(from));
}
template <>
INLINE vf load<float>(const float* from) {
  return load_raw<vf>(from);
}

template <class T>
INLINE void store(T* to, vf x) {
  store_raw(to, narrow(T{}, x));
}
template <>
INLINE void store<float>(float* to, vf x) {
  store_raw(to, x);
}

// The first n < W of them; nothing behind them is touched, what is not there reads as 0.
template <class T>
INLINE vf load_part(const T* from, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return widen(T{}, bits_as<vh>(_mm256_maskz_loadu_epi16((1u << n) - 1, from)));
#else
  T part[W] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load(part);
#endif
}
template <>
INLINE vf load_part<float>(const float* from, int64_t n) {
  float part[W] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load(part);
}

template <class T>
INLINE void store_part(T* to, vf x, int64_t n) {
  T part[W];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

INLINE void store_bytes(uint8_t* to, vu x) { store_raw(to, to_8_bits(x)); }

INLINE void store_bytes_part(uint8_t* to, vu x, int64_t n) {
  uint8_t part[W];
  store_bytes(part, x);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

INLINE vu load_bytes(const uint8_t* from) { return wide(load_raw<vb>(from)); }

INLINE vu load_bytes_part(const uint8_t* from, int64_t n) {
  uint8_t part[W] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load_bytes(part);
}

// [16, 16] bytes transposed. Rows are read and written whole.
INLINE void transpose16(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row) {
  b16 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = load_raw<b16>(from + i * from_row);
  const b16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const b16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  // Interleaving rows i and i + 8, four times over, is a transposition.
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
  for (int i = 0; i < 16; ++i) store_raw(to + i * to_row, a[i]);
}

}  // namespace
