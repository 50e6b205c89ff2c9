// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// A thread's working memory, and what its steps hand to each other. Included by every instruction set's file only.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "paged_attention_types.h"
#include "simd_loops.h"

namespace {

constexpr int64_t kSpare = 64;  // vectors may write this many entries past a row's tokens

inline int64_t score_stride(const AttentionCall& call) {
  const int64_t tokens = call.capacity > kTileTokens ? call.capacity : kTileTokens;
  return (tokens + 63) / 64 * 64 + kSpare;
}

// [rows, ...] arrays have kMostRows rows. Scores become weights in place.
struct Scratch {
  int64_t stride;         // of rows of scores and weights
  float* query;           // [rows, dim], times scale and log2(e)
  float* sums;            // [rows * (dim + 2)], see partial_sums()
  float* scores;          // [rows, stride]
  bf16_t* weights;        // [rows, stride], the scores as bfloat16
  int8_t* high;           // [rows, max(stride, dim)], queries or weights as 256 * high + low
  int8_t* low;            //
  float* key_scale;       // [dim]
  float* key_zero;        // [dim]
  float* value_scale;     // [stride], 0 past the last token
  float* value_zero;      // [stride]
  float* factor;          // [rows], of the integers
  float* constant;        // [rows]
  char* keys;             // copies of pages that are not laid out as the loops need them
  char* values;           //
  size_t bytes;

  Scratch(const AttentionCall& call, char* memory) : stride(score_stride(call)) {
    const int64_t dim = call.dim, most = stride > dim ? stride : dim;
    size_t used = 0;
    auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
      used += (static_cast<size_t>(count) * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(query, kMostRows * dim);
    take(sums, kMostRows * (dim + 2));
    take(scores, kMostRows * stride);
    take(weights, kMostRows * stride);
    take(high, kMostRows * most);
    take(low, kMostRows * most);
    take(key_scale, dim + kSpare);
    take(key_zero, dim + kSpare);
    take(value_scale, stride);
    take(value_zero, stride);
    take(factor, kMostRows);
    take(constant, kMostRows);
    take(keys, kTileTokens * dim * 4);
    take(values, kTileTokens * dim * 4);
    bytes = used;
  }
};

inline size_t scratch_bytes(const AttentionCall& call) { return Scratch(call, nullptr).bytes; }

// Some hot pages, keys as [dim, slot] with slots side by side, values as [slot, dim] with dims side by side.
template <class T>
struct HotTile {
  int pages;
  int tokens;  // of all pages; only the last page may have less than block_size
  int64_t block_size;
  int64_t key_stride;    // from one dim to the next
  int64_t value_stride;  // from one token to the next
  const T* key[kMostTilePages];
  const T* value[kMostTilePages];
  const T* next_key[kMostTilePages];  // of the tile that follows, to be fetched early; any address will do
  const T* next_value[kMostTilePages];
  int on_page(int page) const {
    const int64_t left = tokens - page * block_size;
    return static_cast<int>(left < block_size ? left : block_size);
  }
};

struct ColdPage {
  const uint8_t* key_codes;    // [dim, capacity] packed
  const uint8_t* value_codes;  // [capacity, dim] packed
  const uint8_t* next;         // the page that follows, to be fetched early; any address will do
  int64_t key_row;             // bytes
  int64_t value_row;
  int64_t bytes;
  int tokens;
};

// Brings a line into the second level of cache. A whole tile ahead is too much for the first level, and fetching into
// it was measured to be half as fast.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
