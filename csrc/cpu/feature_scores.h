// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Scores of one sequence's tokens by their keys and values alone (scoring/predictor.py, distinct.py, keydiff.py), for
// any vector type V of simd_*.h. A first reading sums up what is usual for the head, a second one rates the tokens.
#pragma once

#include <cmath>
#include <type_traits>

#include "page_tiles.h"

namespace {

constexpr float kShortest = 1e-12f;  // no length is less, so that one may divide by it

struct FeatureScratch {
  double* direction_sum;  // [dim]
  double* value_sum;      // [dim]
  float* anchor;          // [dim], mean direction of the keys, of length 1
  float* mean;            // [dim], mean value
  float* no_weights;      // [dim], zeros
  float* rows;            // [kTile, row_floats]
  float* channels;        // [row_floats, kChannel]
  size_t bytes;

  FeatureScratch(const FeatureCall& call, char* memory) {
    const int64_t width = row_floats(call.pages.dim);
    size_t used = 0;
    auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
      used += (static_cast<size_t>(count) * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(direction_sum, width);
    take(value_sum, width);
    take(anchor, width);
    take(mean, width);
    take(no_weights, width);
    take(rows, kTile * width);
    take(channels, width * kChannel);
    bytes = used;
  }
};

inline size_t feature_bytes(const FeatureCall& call) { return FeatureScratch(call, nullptr).bytes; }

// A head's weights of the features of scoring/features.py, in their order.
struct FeatureWeights {
  float constant = 0.0f;
  const float *key = nullptr, *pair = nullptr, *value = nullptr;  // [dim], [dim / 2], [dim]
  float key_length = 0.0f, value_length = 0.0f, cosine = 0.0f, distance = 0.0f;

  void read(const float* all, int64_t dim) {
    constant = all[0];
    key = all + 1;
    pair = key + dim;
    value = pair + dim / 2;
    const float* rest = value + dim;
    key_length = rest[0], value_length = rest[1], cosine = rest[2], distance = rest[3];
  }
};

inline int64_t feature_count(int64_t dim) { return 1 + dim + dim / 2 + dim + 4; }

template <class V, class T>
struct Features {
  using F = typename V::F;
  static constexpr int N = V::N;
  const FeatureCall& call;
  const SequencePages& pages;
  Part<T> keys, values;
  FeatureScratch s;
  int64_t tokens, dim;

  Features(const FeatureCall& call_, int64_t sequence, char* memory)
      : call(call_),
        pages(call_.pages),
        keys(call_.pages, sequence, true),
        values(call_.pages, sequence, false),
        s(call_, memory),
        tokens(tokens_of(call_.pages, sequence)),
        dim(call_.pages.dim) {}

  int64_t here(int64_t first) const { return tokens - first < kTile ? tokens - first : kTile; }

  // Sums of the keys' unit vectors and of the values, in float64 from tile to tile: there may be many.
  void sum_up(bool with_values) {
    for (int64_t d = 0; d < dim; ++d) s.direction_sum[d] = s.value_sum[d] = 0.0;
    const int64_t width = row_floats(dim);
    for (int64_t t = 0; t < tokens; t += kTile) {
      load_channels<V>(keys, t, here(t), s.rows, s.channels);
      alignas(64) float inverse[kTile];
      for (int place = 0; place < kTile; place += N * V::W) {
        F norm2[N];
        for (auto& sum : norm2) sum = V::zero();
        for (int64_t d = 0; d < dim; ++d) {
          for (int j = 0; j < N; ++j) {
            const F key = V::load(s.channels + d * kChannel + place + j * V::W);
            norm2[j] = V::fma(key, key, norm2[j]);
          }
        }
        for (int j = 0; j < N; ++j) {
          const F length = V::max(V::set(kShortest), V::sqrt(norm2[j]));
          V::store(inverse + place + j * V::W, V::div(V::set(1.0f), length));
        }
      }
      for (int64_t d = 0; d < dim; ++d) {
        F sum = V::zero();
        for (int place = 0; place < kTile; place += V::W) {
          sum = V::fma(V::load(s.channels + d * kChannel + place), V::load(inverse + place), sum);
        }
        s.direction_sum[d] += static_cast<double>(V::sum(sum));
      }
      if (!with_values) continue;
      load_rows<V>(values, t, here(t), s.rows);
      for (int64_t d = 0; d < width; d += V::W) {
        F sum = V::zero();
        for (int64_t row = 0; row < here(t); ++row) sum = V::add(sum, V::load(s.rows + row * width + d));
        alignas(64) float lanes[V::W];
        V::store(lanes, sum);
        for (int64_t i = 0; i < V::W && d + i < dim; ++i) s.value_sum[d + i] += static_cast<double>(lanes[i]);
      }
    }
  }

