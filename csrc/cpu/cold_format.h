// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Where everything stands in a cold page: deltamem_vllm/codec/cold_page.py says what and why.

#pragma once

#include <cstdint>

constexpr int64_t kColdHeaderBytes = 16;

struct ColdFormat {
  int64_t bits, dim, page_bytes;  // of an element; D; of a page
  int64_t tokens;                 // C; kept, for dividing takes long

  ColdFormat(int64_t bits, int64_t dim, int64_t page_bytes)
      : bits(bits),
        dim(dim),
        page_bytes(page_bytes),
        tokens((page_bytes - kColdHeaderBytes - 4 * dim) / (4 + 2 * dim * bits / 8) / 4 * 4) {}

  int64_t capacity() const { return tokens; }  // C, a multiple of 4; Python has checked that it is at least 4
  int64_t key_scale() const { return kColdHeaderBytes; }
  int64_t key_zero() const { return key_scale() + 2 * dim; }
  int64_t value_scale() const { return key_zero() + 2 * dim; }
  int64_t value_zero() const { return value_scale() + 2 * capacity(); }
  int64_t key_codes() const { return value_zero() + 2 * capacity(); }
  int64_t key_row() const { return capacity() * bits / 8; }  // bytes of one channel
  int64_t value_codes() const { return key_codes() + dim * key_row(); }
  int64_t value_row() const { return dim * bits / 8; }  // bytes of one token
  int64_t end() const { return value_codes() + capacity() * value_row(); }  // the rest of the page is unused
};

// Kinds of floating point numbers, as in deltamem_vllm/ops/native.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t itemsize(int dtype) { return dtype == kFloat32 ? 4 : 2; }
