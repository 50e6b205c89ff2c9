// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// 32 neighbouring numbers as two vectors of floats, for the codec's AVX-512 versions. In an anonymous namespace, as
// cold_vec.h is. Which number is in which vector depends on their kind: bfloat16 is widened fastest as the numbers at
// even and those at odd places, the others as the first and the last 16.

#pragma once

#include "cold_vec.h"

namespace {

struct Two {
  vf a, b;
};

INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

INLINE __m256i half_of(__m512i x, int half) {
  return half ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x);
}

INLINE Two widen(bf16, __m512i x) {
  return {bits_as<vf>(_mm512_slli_epi32(x, 16)), bits_as<vf>(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))))};
}
INLINE Two widen(f16, __m512i x) { return {_mm512_cvtph_ps(half_of(x, 0)), _mm512_cvtph_ps(half_of(x, 1))}; }

// The lowest 16 bits of two vectors of numbers below 2^16, in the order of the numbers.
INLINE __m512i joined(bf16, __m512i a, __m512i b) { return _mm512_or_si512(a, _mm512_slli_epi32(b, 16)); }
INLINE __m512i halves_joined(__m512i a, __m512i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
}
INLINE __m512i joined(f16, __m512i a, __m512i b) { return halves_joined(a, b); }
INLINE __m512i joined(float, __m512i a, __m512i b) { return halves_joined(a, b); }

template <class T>
INLINE Two load_two(const T* from) {
  return widen(T{}, _mm512_loadu_si512(from));
}
template <>
INLINE Two load_two<float>(const float* from) {
  return {load(from), load(from + W)};
}

// The numbers of `there`; nothing else is touched, what is not there reads as 0.
template <class T>
INLINE Two load_two(const T* from, __mmask32 there) {
  return widen(T{}, _mm512_maskz_loadu_epi16(there, from));
}
template <>
INLINE Two load_two<float>(const float* from, __mmask32 there) {
  return {_mm512_maskz_loadu_ps(__mmask16(there), from), _mm512_maskz_loadu_ps(__mmask16(there >> 16), from + W)};
}

// As float16, in the order of the numbers.
template <class T>
INLINE __m512i narrow_two(Two x) {
  return joined(T{}, bits_as<__m512i>(wide(narrow(f16{}, x.a))), bits_as<__m512i>(wide(narrow(f16{}, x.b))));
}

// Floats, the first and the last 16 of 32, to n numbers of kind T.
INLINE __m512i halves_as(bf16, vf first, vf last) {
#if defined(__AVX512BF16__)
  return bits_as<__m512i>(_mm512_cvtne2ps_pbh(last, first));
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(bits_as<__m256i>(narrow(bf16{}, first))),
                            bits_as<__m256i>(narrow(bf16{}, last)), 1);
#endif
}
INLINE __m512i halves_as(f16, vf first, vf last) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(bits_as<__m256i>(narrow(f16{}, first))),
                            bits_as<__m256i>(narrow(f16{}, last)), 1);
}

template <class T>
INLINE void store_halves(T* to, vf first, vf last, int64_t n) {
  const __m512i x = halves_as(T{}, first, last);
  if (n >= 32) _mm512_storeu_si512(to, x);
  else _mm512_mask_storeu_epi16(to, first_of_32(n), x);
}
template <>
INLINE void store_halves<float>(float* to, vf first, vf last, int64_t n) {
  if (n >= 32) {
    store(to, first);
    store(to + W, last);
  } else {
    _mm512_mask_storeu_ps(to, __mmask16(first_of_32(n)), first);
    _mm512_mask_storeu_ps(to + W, __mmask16(first_of_32(n) >> 16), last);
  }
}

// [8, 4, 8] numbers of two bytes: in each quarter of eight vectors, those of a column become the quarter of one vector.
INLINE void transpose_quarters(__m512i* a) {
  __m512i b[8];
  // Interleaving rows i and i + 4, three times over, is a transposition.
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      b[2 * i] = _mm512_unpacklo_epi16(a[i], a[i + 4]);
      b[2 * i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
  }
}

}  // namespace
