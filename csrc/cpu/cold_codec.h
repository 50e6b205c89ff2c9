// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// One cold page written or read. Every instruction set has its own versions of these, which give the same bytes.

#pragma once

#include <cstddef>
#include <cstdint>

#include "cold_format.h"

struct ColdKernels {
  // Write a page with the first `count` tokens (1 to C) of keys and values, [>= count, D] of kind `dtype`.
  // `scratch` has scratch_bytes(format).
  void (*encode)(const ColdFormat& format, int dtype, const void* keys, const void* values, int64_t count,
                 uint8_t* page, uint8_t* scratch);
  // Read a page into keys and values, [C, D] of kind `dtype`; zeros from token `count` (0 to C) on.
  void (*decode)(const ColdFormat& format, int dtype, const uint8_t* page, int64_t count, void* keys, void* values,
                 uint8_t* scratch);
};

extern const ColdKernels kColdPortable, kColdAvx2, kColdAvx512, kColdAvx512Bf16;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What a thread needs beside the page: key codes token by token, and a float for every channel, four times over.
inline int64_t scratch_bytes(const ColdFormat& format) {
  return 2 * round_up(format.dim, 16) * round_up(format.key_row(), 16) + 4 * 4 * round_up(format.dim, 16) + 64;
}
