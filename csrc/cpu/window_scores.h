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

#include "window_rows.h"

namespace {

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
