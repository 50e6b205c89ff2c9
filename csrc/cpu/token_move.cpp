// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// gather_pages: survivors of a compaction moved between pages. Arguments were checked by deltamem_vllm/ops/gather.py.

#include "token_move.h"

#include <cstring>

#include "isa.h"

namespace {

// Copies of a length that the compiler knows are a few instructions; others are a call.
template <int64_t Bytes>
void copy_rows(const uint8_t* const* from, int64_t count, uint8_t* to, int64_t to_step) {
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * to_step, from[k], Bytes);
}

constexpr int64_t kTogether = 32;

// Tokens whose elements lie side by side, from `from` to rows `to_step` bytes apart.
void copy_tokens(const uint8_t* const* from, int64_t count, uint8_t* to, int64_t to_step, int64_t bytes) {
  if (bytes == 128) return copy_rows<128>(from, count, to, to_step);
  if (bytes == 160) return copy_rows<160>(from, count, to, to_step);
  if (bytes == 192) return copy_rows<192>(from, count, to, to_step);
  if (bytes == 256) return copy_rows<256>(from, count, to, to_step);
  if (bytes == 512) return copy_rows<512>(from, count, to, to_step);
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * to_step, from[k], bytes);
}

// Elements `from_dim` apart to elements `to_dim` apart; the tokens' inner loop, so that lines of a page are reused.
template <class E>
void copy_elements(const uint8_t* const* from, int64_t count, int64_t dim, int64_t from_dim, uint8_t* to,
                   int64_t to_step, int64_t to_dim) {
  for (int64_t k = 0; k < count; ++k) {
    const E* in = reinterpret_cast<const E*>(from[k]);
    E* out = reinterpret_cast<E*>(to + k * to_step);
    for (int64_t d = 0; d < dim; ++d) out[d * to_dim] = in[d * from_dim];
  }
}

void copy_strided(int64_t size, const uint8_t* const* from, int64_t count, int64_t dim, int64_t from_dim, uint8_t* to,
                  int64_t to_step, int64_t to_dim) {
  if (from_dim == 1 && to_dim == 1) return copy_tokens(from, count, to, to_step, dim * size);
  if (size == 1) copy_elements<uint8_t>(from, count, dim, from_dim, to, to_step, to_dim);
  else if (size == 2) copy_elements<uint16_t>(from, count, dim, from_dim, to, to_step, to_dim);
  else copy_elements<uint32_t>(from, count, dim, from_dim, to, to_step, to_dim);
}

void fill_part(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part,
               const int64_t* page, const int64_t* slot, uint8_t* target) {
  const int64_t slots = part.slots;
#if DELTAMEM_X86
  if (size == 2 && part.per_slot == 1 && deltamem_isa() >= kAvx512 &&
      fill_transposed_avx512(dim, pool, stride, part, slots, page, slot, target)) {
    return;
  }
#endif
  for (int64_t first = 0; first < slots; first += kTogether) {
    const int64_t n = slots - first < kTogether ? slots - first : kTogether;
    const uint8_t* from[kTogether];
    for (int64_t k = 0; k < n; ++k) {
      from[k] = pool + page[first + k] * stride + (part.base + slot[first + k] * part.per_slot) * size;
    }
    uint8_t* to = target + (part.base + first * part.per_slot) * size;
    copy_strided(size, from, n, dim, part.per_dim, to, part.per_slot * size, part.per_dim);
  }
}

#if DELTAMEM_X86
// With fewer tokens of 16 neighbouring slots, taking them out one by one is no slower than transposing all.
constexpr int64_t kWorthTransposing = 3;

// Keys whose elements do not lie side by side, read as tiles where tokens stand close to each other.
void gather_tiles(int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part, const int64_t* page,
                  const int64_t* slot, int64_t count, uint8_t* to) {
  constexpr int64_t kLanes = 16;
  for (int64_t first = 0; first < count;) {
    const int64_t tile = slot[first] / kLanes;
    uint8_t lanes[kLanes];
    const uint8_t* from[kLanes];
    int64_t n = 0;
    for (; n < kLanes && first + n < count; ++n) {
      if (page[first + n] != page[first] || slot[first + n] / kLanes != tile) break;
      lanes[n] = uint8_t(slot[first + n] % kLanes);
      from[n] = pool + page[first] * stride + 2 * (part.base + slot[first + n]);
    }
    uint8_t* rows = to + 2 * first * dim;
    if (n < kWorthTransposing) copy_elements<uint16_t>(from, n, dim, part.per_dim, rows, 2 * dim, 1);
    else gather_transposed_avx2(dim, from[0] - 2 * lanes[0], part.per_dim, lanes, n, rows);
    first += n;
  }
}
#endif

}  // namespace

void gather_part(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part,
                 const int64_t* page, const int64_t* slot, int64_t count, uint8_t* to) {
#if DELTAMEM_X86
  if (size == 2 && part.per_slot == 1 && part.slots % 16 == 0 && dim % 16 == 0 && deltamem_isa() >= kAvx2) {
    return gather_tiles(dim, pool, stride, part, page, slot, count, to);
  }
#endif
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t n = count - first < kTogether ? count - first : kTogether;
    const uint8_t* from[kTogether];
    for (int64_t k = 0; k < n; ++k) {
      from[k] = pool + page[first + k] * stride + (part.base + slot[first + k] * part.per_slot) * size;
    }
    copy_strided(size, from, n, dim, part.per_dim, to + first * dim * size, dim * size, 1);
  }
}

// Tokens (page[k], slot[k]) of the pool -> keys, values [count, dim]. layout: token_move.h.
DELTAMEM_API void deltamem_gather_tokens(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride,
                                         const int64_t* layout, const int64_t* page, const int64_t* slot,
                                         int64_t count, uint8_t* keys, uint8_t* values) {
  const PartLayout key_part = key_layout(layout), value_part = value_layout(layout);
  constexpr int64_t kStep = 256;
#pragma omp parallel for schedule(static) if (count > kStep)
  for (int64_t first = 0; first < count; first += kStep) {
    const int64_t n = count - first < kStep ? count - first : kStep, at = first * dim * size;
    gather_part(size, dim, pool, stride, key_part, page + first, slot + first, n, keys + at);
    gather_part(size, dim, pool, stride, value_part, page + first, slot + first, n, values + at);
  }
}

// Tokens (page[p, s], slot[p, s]) of the pool -> slot s of page targets[p] (or p if null) of `to`. No source is among
// the targets: pages are written in any order.
DELTAMEM_API void deltamem_gather_pages(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride,
                                        const int64_t* layout, const int64_t* page, const int64_t* slot,
                                        const int64_t* targets, int64_t pages, uint8_t* to, int64_t to_stride) {
  const PartLayout key_part = key_layout(layout), value_part = value_layout(layout);
  const int64_t slots = key_part.slots;
#pragma omp parallel for schedule(static) if (pages > 1)
  for (int64_t p = 0; p < pages; ++p) {
    const int64_t *own_page = page + p * slots, *own_slot = slot + p * slots;
    uint8_t* target = to + (targets ? targets[p] : p) * to_stride;
    fill_part(size, dim, pool, stride, key_part, own_page, own_slot, target);
    fill_part(size, dim, pool, stride, value_part, own_page, own_slot, target);
  }
}
