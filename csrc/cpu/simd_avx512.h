// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Sixteen float32 lanes with AVX-512 (F, BW, VL, DQ). Everything is in an unnamed namespace: files compiled for other
// instruction sets have functions of the same names, and the linker must not choose between them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "paged_attention_types.h"

namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int W = 16;
  static constexpr int N = 4;  // vectors of a block: 4 rows * 4 vectors of sums fit in 32 registers

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static float highest(F a) { return _mm512_reduce_max_ps(a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const half_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const bf16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static F load_part(const half_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p)); }

  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(half_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(bf16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(round_to_bf16(x)));
  }
  static void store_part(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask(n), x); }

  // Bytes, one in the low bits of each lane.
  static I bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I bytes_part(const uint8_t* p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(n), p)); }
  template <int Bits, int Place>
  static F code(I bytes) {
    const __m512i shifted = _mm512_srli_epi32(bytes, Bits * Place);
    return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32((1 << Bits) - 1)));
  }

  // x = whole + rest with rest in [-1/2, 1/2]; times_two_to(y, whole) = y * 2^whole, 0 if that is too small.
  static F whole(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_two_to(F y, F whole) { return _mm512_scalef_ps(y, whole); }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static __m512i round_to_bf16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
  }
};

}  // namespace
