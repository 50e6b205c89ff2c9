// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Hot pages in bfloat16 with vdpbf16ps: two products and two additions in a lane, sums in float32. Neighbouring rows
// (dims of keys, tokens of values) are interleaved in registers, so that a pair is what the instruction wants. The
// weights are rounded to bfloat16 as well, and the softmax divides by the sum of the rounded ones.
#pragma once

#include <immintrin.h>

#include "paged_attention_scratch.h"

namespace {

// Rows `a` and `b` of 32 elements as pairs. The order within a vector is that of the unpack instructions.
struct Pairs {
  __m512bh first, second;
};

inline __m512i row32(const bf16_t* p) { return _mm512_loadu_si512(p); }

inline Pairs interleave(__m512i a, __m512i b) {
  return {reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b)),
          reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b))};
}

// 16 elements each: pairs in order.
inline __m512bh interleave16(__m256i a, __m256i b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return reinterpret_cast<__m512bh>(
      _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1)));
}

inline __m256i row16(const bf16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m512bh pair_of(const bf16_t* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof(both));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}

// Undoes the order of the unpack instructions: sums of elements 0 to 15 and 16 to 31.
struct Ordered {
  __m512 low, high;
};

inline Ordered in_order(__m512 first, __m512 second) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  return {_mm512_permutex2var_ps(first, low, second), _mm512_permutex2var_ps(first, high, second)};
}

// Scores of 32 (Wide) or 16 neighbouring tokens for R rows. Sums are kept apart for Chains pairs of dims: one chain of
// additions for a row would wait for itself.
template <int R, bool Wide, int Chains>
inline void bf16_scores(const bf16_t* key, int64_t key_stride, const bf16_t* soon, int64_t dim, const bf16_t* query,
                        __m512 scale, float* scores, int64_t stride) {
  __m512 sums[Chains][R][2];
  for (auto& chain : sums) {
    for (auto& row : chain) row[0] = row[1] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < dim; d += 2 * Chains) {
    for (int c = 0; c < Chains; ++c) {
      const int64_t at = (d + 2 * c) * key_stride;
      fetch(soon + at);
      fetch(soon + at + key_stride);
      if constexpr (Wide) {
        const Pairs keys = interleave(row32(key + at), row32(key + at + key_stride));
        for (int r = 0; r < R; ++r) {
          const __m512bh q = pair_of(query + r * dim + d + 2 * c);
          sums[c][r][0] = _mm512_dpbf16_ps(sums[c][r][0], keys.first, q);
          sums[c][r][1] = _mm512_dpbf16_ps(sums[c][r][1], keys.second, q);
        }
      } else {
        const __m512bh keys = interleave16(row16(key + at), row16(key + at + key_stride));
        for (int r = 0; r < R; ++r) {
          sums[c][r][0] = _mm512_dpbf16_ps(sums[c][r][0], keys, pair_of(query + r * dim + d + 2 * c));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 1; c < Chains; ++c) {
      sums[0][r][0] = _mm512_add_ps(sums[0][r][0], sums[c][r][0]);
      sums[0][r][1] = _mm512_add_ps(sums[0][r][1], sums[c][r][1]);
    }
    float* target = scores + r * stride;
    if constexpr (Wide) {
      const Ordered sum = in_order(sums[0][r][0], sums[0][r][1]);
      _mm512_storeu_ps(target, _mm512_mul_ps(sum.low, scale));
      _mm512_storeu_ps(target + 16, _mm512_mul_ps(sum.high, scale));
    } else {
      _mm512_storeu_ps(target, _mm512_mul_ps(sums[0][r][0], scale));
    }
  }
}

// Adds weights times values of B * 32 dims (B = 0: 16 dims) of all pages' tokens to the sums of R rows.
template <int R, int B>
inline void bf16_values(const HotTile<bf16_t>& tile, int64_t d, const bf16_t* weights, int64_t stride, float* sums,
                        int64_t dim) {
  constexpr int kVectors = B == 0 ? 1 : 2 * B;
  __m512 totals[R][kVectors];
  for (auto& row : totals) {
    for (auto& total : row) total = _mm512_setzero_ps();
  }
  const auto add = [&](const bf16_t* a, const bf16_t* b, const bf16_t* w, bool both) __attribute__((always_inline)) {
    if constexpr (B == 0) {
      const __m512bh values = interleave16(row16(a), both ? row16(b) : _mm256_setzero_si256());
      for (int r = 0; r < R; ++r) totals[r][0] = _mm512_dpbf16_ps(totals[r][0], values, pair_of(w + r * stride));
    } else {
      for (int j = 0; j < B; ++j) {
        const Pairs values = interleave(row32(a + 32 * j), both ? row32(b + 32 * j) : _mm512_setzero_si512());
        for (int r = 0; r < R; ++r) {
          const __m512bh weight = pair_of(w + r * stride);
          totals[r][2 * j] = _mm512_dpbf16_ps(totals[r][2 * j], values.first, weight);
          totals[r][2 * j + 1] = _mm512_dpbf16_ps(totals[r][2 * j + 1], values.second, weight);
        }
      }
    }
  };
  for (int page = 0; page < tile.pages; ++page) {
    const int here = tile.on_page(page);
    const bf16_t* value = tile.value[page] + d;
    const bf16_t* soon = tile.next_value[page] + d;
    const bf16_t* w = weights + page * tile.block_size;
    int t = 0;
    for (; t + 1 < here; t += 2) {
      const int64_t at = t * tile.value_stride;
      for (int j = 0; j < (B == 0 ? 1 : B); ++j) {
        fetch(soon + at + 32 * j);
        fetch(soon + at + tile.value_stride + 32 * j);
      }
      add(value + at, value + at + tile.value_stride, w + t, true);
    }
    // The last of an odd number: what stands after it may be NaN, and 0 * NaN is NaN.
    if (t < here) add(value + t * tile.value_stride, value, w + t, false);
  }
  for (int r = 0; r < R; ++r) {
    float* target = sums + r * dim + d;
    const auto add_to = [](float* p, __m512 x) { _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), x)); };
    if constexpr (B == 0) {
      add_to(target, totals[r][0]);
    } else {
      for (int j = 0; j < B; ++j) {
        const Ordered sum = in_order(totals[r][2 * j], totals[r][2 * j + 1]);
        add_to(target + 32 * j, sum.low);
        add_to(target + 32 * j + 16, sum.high);
      }
    }
  }
}

