// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// The loops over pages in float32, for any vector type V of simd_*.h: elements and codes become float32 in registers,
// once for a group of rows, and are multiplied and added there.
#pragma once

#include "paged_attention_scratch.h"

namespace {

template <class V, class T, int R, int N>
inline void score_block(const T* key, int64_t key_stride, const T* soon, int64_t dim, const float* query, float* scores,
                        int64_t stride) {
  typename V::F sums[R][N];
  for (auto& row : sums) {
    for (auto& sum : row) sum = V::zero();
  }
  for (int64_t d = 0; d < dim; ++d) {
    typename V::F keys[N];
    for (int j = 0; j < N; ++j) keys[j] = V::load(key + d * key_stride + j * V::W);
    // Keys of the tile that follows, at the same places: each line is fetched once.
    fetch(soon + d * key_stride);
    for (int r = 0; r < R; ++r) {
      const auto q = V::set(query[r * dim + d]);
      for (int j = 0; j < N; ++j) sums[r][j] = V::fma(q, keys[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) V::store(scores + r * stride + j * V::W, sums[r][j]);
  }
}

template <class V, class T, int R, int N>
inline void value_block(const HotTile<T>& tile, int64_t d, const float* weights, int64_t stride, float* sums,
                        int64_t dim) {
  typename V::F totals[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) totals[r][j] = V::load(sums + r * dim + d + j * V::W);
  }
  for (int page = 0; page < tile.pages; ++page) {
    const int here = tile.on_page(page);
    const float* w = weights + page * tile.block_size;
    for (int t = 0; t < here; ++t) {
      const int64_t place = t * tile.value_stride + d;
      typename V::F values[N];
      for (int j = 0; j < N; ++j) values[j] = V::load(tile.value[page] + place + j * V::W);
      fetch(tile.next_value[page] + place);
      for (int r = 0; r < R; ++r) {
        const auto weight = V::set(w[r * stride + t]);
        for (int j = 0; j < N; ++j) totals[r][j] = V::fma(weight, values[j], totals[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) V::store(sums + r * dim + d + j * V::W, totals[r][j]);
  }
}

// Rows of Blocks vectors of packed codes times factors: sums[r][place] += factors[r][i] * code(i, place).
template <class V, int Bits, int R, bool Part>
inline void code_block(const uint8_t* codes, int64_t row_bytes, int bytes, int64_t count, const float* factors,
                       int64_t factor_stride, typename V::F (&sums)[R][8 / Bits]) {
  for (int64_t i = 0; i < count; ++i) {
    const auto packed = Part ? V::bytes_part(codes + i * row_bytes, bytes) : V::bytes(codes + i * row_bytes);
    const auto add = [&](auto place) {
      const auto code = V::template code<Bits, decltype(place)::value>(packed);
      for (int r = 0; r < R; ++r) {
        auto& sum = sums[r][decltype(place)::value];
        sum = V::fma(V::set(factors[r * factor_stride + i]), code, sum);
      }
    };
    add(Rows<0>{});
    if constexpr (Bits < 8) add(Rows<1>{});
    if constexpr (Bits < 4) add(Rows<2>{}), add(Rows<3>{});
  }
}

template <class Vector>
struct Float32Loops {
  using V = Vector;
  static constexpr bool kBf16Weights = false;

  template <class T>
  static void hot_scores(const AttentionCall& call, Scratch& s, const HotTile<T>& tile, int rows, const T*) {
    for (int page = 0; page < tile.pages; ++page) {
      const int here = tile.on_page(page);
      by_rows<4>(rows, [&](int row, auto count) {
        constexpr int R = decltype(count)::value;
        const float* query = s.query + row * call.dim;
        float* scores = s.scores + row * s.stride + page * tile.block_size;
        int t = 0;
        for (; here - t > (V::N - 1) * V::W; t += V::N * V::W) {
          score_block<V, T, R, V::N>(tile.key[page] + t, tile.key_stride, tile.next_key[page] + t, call.dim, query,
                                     scores + t, s.stride);
        }
        for (; t < here; t += V::W) {
          score_block<V, T, R, 1>(tile.key[page] + t, tile.key_stride, tile.next_key[page] + t, call.dim, query,
                                  scores + t, s.stride);
        }
      });
    }
  }

  template <class T>
  static void hot_values(const AttentionCall& call, Scratch& s, const HotTile<T>& tile, int rows) {
    by_rows<4>(rows, [&](int row, auto count) {
      constexpr int R = decltype(count)::value;
      const float* weights = s.scores + row * s.stride;
      float* sums = s.sums + row * call.dim;
      int64_t d = 0;
      for (; call.dim - d >= V::N * V::W; d += V::N * V::W) {
        value_block<V, T, R, V::N>(tile, d, weights, s.stride, sums, call.dim);
      }
      for (; d < call.dim; d += V::W) value_block<V, T, R, 1>(tile, d, weights, s.stride, sums, call.dim);
    });
  }

  // Keys are zero + scale * code for each dim: q.k = sum(q * zero) + sum((q * scale) * code).
  template <int Bits>
  static void cold_scores(const AttentionCall& call, Scratch& s, const ColdPage& page, int rows) {
    constexpr int kPlaces = 8 / Bits;
    const int64_t dim = call.dim;
    float* scaled = reinterpret_cast<float*>(s.keys);
    for (int r = 0; r < rows; ++r) {
      auto constant = V::zero();
      for (int64_t d = 0; d < dim; d += V::W) {
        const auto q = V::load(s.query + r * dim + d);
        constant = V::fma(q, V::load(s.key_zero + d), constant);
        V::store(scaled + r * dim + d, V::mul(q, V::load(s.key_scale + d)));
      }
      s.constant[r] = V::sum(constant);
    }
    by_rows<2>(rows, [&](int row, auto count) {
      constexpr int R = decltype(count)::value;
      for (int64_t i = 0; i < page.key_row; i += V::W) {
        const int bytes = static_cast<int>(page.key_row - i < V::W ? page.key_row - i : V::W);
        typename V::F sums[R][kPlaces];
        for (int r = 0; r < R; ++r) {
          for (auto& sum : sums[r]) sum = V::set(s.constant[row + r]);
        }
        const float* query = scaled + row * dim;
        if (bytes == V::W) {
          code_block<V, Bits, R, false>(page.key_codes + i, page.key_row, bytes, dim, query, dim, sums);
        } else {
          code_block<V, Bits, R, true>(page.key_codes + i, page.key_row, bytes, dim, query, dim, sums);
        }
        for (int r = 0; r < R; ++r) {
          for (int place = 0; place < kPlaces; ++place) {
            V::store_part(s.scores + (row + r) * s.stride + place * page.key_row + i, sums[r][place], bytes);
          }
        }
      }
    });
  }

  // Values are zero + scale * code for each token: the scale goes into the weight, the zeros are one number for a row.
  template <int Bits>
  static void cold_values(const AttentionCall& call, Scratch& s, const ColdPage& page, int rows) {
    constexpr int kPlaces = 8 / Bits;
    for (int r = 0; r < rows; ++r) {
      float* weights = s.scores + r * s.stride;
      auto constant = V::zero();
      for (int t = 0; t < page.tokens; t += V::W) {
        const auto weight = V::load(weights + t);
        constant = V::fma(weight, V::load(s.value_zero + t), constant);
        V::store(weights + t, V::mul(weight, V::load(s.value_scale + t)));
      }
      s.constant[r] = V::sum(constant);
    }
    by_rows<2>(rows, [&](int row, auto count) {
      constexpr int R = decltype(count)::value;
      for (int64_t i = 0; i < page.value_row; i += V::W) {
        const int bytes = static_cast<int>(page.value_row - i < V::W ? page.value_row - i : V::W);
        typename V::F sums[R][kPlaces];
        for (int r = 0; r < R; ++r) {
          for (auto& sum : sums[r]) sum = V::set(s.constant[row + r]);
        }
        const float* weights = s.scores + row * s.stride;
        if (bytes == V::W) {
          code_block<V, Bits, R, false>(page.value_codes + i, page.value_row, bytes, page.tokens, weights, s.stride,
                                        sums);
        } else {
          code_block<V, Bits, R, true>(page.value_codes + i, page.value_row, bytes, page.tokens, weights, s.stride,
                                       sums);
        }
        for (int r = 0; r < R; ++r) {
          for (int place = 0; place < kPlaces; ++place) {
            float* target = s.sums + (row + r) * call.dim + place * page.value_row + i;
            V::store_part(target, V::add(V::load_part(target, bytes), sums[r][place]), bytes);
          }
        }
      }
    });
  }
};

}  // namespace
