// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Tokens taken out of pages of the pool, or put from page to page. Pages have an affine layout: element d of the key
// (value) in a slot stands at base + slot * per_slot + d * per_dim, counted in elements from the page's start.

#pragma once

#include <cstdint>

struct PartLayout {
  int64_t base, per_slot, per_dim;
};

inline PartLayout part_layout(const int64_t* three) { return {three[0], three[1], three[2]}; }

// Keys (or values) of `count` tokens -> [count, dim] contiguous. `size`: bytes of an element, 1, 2 or 4. `stride`: bytes
// from a page to the next.
void gather_part(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part,
                 const int64_t* page, const int64_t* slot, int64_t count, uint8_t* to);

// Where the elements of a channel stand side by side ("transposed"): fill the slots of one page with tokens of others,
// channel by channel. Two bytes an element. False if this shape has no fast version here.
bool fill_transposed_avx512(int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part, int64_t slots,
                            const int64_t* page, const int64_t* slot, uint8_t* target);
