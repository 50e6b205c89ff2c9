// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Tokens taken out of pages of the pool, or put from page to page. Pages have an affine layout: element d of the key
// (value) in a slot stands at base + slot * per_slot + d * per_dim, counted in elements from the page's start. Keys and
// values of its slots are all that a page holds.

#pragma once

#include <cstdint>

#include "isa.h"

struct PartLayout {
  int64_t base, per_slot, per_dim, slots;
};

class TokensAhead;

// Of what Python hands over: base, per_slot and per_dim of keys, the same of values, slots of a page.
inline PartLayout key_layout(const int64_t* layout) { return {layout[0], layout[1], layout[2], layout[6]}; }
inline PartLayout value_layout(const int64_t* layout) { return {layout[3], layout[4], layout[5], layout[6]}; }

// Keys (or values) of `count` tokens -> [count, dim] contiguous. `size`: bytes of an element, 1, 2 or 4. `stride`:
// bytes from a page to the next.
void gather_part(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part,
                 const int64_t* page, const int64_t* slot, int64_t count, uint8_t* to);

// Keys (or values) in all slots of the page `to`: token k from slot[k] of the page that begins at page[k]. Asks for
// more of what comes next about every kTogether tokens.
constexpr int64_t kTogether = 32;
void fill_part(int64_t size, int64_t dim, const PartLayout& part, const uint8_t* const* page, const int64_t* slot,
               uint8_t* to, TokensAhead& ahead);

// Copies of one instruction set.
struct CopyKernels {
  // `bytes` from each of from[0 ... count - 1] to places `to_step` apart.
  void (*rows)(const uint8_t* const* from, int64_t count, uint8_t* to, int64_t to_step, int64_t bytes);
  // Whole lines past the caches: an ordinary store first reads the line that it is about to replace. What is left at
  // the end, and memory that begins inside a line, is copied as usual. finish_streaming() has to follow.
  void (*stream)(const uint8_t* from, int64_t bytes, uint8_t* to);
};
extern const CopyKernels kCopyPortable, kCopyAvx2, kCopyAvx512;
const CopyKernels& copy_kernels();

// Where the elements of a channel stand side by side ("transposed"): fill_part, channel by channel. Two bytes an
// element. False if this shape has no fast version here.
bool fill_transposed_avx512(int64_t dim, const PartLayout& part, const uint8_t* const* page, const int64_t* slot,
                            uint8_t* to, TokensAhead& ahead);

// Some of up to 16 neighbouring slots of one page, keys as above -> rows of `dim` elements, one after the other.
// `from` is the first of these slots, lanes[k] the place among them of row k's token; dim is a multiple of 16.
void gather_transposed_avx2(int64_t dim, const uint8_t* from, int64_t per_dim, const uint8_t* lanes, int64_t count,
                            uint8_t* to);
