// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Cold pages with vpdpbusd: four products of a code (unsigned byte) and a signed byte in a lane. The float32 factors
// (query times key scale, weight times value scale) become integers of 15 bits and a sign, 256 * high + low, one factor
// for a row and page: the largest is exact to 2^-16 of itself, and sums of integers are exact.
#pragma once

#include <immintrin.h>

#include "paged_attention_scratch.h"

namespace {

constexpr float kLargestInteger = 32639.0f;  // 127 * 256 + 127: both bytes fit

// Writes `count` floats (a multiple of 16) as bytes and returns what the integers must be multiplied with.
inline float to_bytes(const float* from, int64_t count, int8_t* high, int8_t* low) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(from + i)));
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 up = _mm512_set1_ps(largest > 0.0f ? kLargestInteger / largest : 0.0f);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), up));
    const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(above));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(number));  // the lowest byte, signed
  }
  return largest > 0.0f ? largest / kLargestInteger : 0.0f;
}

// 16 bytes of four rows: byte i of all four side by side, for every i.
template <bool Part>
inline __m512i four_rows(const uint8_t* p, int64_t row, __mmask16 there) {
  const auto load = [&](int64_t i) {
    const void* at = p + i * row;
    return Part ? _mm_maskz_loadu_epi8(there, at) : _mm_loadu_si128(static_cast<const __m128i*>(at));
  };
  const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1);
  const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(load(2)), load(3), 1);
  const __m512i order = _mm512_set_epi8(
      63, 47, 31, 15, 62, 46, 30, 14, 61, 45, 29, 13, 60, 44, 28, 12, 59, 43, 27, 11, 58, 42, 26, 10, 57, 41, 25, 9,
      56, 40, 24, 8, 55, 39, 23, 7, 54, 38, 22, 6, 53, 37, 21, 5, 52, 36, 20, 4, 51, 35, 19, 3, 50, 34, 18, 2, 49, 33,
      17, 1, 48, 32, 16, 0);
  return _mm512_permutexvar_epi8(order, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

// Memory that is read soon, asked for `each` lines at a time; the last time for a few too many.
struct Soon {
  const uint8_t *at, *end;
  int64_t each;

  // In about `turns` turns.
  Soon(const uint8_t* from, int64_t bytes, int64_t turns)
      : at(from), end(from + bytes), each((bytes + 64 * turns - 1) / (64 * turns)) {}

  inline void fetch_some() {
    if (at >= end) return;
    for (int64_t n = 0; n < each; ++n) fetch(at + 64 * n);
    at += 64 * each;
  }
};

// sums[r][place] = sum over `count` rows of codes (a multiple of 4) of number(r, i) * code(i, place).
template <int Bits, int R, bool Part>
inline void integer_block(const uint8_t* codes, int64_t row_bytes, __mmask16 there, int64_t count, const int8_t* high,
                          const int8_t* low, int64_t stride, Soon& soon, __m512 (&sums)[R][8 / Bits]) {
  constexpr int kPlaces = 8 / Bits;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  __m512i above[R][kPlaces], below[R][kPlaces];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kPlaces; ++j) above[r][j] = below[r][j] = _mm512_setzero_si512();
  }
  const auto four = [](const int8_t* p) __attribute__((always_inline)) {
    int32_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return _mm512_set1_epi32(bytes);
  };
  for (int64_t i = 0; i < count; i += 4) {
    const __m512i packed = four_rows<Part>(codes + i * row_bytes, row_bytes, there);
    soon.fetch_some();
    for (int j = 0; j < kPlaces; ++j) {
      const __m512i shifted = j == 0 ? packed : _mm512_srli_epi16(packed, Bits * j);
      const __m512i code = Bits == 8 ? packed : _mm512_and_si512(shifted, mask);
      for (int r = 0; r < R; ++r) {
        above[r][j] = _mm512_dpbusd_epi32(above[r][j], code, four(high + r * stride + i));
        below[r][j] = _mm512_dpbusd_epi32(below[r][j], code, four(low + r * stride + i));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kPlaces; ++j) {
      const __m512 upper = _mm512_cvtepi32_ps(above[r][j]), lower = _mm512_cvtepi32_ps(below[r][j]);
      sums[r][j] = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), lower);
    }
  }
}

// Rows at a time: as many sums as fit in 32 registers.
template <int Bits>
constexpr int kIntegerRows = Bits == 8 ? 8 : Bits == 4 ? 4 : 3;

