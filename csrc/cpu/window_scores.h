// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Scores of one sequence's tokens by what its window's queries attend to: the delta-score (scoring/delta.py) and mean
// attention (scoring/tova.py, scoring/snapkv.py), in float32 for any vector type V of simd_*.h.
//
// A block of queries ("rows") keeps its logits of all tokens: working them out twice, as a GPU does, costs more than a
// cache of a few hundred KiB. Keys and values are widened tile by tile.
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

template <class V, class T>
struct Window {
  const WindowCall& call;
  const SequencePages& pages;
  Part<T> keys, values;
  WindowScratch s;
  int64_t tokens, window, all_rows, width;
  const T* queries;
  RowWeights weights[kWindowRows];

  Window(const WindowCall& call_, int64_t sequence, char* memory)
      : call(call_),
        pages(call_.pages),
        keys(call_.pages, sequence, true),
        values(call_.pages, sequence, false),
        s(call_, tokens_of(call_.pages, sequence), memory),
        tokens(tokens_of(call_.pages, sequence)),
        // A sequence may have fewer tokens than the window has queries: the last of these then.
        window(tokens < call_.window ? tokens : call_.window),
        all_rows(call_.group * window),
        width(row_floats(call_.pages.dim)),
        queries(static_cast<const T*>(call_.queries) + sequence * call_.group * call_.window * call_.pages.dim) {}

  int64_t visible(int64_t row) const { return tokens - window + row % window + 1; }

  // Logits of the rows from `first` on. False if a number is not finite.
  bool weigh(int64_t first, int count, bool apart) {
    const int64_t dim = pages.dim;
    const float scale = static_cast<float>(call.scale) * kLog2OfE;
    for (int r = 0; r < count; ++r) {
      const int64_t row = first + r, query = row / window * call.window + call.window - window + row % window;
      float* own = s.queries + r * width;
      widen<V>(queries + query * dim, dim, own);
      for (int64_t d = 0; d < dim; ++d) own[d] *= scale;
    }
    for (int64_t t = 0; t < tokens; t += kTile) {
      load_channels<V>(keys, t, here(t), s.rows, s.channels);
      by_rows<4>(count, [&](int row, auto number) {
        constexpr int R = decltype(number)::value;
        dot_tile<V, R>(s.queries + row * width, width, s.channels, dim, [&](int place, auto& sums) {
          for (int r = 0; r < R; ++r) {
            float* to = s.logits + (row + r) * s.stride + t + place;
            for (int j = 0; j < V::N; ++j) V::store(to + j * V::W, sums[r][j]);
          }
        });
      });
    }
    for (int r = 0; r < count; ++r) {
      if (!weigh_row<V>(s.logits + r * s.stride, s.highest, visible(first + r), s.stride, apart, weights[r])) {
        return false;
      }
    }
    return true;
  }

  // The rows' outputs, and for their heaviest tokens what moves without them. False if a number is not finite.
  bool read_values(int count) {
    std::memset(s.outputs, 0, static_cast<size_t>(count * width) * sizeof(float));
    for (int64_t t = 0; t < tokens; t += kTile) {
      load_tile<V>(values, t, here(t), s.rows);
      add_value_tile<V>(s.logits + t, s.stride, s.rows, width, count, s.outputs);
    }
    float check = 0.0f;
    for (int r = 0; r < count; ++r) {
      load_rows<V>(values, weights[r].top, 1, s.rows);
      float* output = s.outputs + r * width;
      const float moved = finish_output(s.rows, weights[r], pages.dim, output);
      for (int64_t d = 0; d < pages.dim; ++d) check += output[d] * 0.0f;
      float& score = s.scores[weights[r].top];
      score = moved > score ? moved : score;
    }
    return check == 0.0f;
  }

  // The largest squared move that any row makes without a token.
  void add_moves(int count) {
    using F = typename V::F;
    const int64_t dim = pages.dim;
    float length2[kWindowRows];
    for (int r = 0; r < count; ++r) {
      const float* output = s.outputs + r * width;
      length2[r] = 0.0f;
      for (int64_t d = 0; d < dim; ++d) length2[r] += output[d] * output[d];
    }
    for (int64_t t = 0; t < tokens; t += kTile) {
      load_channels<V>(values, t, here(t), s.rows, s.channels);
      alignas(64) float norm2[kTile];
      for (int place = 0; place < kTile; place += V::W) {
        F sum = V::zero();
        for (int64_t d = 0; d < dim; ++d) {
          const F value = V::load(s.channels + d * kChannel + place);
          sum = V::fma(value, value, sum);
        }
        V::store(norm2 + place, sum);
      }
      by_rows<4>(count, [&](int row, auto number) {
        constexpr int R = decltype(number)::value;
        dot_tile<V, R>(s.outputs + row * width, width, s.channels, dim, [&](int place, auto& sums) {
          for (int j = 0; j < V::N; ++j) {
            const int at = place + j * V::W;
            const F own = V::load(norm2 + at);
            F most = V::load(s.scores + t + at);
            for (int r = 0; r < R; ++r) {
              // |v - o|^2 expanded; rounding may leave it below zero.
              const F far2 = V::fma(V::set(-2.0f), sums[r][j], V::add(own, V::set(length2[row + r])));
              const F numerator = V::load(s.logits + (row + r) * s.stride + t + at);
              const F weight = V::mul(numerator, V::set(weights[row + r].share));
              const F ratio = V::div(weight, V::sub(V::set(1.0f), weight));  // weight is at most 1/2
              most = V::max(V::mul(V::mul(ratio, ratio), far2), most);
            }
            V::store(s.scores + t + at, most);
          }
        });
      });
    }
  }