  // What the tokens are rated against: all that was seen, of which the sums are written down.
  void make_usual(int64_t sequence, bool with_values) {
    const bool more = call.before_directions != nullptr;
    const int64_t own = sequence * dim;
    double length2 = 0.0;
    for (int64_t d = 0; d < dim; ++d) {
      float direction = static_cast<float>(s.direction_sum[d]), value = static_cast<float>(s.value_sum[d]);
      if (more) direction += call.before_directions[own + d], value += call.before_values[own + d];
      if (call.directions != nullptr) call.directions[own + d] = direction, call.values[own + d] = value;
      s.anchor[d] = direction;
      s.mean[d] = with_values ? value / static_cast<float>(tokens + call.before_count) : 0.0f;
      length2 += static_cast<double>(direction) * direction;
    }
    const double length = __builtin_sqrt(length2);
    for (int64_t d = 0; d < dim; ++d) {
      s.anchor[d] = static_cast<float>(s.anchor[d] / (length < kShortest ? kShortest : length));
    }
  }

  struct Tile {
    F linear[N], norm2[N], dot[N];
  };

  // Over the keys of N vectors of tokens: weighted features, squared lengths, products with the anchor.
  void add_keys(int place, const FeatureWeights* weights, Tile& tile) const {
    const int64_t half = dim / 2;
    const float* tile_keys = s.channels + place;
    for (int64_t d = 0; d < half; ++d) {
      const F a = V::set(s.anchor[d]), b = V::set(s.anchor[d + half]);
      for (int j = 0; j < N; ++j) {
        const F first = V::load(tile_keys + d * kChannel + j * V::W);
        const F second = V::load(tile_keys + (d + half) * kChannel + j * V::W);
        const F length2 = V::fma(first, first, V::mul(second, second));
        tile.norm2[j] = V::add(tile.norm2[j], length2);
        tile.dot[j] = V::fma(a, first, V::fma(b, second, tile.dot[j]));
        if (weights == nullptr) continue;
        F sum = V::fma(V::set(weights->key[d]), first, tile.linear[j]);
        sum = V::fma(V::set(weights->key[d + half]), second, sum);
        tile.linear[j] = V::fma(V::set(weights->pair[d]), V::sqrt(length2), sum);
      }
    }
    for (int64_t d = 2 * half; d < dim; ++d) {  // an odd dim has no pair
      for (int j = 0; j < N; ++j) {
        const F key = V::load(tile_keys + d * kChannel + j * V::W);
        tile.norm2[j] = V::fma(key, key, tile.norm2[j]);
        tile.dot[j] = V::fma(V::set(s.anchor[d]), key, tile.dot[j]);
        if (weights != nullptr) tile.linear[j] = V::fma(V::set(weights->key[d]), key, tile.linear[j]);
      }
    }
  }

  // The same of the values, with squared distances from the mean in place of the products.
  void add_values(int place, const float* weights, Tile& tile) const {
    for (int64_t d = 0; d < dim; ++d) {
      const F weight = V::set(weights[d]), mean = V::set(s.mean[d]);
      for (int j = 0; j < N; ++j) {
        const F value = V::load(s.channels + d * kChannel + place + j * V::W);
        const F apart = V::sub(value, mean);
        tile.linear[j] = V::fma(weight, value, tile.linear[j]);
        tile.norm2[j] = V::fma(value, value, tile.norm2[j]);
        tile.dot[j] = V::fma(apart, apart, tile.dot[j]);
      }
    }
  }

