// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Attention of some rows to some pages with a running softmax, the same for all instruction sets: `Loops` does the
// work on a page (paged_attention_float.h, paged_attention_bf16.h).
#pragma once

#include <cmath>
#include <cstring>

#include "paged_attention_float.h"

namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

inline int64_t element_bytes(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Scores of the first `visible` tokens of one row become weights, those of the others up to `tokens` 0; what the row
// has summed up so far is scaled to the new highest score.
template <class V, bool Bf16>
inline void weigh(Scratch& s, const PartialSums& state, int row, int visible, int tokens, int64_t dim) {
  using F = typename V::F;
  float* scores = s.scores + row * s.stride;
  bf16_t* rounded = s.weights + row * s.stride;
  const int end = (tokens + 63) / 64 * 64;
  for (int t = visible; t < end; ++t) scores[t] = -INFINITY;
  F high = V::set(-INFINITY);
  for (int t = 0; t < visible; t += V::W) high = V::max(V::load(scores + t), high);
  const float before = state.highest[row], here = V::highest(high);
  const float highest = here > before ? here : before;
  if (highest == -INFINITY) {  // nothing visible yet; or NaN only (max skips them), which the output must show
    for (int t = 0; t < visible; ++t) state.total[row] += scores[t] != scores[t] ? scores[t] : 0.0f;
    std::memset(scores, 0, static_cast<size_t>(end) * sizeof(float));
    if (Bf16) std::memset(rounded, 0, static_cast<size_t>(end) * sizeof(bf16_t));
    return;
  }
  const F shift = V::set(highest);
  F total = V::zero();
  for (int t = 0; t < end; t += V::W) {
    F weight = exp2<V>(V::sub(V::load(scores + t), shift));
    if constexpr (Bf16) {
      V::store(rounded + t, weight);
      weight = V::load(rounded + t);  // the sum is of what the values are multiplied with
    } else {
      V::store(scores + t, weight);
    }
    total = V::add(total, weight);
  }
  if (highest != before) {
    const float fade = std::exp2(before - highest);
    float* sums = state.sums + row * dim;
    for (int64_t d = 0; d < dim; d += V::W) V::store(sums + d, V::mul(V::load(sums + d), V::set(fade)));
    state.total[row] *= fade;
    state.highest[row] = highest;
  }
  state.total[row] += V::sum(total);
}

// Copies `tokens` slots, `dim` elements each, from any affine layout into one that the loops can read.
template <class T>
inline void copy_part(const T* from, int64_t slot, int64_t dim_step, T* to, int64_t to_slot, int64_t to_dim,
                      int64_t tokens, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t t = 0; t < tokens; ++t) to[t * to_slot + d * to_dim] = from[t * slot + d * dim_step];
  }
}

template <class Loops, class T>
struct Attend {
  using V = typename Loops::V;
  const AttentionCall& call;
  const AttentionWork& work;
  Scratch& s;
  PartialSums state;

  const char* page(const int32_t* table, int64_t index) const {
    return call.pool + table[index] * call.page_stride_bytes;
  }

  void cold() {
    if (work.cold_begin == work.cold_end) return;
    const int32_t* table = call.cold_table + work.sequence * call.cold_table_stride;
    for (int index = work.cold_begin; index < work.cold_end; ++index) {
      const char* raw = page(table, index);
      int32_t count;
      std::memcpy(&count, raw, sizeof(count));
      if (count <= 0) continue;
      const int64_t dim = call.dim, capacity = call.capacity;
      const auto* parameters = reinterpret_cast<const half_t*>(raw + 16);
      ColdPage cold;
      cold.tokens = static_cast<int>(count < capacity ? count : capacity);
      cold.key_row = capacity * call.bits / 8;
      cold.value_row = dim * call.bits / 8;
      cold.key_codes = reinterpret_cast<const uint8_t*>(parameters + 2 * dim + 2 * capacity);
      cold.value_codes = cold.key_codes + dim * cold.key_row;
      cold.bytes = 16 + 4 * dim + 4 * capacity + dim * cold.key_row + capacity * cold.value_row;
      cold.next = reinterpret_cast<const uint8_t*>(index + 1 < work.cold_end ? page(table, index + 1) : raw);
      for (int64_t d = 0; d < dim; d += V::W) {
        V::store(s.key_scale + d, V::load(parameters + d));
        V::store(s.key_zero + d, V::load(parameters + dim + d));
      }
      unpack(parameters + 2 * dim, s.value_scale, cold.tokens);
      unpack(parameters + 2 * dim + capacity, s.value_zero, cold.tokens);
      if (call.bits == 8) cold_page<8>(cold);
      if (call.bits == 4) cold_page<4>(cold);
      if (call.bits == 2) cold_page<2>(cold);
    }
  }

  // Zeros past the last token, up to where vectors read: what stands there could be NaN, and NaN * 0 is NaN.
  void unpack(const half_t* from, float* to, int tokens) {
    for (int t = 0; t < (tokens + 63) / 64 * 64; t += V::W) {
      const int left = tokens - t;
      V::store(to + t, left >= V::W ? V::load(from + t) : left > 0 ? V::load_part(from + t, left) : V::zero());
    }
  }

  template <int Bits>
  void cold_page(const ColdPage& cold) {
    Loops::template cold_scores<Bits>(call, s, cold, work.rows);
    for (int row = 0; row < work.rows; ++row) weigh<V, false>(s, state, row, cold.tokens, cold.tokens, call.dim);
    Loops::template cold_values<Bits>(call, s, cold, work.rows);
  }