// Calls done(row, first code, byte count, sums[R][places]) for all rows and blocks of 16 bytes of a row of codes.
template <int Bits, class Done>
inline void integer_rows(const uint8_t* codes, int64_t row_bytes, int64_t count, const Scratch& s, int64_t stride,
                         int rows, Soon soon, const Done& done) {
  by_rows<kIntegerRows<Bits>>(rows, [&](int row, auto number) {
    constexpr int R = decltype(number)::value;
    const int8_t *high = s.high + row * stride, *low = s.low + row * stride;
    for (int64_t i = 0; i < row_bytes; i += 16) {
      const int bytes = static_cast<int>(row_bytes - i < 16 ? row_bytes - i : 16);
      const auto there = static_cast<__mmask16>((1u << bytes) - 1);
      __m512 sums[R][8 / Bits];
      if (bytes == 16) {
        integer_block<Bits, R, false>(codes + i, row_bytes, there, count, high, low, stride, soon, sums);
      } else {
        integer_block<Bits, R, true>(codes + i, row_bytes, there, count, high, low, stride, soon, sums);
      }
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < 8 / Bits; ++j) done(row + r, j * row_bytes + i, there, sums[r][j]);
      }
    }
  });
}

template <int Bits>
inline void integer_cold_scores(const AttentionCall& call, Scratch& s, const ColdPage& page, int rows) {
  const int64_t dim = call.dim;
  float* scaled = reinterpret_cast<float*>(s.keys);
  for (int r = 0; r < rows; ++r) {
    __m512 constant = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 16) {
      const __m512 query = _mm512_loadu_ps(s.query + r * dim + d);
      constant = _mm512_fmadd_ps(query, _mm512_loadu_ps(s.key_zero + d), constant);
      _mm512_storeu_ps(scaled + d, _mm512_mul_ps(query, _mm512_loadu_ps(s.key_scale + d)));
    }
    s.constant[r] = _mm512_reduce_add_ps(constant);
    s.factor[r] = to_bytes(scaled, dim, s.high + r * dim, s.low + r * dim);
  }
  const auto write = [&](int row, int64_t token, __mmask16 there, __m512 sum) __attribute__((always_inline)) {
    const __m512 score = _mm512_fmadd_ps(sum, _mm512_set1_ps(s.factor[row]), _mm512_set1_ps(s.constant[row]));
    _mm512_mask_storeu_ps(s.scores + row * s.stride + token, there, score);
  };
  integer_rows<Bits>(page.key_codes, page.key_row, dim, s, dim, rows,
                     Soon(page.value_codes, page.tokens * page.value_row, dim / 4), write);
}

template <int Bits>
inline void integer_cold_values(const AttentionCall& call, Scratch& s, const ColdPage& page, int rows) {
  const int64_t count = (page.tokens + 15) / 16 * 16;
  for (int r = 0; r < rows; ++r) {
    float* weights = s.scores + r * s.stride;
    __m512 constant = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16) {
      const __m512 weight = _mm512_loadu_ps(weights + t);
      constant = _mm512_fmadd_ps(weight, _mm512_loadu_ps(s.value_zero + t), constant);
      _mm512_storeu_ps(weights + t, _mm512_mul_ps(weight, _mm512_loadu_ps(s.value_scale + t)));
    }
    s.constant[r] = _mm512_reduce_add_ps(constant);
    s.factor[r] = to_bytes(weights, count, s.high + r * s.stride, s.low + r * s.stride);
  }
  const auto add = [&](int row, int64_t d, __mmask16 there, __m512 sum) __attribute__((always_inline)) {
    float* target = s.sums + row * call.dim + d;
    const __m512 before = _mm512_maskz_loadu_ps(there, target);
    const __m512 zeros = _mm512_add_ps(before, _mm512_set1_ps(s.constant[row]));
    _mm512_mask_storeu_ps(target, there, _mm512_fmadd_ps(sum, _mm512_set1_ps(s.factor[row]), zeros));
  };
  // Tokens of a page are a multiple of 4 at most, so that rows past the last token exist; their weights are 0.
  const int64_t tokens = (page.tokens + 3) / 4 * 4;
  integer_rows<Bits>(page.value_codes, page.value_row, tokens, s, s.stride, rows,
                     Soon(page.next, page.bytes - page.tokens * page.value_row, tokens / 4), add);
}

}  // namespace
