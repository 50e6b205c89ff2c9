// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What window_scores.h does with rows of queries: products with a tile of tokens, weights from logits, outputs. For any
// vector type V of simd_*.h.
#pragma once

#include <cmath>
#include <cstring>

#include "page_tiles.h"

namespace {

constexpr int kWindowRows = 32;  // of a block
constexpr float kLog2OfE = 1.4426950408889634f;
constexpr double kLnOf2 = 0.6931471805599453;

struct WindowScratch {
  int64_t stride;   // of rows of logits: whole tiles
  float* queries;   // [rows, row_floats], times scale and log2(e)
  float* logits;    // [rows, stride], in powers of two; then the weights' numerators
  float* highest;   // [stride / kTile], of a row's tiles
  float* outputs;   // [rows, row_floats]
  float* scores;    // [stride]: squared moves, or sums of weights
  float* rows;      // [kTile, row_floats]
  float* channels;  // [row_floats, kChannel]
  size_t bytes;

  WindowScratch(const WindowCall& call, int64_t tokens, char* memory) : stride((tokens + kTile - 1) / kTile * kTile) {
    const int64_t width = row_floats(call.pages.dim);
    size_t used = 0;
    auto take = [&](float*& pointer, int64_t count) {
      pointer = reinterpret_cast<float*>(memory + used);
      used += (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    };
    take(queries, kWindowRows * width);
    take(logits, kWindowRows * stride);
    take(highest, stride / kTile);
    take(outputs, kWindowRows * width);
    take(scores, stride);
    take(rows, kTile * width);
    take(channels, width * kChannel);
    bytes = used;
  }
};

inline size_t window_bytes(const WindowCall& call, int64_t tokens) { return WindowScratch(call, tokens, nullptr).bytes; }

// What is known of one row's logits.
struct RowWeights {
  int64_t top;       // the token with the highest
  double total;      // of the numerators of all weights, but for that token's where it is kept apart
  float share;       // weight = share * numerator
  float top_weight;  // of that token
};

// sums[r][j] of left[r] . channels, for kTile tokens in steps of N vectors: done(first token, sums).
template <class V, int R, class Done>
inline void dot_tile(const float* left, int64_t width, const float* channels, int64_t dim, const Done& done) {
  constexpr int N = V::N;
  for (int t = 0; t < kTile; t += N * V::W) {
    typename V::F sums[R][N];
    for (auto& row : sums) {
      for (auto& sum : row) sum = V::zero();
    }
    for (int64_t d = 0; d < dim; ++d) {
      typename V::F right[N];
      for (int j = 0; j < N; ++j) right[j] = V::load(channels + d * kChannel + t + j * V::W);
      for (int r = 0; r < R; ++r) {
        const auto factor = V::set(left[r * width + d]);
        for (int j = 0; j < N; ++j) sums[r][j] = V::fma(factor, right[j], sums[r][j]);
      }
    }
    done(t, sums);
  }
}

template <class V, int R, int N>
inline void add_values(const float* weights, int64_t stride, const float* rows, int64_t width, int64_t d,
                       float* outputs) {
  typename V::F sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sums[r][j] = V::load(outputs + r * width + d + j * V::W);
  }
  for (int t = 0; t < kTile; ++t) {
    typename V::F value[N];
    for (int j = 0; j < N; ++j) value[j] = V::load(rows + t * width + d + j * V::W);
    for (int r = 0; r < R; ++r) {
      const auto weight = V::set(weights[r * stride + t]);
      for (int j = 0; j < N; ++j) sums[r][j] = V::fma(weight, value[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) V::store(outputs + r * width + d + j * V::W, sums[r][j]);
  }
}

// outputs[r] += weights[r] times the tile's values. Tokens behind the last have weight 0.
template <class V>
inline void add_value_tile(const float* weights, int64_t stride, const float* rows, int64_t width, int count,
                           float* outputs) {
  by_rows<4>(count, [&](int row, auto number) {
    constexpr int R = decltype(number)::value;
    int64_t d = 0;
    for (; width - d >= V::N * V::W; d += V::N * V::W) {
      add_values<V, R, V::N>(weights + row * stride, stride, rows, width, d, outputs + row * width);
    }
    for (; d < width; d += V::W) {
      add_values<V, R, 1>(weights + row * stride, stride, rows, width, d, outputs + row * width);
    }
  });
}

// Makes a row's logits numerators of weights. `apart`: its heaviest token gets none, since only that token's weight can
// come near 1, where what is left of it would be rounding noise. False if a number is not finite.
template <class V>
inline bool weigh_row(float* logits, float* highest, int64_t visible, int64_t stride, bool apart, RowWeights& out) {
  using F = typename V::F;
  for (int64_t t = visible; t < stride; ++t) logits[t] = -INFINITY;
  const int64_t tiles = (visible + kTile - 1) / kTile;
  const auto most = [&](int64_t tile) {
    F high = V::set(-INFINITY);
    for (int t = 0; t < kTile; t += V::W) high = V::max(V::load(logits + tile * kTile + t), high);
    return V::highest(high);
  };
  F sum = V::zero();  // NaN if a logit is: max() may pass over it
  for (int64_t t = 0; t + V::W <= visible; t += V::W) sum = V::fma(V::load(logits + t), V::zero(), sum);
  float check = V::sum(sum);
  for (int64_t t = visible / V::W * V::W; t < visible; ++t) check += logits[t] * 0.0f;
  if (check != 0.0f) return false;  // NaN is not 0
  int64_t best = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    highest[tile] = most(tile);
    if (highest[tile] > highest[best]) best = tile;
  }
  const float top = highest[best];
  out.top = best * kTile;
  while (logits[out.top] != top) ++out.top;
  float base = top;
  if (apart) {
    logits[out.top] = -INFINITY;
    highest[best] = most(best);
    base = -INFINITY;
    for (int64_t tile = 0; tile < tiles; ++tile) base = highest[tile] > base ? highest[tile] : base;
    if (base == -INFINITY) {  // it is all that the row sees
      for (int64_t t = 0; t < stride; ++t) logits[t] = 0.0f;
      out.total = 0.0;
      out.share = 0.0f;
      out.top_weight = 1.0f;
      return true;
    }
  }
  double total = 0.0;
  const F shift = V::set(base);
  for (int64_t tile = 0; tile < stride / kTile; ++tile) {
    F part = V::zero();
    for (int t = 0; t < kTile; t += V::W) {
      float* at = logits + tile * kTile + t;
      const F weight = exp2<V>(V::sub(V::load(at), shift));
      V::store(at, weight);
      part = V::add(part, weight);
    }
    total += static_cast<double>(V::sum(part));
  }
  out.total = total;
  if (!apart) {
    out.share = static_cast<float>(1.0 / total);
    out.top_weight = out.share;
    return true;
  }
  // The top's odds against all others together.
  const double margin = (static_cast<double>(top) - base) * kLnOf2 - std::log(total);
  out.top_weight = static_cast<float>(1.0 / (1.0 + std::exp(-margin)));
  out.share = static_cast<float>(1.0 / (1.0 + std::exp(margin)) / total);
  return true;
}

// The other tokens' sums in `outputs` become the row's output; returns the squared move without its heaviest token.
inline float finish_output(const float* value, const RowWeights& weights, int64_t dim, float* output) {
  double moved = 0.0;
  for (int64_t d = 0; d < dim; ++d) {
    const double without = weights.total > 0.0 ? output[d] / weights.total : 0.0;
    const double step = weights.top_weight * (value[d] - without);
    output[d] = static_cast<float>(without + step);
    moved += step * step;
  }
  return static_cast<float>(moved);
}

}  // namespace