  void rate(int64_t sequence, float* out) {
    FeatureWeights own;
    if (call.kind == kPredictor) own.read(call.weights + sequence * feature_count(dim), dim);
    const FeatureWeights* weights = call.kind == kPredictor ? &own : nullptr;
    for (int64_t d = 0; d < dim; ++d) s.no_weights[d] = 0.0f;
    constexpr int kVectors = kTile / V::W;
    alignas(64) float linear[kTile], length[kTile], cosine[kTile];
    for (int64_t t = 0; t < tokens; t += kTile) {
      load_channels<V>(keys, t, here(t), s.rows, s.channels);
      for (int vector = 0; vector < kVectors; vector += N) {
        const int place = vector * V::W;
        Tile tile;
        for (int j = 0; j < N; ++j) tile.linear[j] = tile.norm2[j] = tile.dot[j] = V::zero();
        add_keys(place, weights, tile);
        for (int j = 0; j < N; ++j) {
          const F own_length = V::max(V::set(kShortest), V::sqrt(tile.norm2[j]));
          V::store(linear + place + j * V::W, tile.linear[j]);
          V::store(length + place + j * V::W, own_length);
          V::store(cosine + place + j * V::W, V::div(tile.dot[j], own_length));
        }
      }
      if (call.kind == kKeyDiff) {
        for (int64_t i = 0; i < here(t); ++i) out[t + i] = -cosine[i];
        continue;
      }
      alignas(64) float value_length[kTile], distance[kTile];
      load_channels<V>(values, t, here(t), s.rows, s.channels);
      for (int vector = 0; vector < kVectors; vector += N) {
        const int place = vector * V::W;
        Tile tile;
        for (int j = 0; j < N; ++j) {
          tile.linear[j] = V::load(linear + place + j * V::W);
          tile.norm2[j] = tile.dot[j] = V::zero();
        }
        add_values(place, weights != nullptr ? weights->value : s.no_weights, tile);
        for (int j = 0; j < N; ++j) {
          V::store(linear + place + j * V::W, tile.linear[j]);
          V::store(value_length + place + j * V::W, V::sqrt(tile.norm2[j]));
          V::store(distance + place + j * V::W, V::sqrt(tile.dot[j]));
        }
      }
      for (int64_t i = 0; i < here(t); ++i) {
        if (weights == nullptr) {
          out[t + i] = (1.0f - cosine[i]) * distance[i];
          continue;
        }
        const float sum = linear[i] + weights->constant + weights->key_length * length[i] +
                          weights->value_length * value_length[i] + weights->cosine * cosine[i] +
                          weights->distance * distance[i];
        out[t + i] = std::exp(sum);
      }
    }
  }
};

template <class V, class T>
void feature_scores_of(const FeatureCall& call, int64_t sequence, char* memory) {
  const SequencePages& pages = call.pages;
  const int64_t all = pages.score_stride, tokens = tokens_of(pages, sequence);
  float* out = pages.scores + sequence * all;
  for (int64_t t = tokens; t < all; ++t) out[t] = 0.0f;
  Features<V, T> work(call, sequence, memory);
  const bool values = call.kind != kKeyDiff;
  work.sum_up(values);
  work.make_usual(sequence, values);
  work.rate(sequence, out);
}

template <class V>
void feature_scores(const FeatureCall& call, int64_t sequence, char* memory) {
  if (call.pages.dtype == kFloat32) return feature_scores_of<V, float>(call, sequence, memory);
  if (call.pages.dtype == kBfloat16) return feature_scores_of<V, bf16_t>(call, sequence, memory);
  feature_scores_of<V, half_t>(call, sequence, memory);
}

}  // namespace
