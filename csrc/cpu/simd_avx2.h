// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Eight float32 lanes with AVX2, FMA and F16C. In an unnamed namespace for the reason given in simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "paged_attention_types.h"

namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int W = 8;
  static constexpr int N = 2;  // vectors of a block: 4 rows * 2 vectors of sums fit in 16 registers

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static float highest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const half_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load(const bf16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_part(const float* p, int n) {
    float all[W] = {};
    std::memcpy(all, p, static_cast<size_t>(n) * sizeof(float));
    return load(all);
  }
  static F load_part(const half_t* p, int n) {
    half_t all[W] = {};
    std::memcpy(all, p, static_cast<size_t>(n) * sizeof(half_t));
    return load(all);
  }

  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(half_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(bf16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const F nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const F quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const F safe = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(safe), 16);
    const __m128i low = _mm256_castsi256_si128(high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, _mm256_extracti128_si256(high, 1)));
  }
  static void store_part(float* p, F x, int n) {
    float all[W];
    store(all, x);
    std::memcpy(p, all, static_cast<size_t>(n) * sizeof(float));
  }

  static I bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I bytes_part(const uint8_t* p, int n) {
    uint8_t all[W] = {};
    std::memcpy(all, p, static_cast<size_t>(n));
    return bytes(all);
  }
  template <int Bits, int Place>
  static F code(I bytes) {
    const __m256i shifted = _mm256_srli_epi32(bytes, Bits * Place);
    return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32((1 << Bits) - 1)));
  }

  static F whole(F x) {
    // Below this the power is 0 or not a normal number: the exponent's field must not wrap around.
    return _mm256_round_ps(_mm256_max_ps(x, _mm256_set1_ps(-200.0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F times_two_to(F y, F whole) {
    const I exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    const F power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return _mm256_and_ps(_mm256_mul_ps(y, power), _mm256_cmp_ps(whole, _mm256_set1_ps(-126.0f), _CMP_GE_OQ));
  }
};

}  // namespace
