// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What the files that score tokens in pages share: the arguments of a call, and one instruction set's version.
#pragma once

#include <cstddef>
#include <cstdint>

#include "paged_attention_types.h"

// Hot pages of some sequences, in the order that ops/page_utility.py fills them in; all fields have eight bytes.
// Strides of the table are in entries, offsets in a page in elements.
struct SequencePages {
  const char* pool;
  int64_t num_pages;
  int64_t page_stride_bytes;
  const int32_t* block_table;  // [sequences, table_width]
  int64_t table_stride;
  int64_t table_width;
  const int32_t* seq_lens;  // [sequences]
  int64_t sequences;
  int64_t dim;
  int64_t block_size;
  int64_t key_base;
  int64_t key_slot;
  int64_t key_dim;
  int64_t value_base;
  int64_t value_slot;
  int64_t value_dim;
  int64_t dtype;
  float* scores;  // [sequences, score_stride], 0 where there is no token
  int64_t score_stride;
  // Tokens that stand before those in pages, one behind the other in rows of `dim`: first row of every sequence, and
  // behind the last [sequences + 1]; or null if there are none.
  const int64_t* older_start;
  const void* older_keys;
  const void* older_values;
};

enum WindowKind : int64_t { kDelta = 0, kMean = 1, kPooled = 2 };

// deltamem_page_utility and deltamem_window_attention.
struct WindowCall {
  SequencePages pages;
  const void* queries;  // [sequences, group, window, dim]
  float* sums;          // [sequences, table_width] or null
  int64_t group;
  int64_t window;
  int64_t kind;
  double scale;
};

enum FeatureKind : int64_t { kPredictor = 0, kDistinct = 1, kKeyDiff = 2 };

// deltamem_feature_scores.
struct FeatureCall {
  SequencePages pages;
  const float* weights;            // [sequences, features] of the predictor, or null
  const float* before_directions;  // [sequences, dim], what was seen before, or null
  const float* before_values;      //
  float* directions;               // [sequences, dim], written: what has been seen now; or null
  float* values;                   //
  int64_t before_count;            // tokens
  int64_t kind;
};

constexpr int64_t kMostDim = 256;

// One instruction set's version. Scratch memory is aligned to 64; its size goes with the tokens of a sequence.
struct UtilityKernels {
  size_t (*window_bytes)(const WindowCall& call, int64_t tokens);
  void (*window)(const WindowCall& call, int64_t sequence, char* scratch);
  size_t (*feature_bytes)(const FeatureCall& call);
  void (*features)(const FeatureCall& call, int64_t sequence, char* scratch);
};

UtilityKernels utility_portable();
UtilityKernels utility_avx2();
UtilityKernels utility_avx512();
