// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What the files of paged attention share: the call's arguments and one piece of its work.
#pragma once

#include <cstddef>
#include <cstdint>

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

enum : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // DTYPE_CODES of ops/native.py

// The arguments of deltamem_paged_attention, in the order that ops/paged_attention.py fills them in. All fields have
// eight bytes. Strides of tables are in entries, offsets in a page in elements, unless a name says bytes.
struct AttentionCall {
  const void* query;  // [tokens, group, dim]
  void* output;       // [tokens, group, dim]
  float* lse;         // [tokens, group] or null
  const char* pool;
  int64_t num_pages;
  int64_t page_stride_bytes;
  const int32_t* block_table;  // [sequences, block_table_width]
  int64_t block_table_stride;
  int64_t block_table_width;
  const int32_t* seq_lens;         // [sequences]
  const int32_t* query_start_loc;  // [sequences + 1]
  const int32_t* cold_table;       // [sequences, cold_table_width] or null
  int64_t cold_table_stride;
  int64_t cold_table_width;
  const int32_t* cold_pages;  // [sequences] or null
  int64_t sequences;
  int64_t tokens;
  int64_t group;
  int64_t dim;
  int64_t block_size;
  int64_t key_base;
  int64_t key_slot;
  int64_t key_dim;
  int64_t value_base;
  int64_t value_slot;
  int64_t value_dim;
  int64_t bits;      // of cold codes; 0: there are no cold pages
  int64_t capacity;  // most tokens of a cold page
  int64_t dtype;
  double scale;
  int64_t isa;      // -1: the best one; otherwise the highest to use
  int64_t threads;  // 0: as OpenMP is set
};

// Up to kMostRows rows of one sequence (queries * group, neighbours in memory) against part of its pages.
constexpr int kMostRows = 32;
constexpr int kTileTokens = 128;  // hot tokens between two updates of the softmax: as large as the largest block
constexpr int kMostTilePages = kTileTokens / 16;

struct AttentionWork {
  int64_t sequence;
  int64_t first_row;   // in query and output, of [tokens * group]
  int32_t rows;
  int32_t first_limit;  // hot tokens that the first query sees; every further one sees one more
  int32_t cold_begin, cold_end;  // of the sequence's cold pages
  int32_t hot_begin, hot_end;    // of its hot pages
  float* partial;  // null: write the result; otherwise rows * (dim + 2) floats, see partial_sums()
};

struct PartialSums {
  float* sums;     // [rows, dim], softmax weights times values, not divided yet
  float* highest;  // [rows], largest score, in powers of two
  float* total;    // [rows], sum of the weights
};

inline PartialSums partial_sums(float* memory, int64_t rows, int64_t dim) {
  return {memory, memory + rows * dim, memory + rows * (dim + 1)};
}

// One instruction set's version. `scratch` has scratch_bytes() bytes, aligned to 64.
struct AttentionKernels {
  size_t (*scratch_bytes)(const AttentionCall& call);
  void (*attend)(const AttentionCall& call, const AttentionWork& work, char* scratch);
  void (*finish)(const AttentionCall& call, int64_t first_row, int64_t rows, const PartialSums& sums);
};

AttentionKernels attention_portable();
AttentionKernels attention_avx2();
AttentionKernels attention_avx512();
AttentionKernels attention_avx512bf16();
