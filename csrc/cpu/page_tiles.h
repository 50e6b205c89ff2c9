// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Tiles of tokens read out of pages, as float32 and in the order in which a loop wants them. What a page holds past a
// sequence's last token is never read: it may be NaN.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "page_utility_types.h"
#include "simd_loops.h"

namespace {

constexpr int kTile = 64;          // tokens: a multiple of every V::N * V::W
constexpr int kChannel = kTile + 16;  // floats from one channel to the next: a whole vector may be written at a row's end

inline int64_t older_of(const SequencePages& pages, int64_t sequence) {
  return pages.older_start == nullptr ? 0 : pages.older_start[sequence + 1] - pages.older_start[sequence];
}

inline int64_t tokens_of(const SequencePages& pages, int64_t sequence) {
  return older_of(pages, sequence) + pages.seq_lens[sequence];
}

// Keys or values of one sequence: the older tokens, then those in pages.
template <class T>
struct Part {
  const SequencePages& pages;
  const int32_t* table;
  int64_t base, per_slot, per_dim;
  const T* older;
  int64_t older_count;

  Part(const SequencePages& all, int64_t sequence, bool keys)
      : pages(all),
        table(all.block_table + sequence * all.table_stride),
        base(keys ? all.key_base : all.value_base),
        per_slot(keys ? all.key_slot : all.value_slot),
        per_dim(keys ? all.key_dim : all.value_dim),
        older(nullptr),
        older_count(older_of(all, sequence)) {
    if (older_count == 0) return;
    older = static_cast<const T*>(keys ? all.older_keys : all.older_values) + all.older_start[sequence] * all.dim;
  }

  // Calls work(first token, distance of tokens, distance of dims, place, count) for the runs of `count` tokens from
  // `first` on that stand at fixed distances.
  template <class Work>
  void by_runs(int64_t first, int64_t count, const Work& work) const {
    int64_t place = 0;
    if (first < older_count) {
      place = older_count - first < count ? older_count - first : count;
      work(older + first * pages.dim, pages.dim, 1, 0, place);
    }
    while (place < count) {
      const int64_t token = first + place - older_count, slot = token % pages.block_size;
      const int64_t left = count - place, here = pages.block_size - slot < left ? pages.block_size - slot : left;
      const char* page = pages.pool + table[token / pages.block_size] * pages.page_stride_bytes;
      work(reinterpret_cast<const T*>(page) + base + slot * per_slot, per_slot, per_dim, place, here);
      place += here;
    }
  }
};

// Floats of a token's row: whole vectors, zeros behind the last dim.
inline int64_t row_floats(int64_t dim) { return (dim + 15) / 16 * 16; }

// Numbers side by side as float32, zeros up to a whole vector.
template <class V, class T>
inline void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + V::W <= count; i += V::W) V::store(to + i, V::load(from + i));
  if (i < count) {
    T rest[V::W] = {};
    std::memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(T));
    V::store(to + i, V::load(rest));
  }
}

// Tokens -> rows [count, row_floats(dim)].
template <class V, class T>
inline void load_rows(const Part<T>& part, int64_t first, int64_t count, float* rows) {
  const int64_t dim = part.pages.dim, width = row_floats(dim);
  part.by_runs(first, count, [&](const T* run, int64_t per_token, int64_t per_dim, int64_t place, int64_t here) {
    for (int64_t t = 0; t < here; ++t) {
      const T* from = run + t * per_token;
      float* to = rows + (place + t) * width;
      if (per_dim == 1) {
        widen<V>(from, dim, to);
      } else {
        T apart[kMostDim];
        for (int64_t d = 0; d < dim; ++d) apart[d] = from[d * per_dim];
        widen<V>(apart, dim, to);
      }
      for (int64_t d = (dim + V::W - 1) / V::W * V::W; d < width; ++d) to[d] = 0.0f;
    }
  });
}

// As above, of a whole tile: rows behind the last are zeros.
template <class V, class T>
inline void load_tile(const Part<T>& part, int64_t first, int64_t count, float* rows) {
  const int64_t width = row_floats(part.pages.dim);
  load_rows<V>(part, first, count, rows);
  if (count < kTile) std::memset(rows + count * width, 0, static_cast<size_t>((kTile - count) * width) * sizeof(float));
}

#if defined(__AVX2__)
inline void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
#else
inline void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
#endif

// Rows [kTile, width] -> channels [width, kChannel].
inline void transpose_rows(const float* rows, int64_t width, float* channels) {
  for (int64_t d = 0; d < width; d += 8) {
    for (int64_t t = 0; t < kTile; t += 8) {
      transpose8(rows + t * width + d, width, channels + d * kChannel + t, kChannel);
    }
  }
}

// Tokens -> channels [dim, kChannel]; tokens behind the last are zeros. `rows` is scratch.
template <class V, class T>
inline void load_channels(const Part<T>& part, int64_t first, int64_t count, float* rows, float* channels) {
  const int64_t dim = part.pages.dim;
  if (part.per_slot != 1 || first < part.older_count) {
    load_tile<V>(part, first, count, rows);
    return transpose_rows(rows, row_floats(dim), channels);
  }
  part.by_runs(first, count, [&](const T* run, int64_t, int64_t per_dim, int64_t place, int64_t here) {
    for (int64_t d = 0; d < dim; ++d) widen<V>(run + d * per_dim, here, channels + d * kChannel + place);
  });
  if (count == kTile) return;
  for (int64_t d = 0; d < dim; ++d) {
    float* channel = channels + d * kChannel;
    for (int64_t t = count; t < kTile; ++t) channel[t] = 0.0f;
  }
}

}  // namespace
