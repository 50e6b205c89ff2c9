// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Tokens of pages, as rows and into other pages. Arguments were checked by deltamem_vllm/ops/gather.py.

#include "token_move.h"

#include <cstring>

#include "isa.h"
#include "memory_stream.h"
#include "thread_share.h"
#include "token_ahead.h"

#if DELTAMEM_X86
#include <emmintrin.h>
#define DELTAMEM_STREAM_LINE(from, to)                                             \
  for (int i = 0; i < 4; ++i) {                                                    \
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i,                           \
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i)); \
  }
#endif
#include "token_rows.inl"

const CopyKernels kCopyPortable = {rows, stream};

const CopyKernels& copy_kernels() {
#if DELTAMEM_X86
  if (deltamem_isa() >= kAvx512) return kCopyAvx512;
  if (deltamem_isa() >= kAvx2) return kCopyAvx2;
#endif
  return kCopyPortable;
}

namespace {

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
  if (from_dim == 1 && to_dim == 1) return copy_kernels().rows(from, count, to, to_step, dim * size);
  if (size == 1) copy_elements<uint8_t>(from, count, dim, from_dim, to, to_step, to_dim);
  else if (size == 2) copy_elements<uint16_t>(from, count, dim, from_dim, to, to_step, to_dim);
  else copy_elements<uint32_t>(from, count, dim, from_dim, to, to_step, to_dim);
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

void fill_part(int64_t size, int64_t dim, const PartLayout& part, const uint8_t* const* page, const int64_t* slot,
               uint8_t* to, TokensAhead& ahead) {
#if DELTAMEM_X86
  if (size == 2 && part.per_slot == 1 && deltamem_isa() >= kAvx512 &&
      fill_transposed_avx512(dim, part, page, slot, to, ahead)) {
    return;
  }
#endif
  for (int64_t first = 0; first < part.slots; first += kTogether) {
    const int64_t n = part.slots - first < kTogether ? part.slots - first : kTogether;
    const uint8_t* from[kTogether];
    for (int64_t k = 0; k < n; ++k) from[k] = page[first + k] + (part.base + slot[first + k] * part.per_slot) * size;
    uint8_t* rows = to + (part.base + first * part.per_slot) * size;
    copy_strided(size, from, n, dim, part.per_dim, rows, part.per_slot * size, part.per_dim);
    ahead.more();
  }
}

// Tokens (page[k], slot[k]) of the pool -> keys, values [count, dim]. layout: token_move.h. `streamed`: what is written
// does not fit into the caches.
DELTAMEM_API void deltamem_gather_tokens(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride,
                                         const int64_t* layout, const int64_t* page, const int64_t* slot,
                                         int64_t count, uint8_t* keys, uint8_t* values, int streamed) {
  const PartLayout parts[] = {key_layout(layout), value_layout(layout)};
  uint8_t* const rows[] = {keys, values};
  const int64_t row = dim * size;
  constexpr int64_t kStep = 4 * kTogether;
#pragma omp parallel if (count > kStep)
  {
    const LineBuffer buffer(kStep * row);
    TokensAhead ahead(size, dim, parts[0], parts[1]);
    const uint8_t* pages[2][kStep];
    const auto plan = [&](int64_t first, int64_t end, int turn, int64_t calls) {
      const int64_t n = end - first < kStep ? end - first : kStep;
      for (int64_t k = 0; k < n; ++k) pages[turn][k] = pool + page[first + k] * stride;
      ahead.plan(pages[turn], slot + first, n, calls);
    };
    const Share own = share_of_thread(0, count, kStep);
    int turn = 0;
    plan(own.first, own.end, turn, 1);
    ahead.more();
    for (int64_t first = own.first; first < own.end; first += kStep, turn = 1 - turn) {
      const int64_t n = own.end - first < kStep ? own.end - first : kStep;
      plan(first + n, own.end, 1 - turn, 2 * kStep / kTogether);
      for (int i = 0; i < 2; ++i) {
        uint8_t* to = rows[i] + first * row;
        uint8_t* out = streamed ? buffer.data() : to;
        for (int64_t k = 0; k < n; k += kTogether) {
          ahead.more();
          gather_part(size, dim, pool, stride, parts[i], page + first + k, slot + first + k,
                      n - k < kTogether ? n - k : kTogether, out + k * row);
        }
        if (streamed) copy_kernels().stream(out, n * row, to);
      }
    }
    finish_streaming();
  }
}