  // The rows' weights, added up.
  void add_weights(int count) {
    for (int r = 0; r < count; ++r) {
      const auto share = V::set(weights[r].share);
      for (int64_t t = 0; t < s.stride; t += V::W) {
        V::store(s.scores + t, V::fma(V::load(s.logits + r * s.stride + t), share, V::load(s.scores + t)));
      }
    }
  }

  // Scores of all tokens, squared or summed up. False if a number is not finite.
  bool run() {
    const bool apart = call.kind == kDelta;
    std::memset(s.scores, 0, static_cast<size_t>(s.stride) * sizeof(float));
    for (int64_t first = 0; first < all_rows; first += kWindowRows) {
      const int count = static_cast<int>(all_rows - first < kWindowRows ? all_rows - first : kWindowRows);
      if (!weigh(first, count, apart)) return false;
      if (!apart) add_weights(count);
      else if (!read_values(count)) return false;
      else add_moves(count);
    }
    return true;
  }

  int64_t here(int64_t first) const { return tokens - first < kTile ? tokens - first : kTile; }
};

// The window's own tokens get the highest score, the others that of the best of seven neighbours.
inline void pool_scores(const float* mean, int64_t tokens, int64_t window, float* out) {
  constexpr int64_t kReach = 3;
  const int64_t prefix = tokens - window;
  float most = 0.0f;
  for (int64_t t = 0; t < prefix; ++t) {
    const int64_t first = t < kReach ? 0 : t - kReach, end = t + kReach + 1 < prefix ? t + kReach + 1 : prefix;
    float best = mean[first];
    for (int64_t i = first + 1; i < end; ++i) best = mean[i] > best ? mean[i] : best;
    out[t] = best;
    most = best > most ? best : most;
  }
  for (int64_t t = prefix; t < tokens; ++t) out[t] = prefix == 0 ? 1.0f : most;
}

// Scores of one sequence, and their sums by page; NaN all of them where something that the window reads is not finite.
template <class V, class T>
void window_scores_of(const WindowCall& call, int64_t sequence, char* memory) {
  const SequencePages& pages = call.pages;
  const int64_t size = pages.block_size, all = pages.score_stride, tokens = tokens_of(pages, sequence);
  float* out = pages.scores + sequence * all;
  float* sums = call.sums == nullptr ? nullptr : call.sums + sequence * pages.table_width;
  for (int64_t t = tokens; t < all; ++t) out[t] = 0.0f;
  if (tokens > 0) {
    Window<V, T> work(call, sequence, memory);
    const bool finite = work.run();
    const float* scores = work.s.scores;
    const float share = 1.0f / static_cast<float>(work.all_rows);
    for (int64_t t = 0; t < tokens; ++t) {
      out[t] = !finite ? NAN : call.kind == kDelta ? __builtin_sqrtf(scores[t]) : scores[t] * share;
    }
    if (finite && call.kind == kPooled) {
      for (int64_t t = 0; t < tokens; ++t) work.s.scores[t] = out[t];
      pool_scores(work.s.scores, tokens, work.window, out);
    }
  }
  const float* in_pages = out + older_of(pages, sequence);
  for (int64_t page = 0; sums != nullptr && page < pages.table_width; ++page) {
    float sum = 0.0f;
    for (int64_t slot = 0; slot < size; ++slot) sum += in_pages[page * size + slot];
    sums[page] = sum;
  }
}

template <class V>
void window_scores(const WindowCall& call, int64_t sequence, char* memory) {
  if (call.pages.dtype == kFloat32) return window_scores_of<V, float>(call, sequence, memory);
  if (call.pages.dtype == kBfloat16) return window_scores_of<V, bf16_t>(call, sequence, memory);
  window_scores_of<V, half_t>(call, sequence, memory);
}

}  // namespace
