// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// One cold page written or read. Every instruction set has its own versions of these, which give the same bytes.

#pragma once

#include <cstddef>
#include <cstdint>

#include "cold_ahead.h"
#include "cold_format.h"
#include "token_move.h"

// Where the tokens of a page that is to be written stand. Nothing but their elements is read.
struct ColdTokens {
  const uint8_t* const* keys;    // [count] tokens of D elements or, by channel, [D] channels of `count` elements
  const uint8_t* const* values;  // [count] tokens of D elements
  int64_t count;                 // 1 to C
  bool by_channel;
};

struct ColdKernels {
  // Write a page with tokens of kind `dtype`. `scratch` has scratch_bytes(format).
  void (*encode)(const ColdFormat& format, int dtype, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch,
                 Ahead& ahead);
  // Read a page into keys and values, [C, D] of kind `dtype`; zeros from token `count` (0 to C) on.
  void (*decode)(const ColdFormat& format, int dtype, const uint8_t* page, int64_t count, void* keys, void* values,
                 uint8_t* scratch, Ahead& ahead);
  // Null, and then encode() wants tokens, or: keys of two bytes out of pages that hold them channel by channel, a
  // multiple of 16 slots each, into channels `to_row` elements apart, a multiple of 32. What is left of these
  // is written, too.
  void (*gather_channels)(int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part,
                          const int64_t* page, const int64_t* slot, int64_t count, uint16_t* to, int64_t to_row);
};

extern const ColdKernels kColdPortable, kColdAvx2, kColdAvx512, kColdAvx512Bf16;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What a thread needs beside the page: key codes token by token, and some floats for every channel. From a multiple of
// 64 on.
inline int64_t scratch_bytes(const ColdFormat& format) {
  return 2 * round_up(format.dim, 32) * round_up(format.key_row(), 16) + 6 * 4 * round_up(format.dim, 32);
}
