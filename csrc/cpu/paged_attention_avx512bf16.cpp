// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#if defined(__x86_64__)

// GCC 12 takes the undefined vectors inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

// Not among the flags of this file's suffix; paged_attention.cpp asks the processor for it.
#pragma GCC target("avx512vnni")

#include "paged_attention_bf16.h"
#include "paged_attention_loop.h"
#include "paged_attention_vnni.h"
#include "simd_avx512.h"

namespace {

struct Bf16Loops : Float32Loops<Avx512> {
  static constexpr bool kBf16Weights = true;

  template <class T>
  static void hot_scores(const AttentionCall& call, Scratch& s, const HotTile<T>& tile, int rows, const T* query) {
    if constexpr (std::is_same<T, bf16_t>::value) {
      bf16_hot_scores(call, s, tile, rows, query);
    } else {
      Float32Loops<Avx512>::hot_scores(call, s, tile, rows, query);
    }
  }

  template <class T>
  static void hot_values(const AttentionCall& call, Scratch& s, const HotTile<T>& tile, int rows) {
    if constexpr (std::is_same<T, bf16_t>::value) {
      bf16_hot_values(call, s, tile, rows);
    } else {
      Float32Loops<Avx512>::hot_values(call, s, tile, rows);
    }
  }

  // Who runs a model in float32 wants that accuracy of cold pages, too: integers are for the shorter types only.
  template <int Bits>
  static void cold_scores(const AttentionCall& call, Scratch& s, const ColdPage& page, int rows) {
    if (call.dtype == kFloat32) return Float32Loops<Avx512>::cold_scores<Bits>(call, s, page, rows);
    integer_cold_scores<Bits>(call, s, page, rows);
  }

  template <int Bits>
  static void cold_values(const AttentionCall& call, Scratch& s, const ColdPage& page, int rows) {
    if (call.dtype == kFloat32) return Float32Loops<Avx512>::cold_values<Bits>(call, s, page, rows);
    integer_cold_values<Bits>(call, s, page, rows);
  }
};

}  // namespace

AttentionKernels attention_avx512bf16() {
  return {scratch_bytes, attend_rows<Bf16Loops>, finish_rows<Avx512>};
}

#endif