inline void bf16_hot_scores(const AttentionCall& call, Scratch& s, const HotTile<bf16_t>& tile, int rows,
                            const bf16_t* query) {
  const __m512 scale = _mm512_set1_ps(static_cast<float>(call.scale) * 1.4426950408889634f);
  for (int page = 0; page < tile.pages; ++page) {
    const int here = tile.on_page(page);
    by_rows<8>(rows, [&](int row, auto count) {
      constexpr int R = decltype(count)::value;
      constexpr int kChains = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // dims are a multiple of 16, so of 2 * kChains
      const bf16_t* q = query + row * call.dim;
      float* scores = s.scores + row * s.stride + page * tile.block_size;
      int t = 0;
      for (; here - t > 16; t += 32) {
        bf16_scores<R, true, kChains>(tile.key[page] + t, tile.key_stride, tile.next_key[page] + t, call.dim, q, scale,
                                      scores + t, s.stride);
      }
      if (t < here) {
        bf16_scores<R, false, kChains>(tile.key[page] + t, tile.key_stride, tile.next_key[page] + t, call.dim, q, scale,
                                       scores + t, s.stride);
      }
    });
  }
}

inline void bf16_hot_values(const AttentionCall& call, Scratch& s, const HotTile<bf16_t>& tile, int rows) {
  by_rows<8>(rows, [&](int row, auto count) {
    constexpr int R = decltype(count)::value;
    constexpr int kMost = R <= 4 ? 2 : 1;
    const bf16_t* weights = s.weights + row * s.stride;
    float* sums = s.sums + row * call.dim;
    int64_t d = 0;
    for (; call.dim - d >= 32 * kMost; d += 32 * kMost) {
      bf16_values<R, kMost>(tile, d, weights, s.stride, sums, call.dim);
    }
    for (; call.dim - d >= 32; d += 32) bf16_values<R, 1>(tile, d, weights, s.stride, sums, call.dim);
    if (d < call.dim) bf16_values<R, 0>(tile, d, weights, s.stride, sums, call.dim);
  });
}

}  // namespace