  void hot() {
    if (work.hot_begin == work.hot_end) return;
    const int32_t* table = call.block_table + work.sequence * call.block_table_stride;
    const T* query = static_cast<const T*>(call.query) + work.first_row * call.dim;
    const int per_tile = static_cast<int>(kTileTokens / call.block_size);
    const int last_limit = work.first_limit + static_cast<int>((work.rows - 1) / call.group);
    const bool plain_keys = call.key_slot == 1, plain_values = call.value_dim == 1;
    HotTile<T> tile;
    tile.block_size = call.block_size;
    tile.key_stride = plain_keys ? call.key_dim : call.block_size;
    tile.value_stride = plain_values ? call.value_slot : call.dim;
    for (int first = work.hot_begin; first < work.hot_end; first += per_tile) {
      const int left = work.hot_end - first;
      const int start = first * static_cast<int>(call.block_size);
      tile.pages = left < per_tile ? left : per_tile;
      const int most = tile.pages * static_cast<int>(call.block_size);
      tile.tokens = last_limit - start < most ? last_limit - start : most;
      for (int i = 0; i < tile.pages; ++i) {
        const int ahead = first + i + per_tile;
        const T* elements = reinterpret_cast<const T*>(page(table, first + i));
        tile.key[i] = plain_keys ? elements + call.key_base : copied_keys(elements, i, tile);
        tile.value[i] = plain_values ? elements + call.value_base : copied_values(elements, i, tile);
        tile.next_key[i] = reinterpret_cast<const T*>(page(table, ahead < work.hot_end ? ahead : first + i));
        tile.next_value[i] = tile.next_key[i] + call.value_base;
        tile.next_key[i] += call.key_base;
      }
      Loops::hot_scores(call, s, tile, work.rows, query);
      for (int row = 0; row < work.rows; ++row) {
        const int limit = work.first_limit + static_cast<int>(row / call.group) - start;
        const int visible = limit < 0 ? 0 : limit < tile.tokens ? limit : tile.tokens;
        weigh<V, Loops::kBf16Weights && std::is_same<T, bf16_t>::value>(s, state, row, visible,
                                                                                         tile.tokens, call.dim);
      }
      Loops::hot_values(call, s, tile, work.rows);
    }
  }

  const T* copied_keys(const T* elements, int i, const HotTile<T>& tile) {
    T* to = reinterpret_cast<T*>(s.keys) + i * call.block_size * call.dim;
    copy_part(elements + call.key_base, call.key_slot, call.key_dim, to, 1, call.block_size, tile.on_page(i), call.dim);
    return to;
  }

  const T* copied_values(const T* elements, int i, const HotTile<T>& tile) {
    T* to = reinterpret_cast<T*>(s.values) + i * call.block_size * call.dim;
    copy_part(elements + call.value_base, call.value_slot, call.value_dim, to, call.dim, 1, tile.on_page(i), call.dim);
    return to;
  }
};

template <class V, class T>
inline void finish_as(const AttentionCall& call, int64_t first_row, int64_t rows, const PartialSums& state) {
  T* output = static_cast<T*>(call.output) + first_row * call.dim;
  for (int64_t row = 0; row < rows; ++row) {
    const float total = state.total[row];
    const auto share = V::set(total == 0.0f ? 0.0f : 1.0f / total);  // nothing to read: zeros
    for (int64_t d = 0; d < call.dim; d += V::W) {
      V::store(output + row * call.dim + d, V::mul(V::load(state.sums + row * call.dim + d), share));
    }
    if (call.lse != nullptr) {
      call.lse[first_row + row] = total == 0.0f ? -INFINITY : (state.highest[row] + std::log2(total)) * kLn2;
    }
  }
}

template <class V>
void finish_rows(const AttentionCall& call, int64_t first_row, int64_t rows, const PartialSums& state) {
  if (call.dtype == kFloat32) finish_as<V, float>(call, first_row, rows, state);
  if (call.dtype == kFloat16) finish_as<V, half_t>(call, first_row, rows, state);
  if (call.dtype == kBfloat16) finish_as<V, bf16_t>(call, first_row, rows, state);
}

template <class Loops, class T>
inline void attend_as(const AttentionCall& call, const AttentionWork& work, char* memory) {
  using V = typename Loops::V;
  Scratch s(call, memory);
  const int64_t count = work.rows * call.dim;
  const T* query = static_cast<const T*>(call.query) + work.first_row * call.dim;
  const auto scale = V::set(static_cast<float>(call.scale) * kLog2E);
  for (int64_t i = 0; i < count; i += V::W) V::store(s.query + i, V::mul(V::load(query + i), scale));
  const PartialSums state = partial_sums(work.partial != nullptr ? work.partial : s.sums, work.rows, call.dim);
  s.sums = state.sums;
  std::memset(state.sums, 0, static_cast<size_t>(count) * sizeof(float));
  for (int row = 0; row < work.rows; ++row) state.highest[row] = -INFINITY, state.total[row] = 0.0f;
  Attend<Loops, T> attend{call, work, s, state};
  attend.cold();
  attend.hot();
  if (work.partial == nullptr) finish_as<V, T>(call, work.first_row, work.rows, state);
}

template <class Loops>
void attend_rows(const AttentionCall& call, const AttentionWork& work, char* scratch) {
  if (call.dtype == kFloat32) attend_as<Loops, float>(call, work, scratch);
  if (call.dtype == kFloat16) attend_as<Loops, half_t>(call, work, scratch);
  if (call.dtype == kBfloat16) attend_as<Loops, bf16_t>(call, work, scratch);
}

}  // namespace
