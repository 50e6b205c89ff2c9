// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// encode_delta, encode_from and decode_delta for many pages. Arguments were checked by deltamem_vllm/ops/cold.py; what
// stands in a page was not.

#include "cold_codec.h"

#include <cstring>
#include <initializer_list>
#include <new>

#include "cold_source.h"
#include "isa.h"
#include "memory_stream.h"
#include "token_move.h"

namespace {

const ColdKernels& kernels() {
#if DELTAMEM_X86
  const int isa = deltamem_isa();
  if (isa == kAvx512Bf16) return kColdAvx512Bf16;
  if (isa == kAvx512) return kColdAvx512;
  if (isa == kAvx2) return kColdAvx2;
#endif
  return kColdPortable;
}

// Memory of a thread for as long as it works on pages; kept, for a page takes less time than asking for memory.
uint8_t* scratch(int64_t bytes) {
  struct Held {
    uint8_t* memory = nullptr;
    int64_t bytes = 0;
    ~Held() { ::operator delete(memory, std::align_val_t(64)); }
  };
  static thread_local Held held;
  if (held.bytes < bytes) {
    ::operator delete(held.memory, std::align_val_t(64));
    held.memory = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)));
    held.bytes = bytes;
  }
  return held.memory;
}

// Pages are given out one by one where they are few: threads should end at the same time.
bool worth_threads(int64_t pages) { return pages > 1; }

// Where the tokens of a page are written: in place, or in memory of the thread and from there, past the caches if they
// are `streamed`.
class TokensOut {
 public:
  TokensOut(uint8_t* memory, bool in_place, bool streamed) : memory_(in_place ? nullptr : memory), streamed_(streamed) {}
  uint8_t* of(uint8_t* to) const { return memory_ ? memory_ : to; }
  void write(uint8_t* to, int64_t bytes) const {
    if (!memory_) return;
    if (streamed_) copy_kernels().stream(memory_, bytes, to);
    else std::memcpy(to, memory_, bytes);
  }

 private:
  uint8_t* memory_;
  bool streamed_;
};

// How often a kernel asks for more of the next page, about: for every row of codes, for some rows whose range it looks
// for, and for some of the codes that are written channel by channel.
int64_t encode_turns(const ColdFormat& format, int64_t count, bool by_channel) {
  const int64_t rows = count + (by_channel ? format.dim : 0);
  return rows + rows / 4 + (by_channel ? 0 : (format.key_row() / 2 + count / 8) * format.dim / 32);
}
int64_t decode_turns(const ColdFormat& format, int64_t count) { return count + format.key_row() * format.dim / 64 + 1; }

}  // namespace

// keys, values [pages, C, D] contiguous, counts [pages] 1 to C -> page targets[p] (or p if null) of raw.
DELTAMEM_API void deltamem_encode_delta(int bits, int64_t dim, int64_t page_bytes, int dtype, int64_t pages,
                                        const uint8_t* keys, const uint8_t* values, const int64_t* counts,
                                        const int64_t* targets, uint8_t* raw, int64_t raw_stride) {
  const ColdFormat format{bits, dim, page_bytes};
  const ColdKernels& use = kernels();
  const int64_t capacity = format.capacity(), row = dim * itemsize(dtype), part = capacity * row;
  const auto page_of = [&](int64_t p) { return raw + (targets ? targets[p] : p) * raw_stride; };
#pragma omp parallel for schedule(static) if (worth_threads(pages))
  for (int64_t p = 0; p < pages; ++p) {
    Pieces pieces(scratch(scratch_bytes(format) + kLineBytes + 2 * Pieces::bytes<const uint8_t*>(capacity)));
    const uint8_t** key_rows = pieces.take<const uint8_t*>(capacity);
    const uint8_t** value_rows = pieces.take<const uint8_t*>(capacity);
    for (int64_t t = 0; t < counts[p]; ++t) {
      key_rows[t] = keys + p * part + t * row;
      value_rows[t] = values + p * part + t * row;
    }
    Ahead ahead;
    const uint8_t *next_keys = keys + (p + 1) * part, *next_values = values + (p + 1) * part;
    if (p + 1 < pages) {
      const int64_t lines = lines_of(counts[p + 1] * row);
      ahead = Ahead({&next_keys, 1, lines}, {&next_values, 1, lines}, page_of(p + 1), format.end(),
                    encode_turns(format, counts[p], false));
    }
    use.encode(format, dtype, {key_rows, value_rows, counts[p], false}, page_of(p), pieces.take<uint8_t>(0), ahead);
  }
}

// Page ids[p] (or p if null) of raw -> keys, values, counts [pages]. Keys and values are [pages, C, D] contiguous or, with
// `starts` [pages + 1], rows of tokens: those of page p from row starts[p] on, and none behind row starts[p + 1].
// `streamed`: what is written does not fit into the caches. (Encoding writes less than it reads, and gained nothing by
// it.)
DELTAMEM_API void deltamem_decode_delta(int bits, int64_t dim, int64_t page_bytes, int dtype, int64_t pages,
                                        const uint8_t* raw, int64_t raw_stride, const int64_t* ids, uint8_t* keys,
                                        uint8_t* values, int64_t* counts, const int64_t* starts, int streamed) {
  const ColdFormat format{bits, dim, page_bytes};
  const ColdKernels& use = kernels();
  const int64_t capacity = format.capacity(), row = dim * itemsize(dtype), part = capacity * row;
  const bool in_place = !starts && !streamed;
  const auto page_of = [&](int64_t p) { return raw + (ids ? ids[p] : p) * raw_stride; };
#pragma omp parallel if (worth_threads(pages))
  {
    Pieces pieces(scratch(2 * Pieces::bytes<uint8_t>(part) + scratch_bytes(format)));
    const TokensOut key_out(pieces.take<uint8_t>(part), in_place, streamed);
    const TokensOut value_out(pieces.take<uint8_t>(part), in_place, streamed);
    uint8_t* const rest = pieces.take<uint8_t>(0);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pages; ++p) {
      const uint8_t* page = page_of(p);
      int32_t count;
      std::memcpy(&count, page, sizeof(count));
      counts[p] = count < 0 ? 0 : count < capacity ? count : capacity;
      Ahead ahead;
      const uint8_t* next = nullptr;
      if (p + 1 < pages) {
        next = page_of(p + 1);
        ahead = Ahead({&next, 1, lines_of(format.end())}, {}, nullptr, 0, decode_turns(format, counts[p]));
      }
      const int64_t first = (starts ? starts[p] : p * capacity) * row, left = starts ? starts[p + 1] - starts[p] : 0;
      const int64_t bytes = !starts ? part : (counts[p] < left ? counts[p] : left) * row;
      use.decode(format, dtype, page, counts[p], key_out.of(keys + first), value_out.of(values + first), rest, ahead);
      key_out.write(keys + first, bytes);
      value_out.write(values + first, bytes);
    }
    finish_streaming();
  }
}

// Tokens (page[p, t], slot[p, t]), t < counts[p], of the pool -> page targets[p] of raw, which holds none of them.
DELTAMEM_API void deltamem_encode_from(int bits, int64_t dim, int64_t page_bytes, int dtype, int64_t pages,
                                       const uint8_t* pool, int64_t pool_stride, const int64_t* layout,
                                       const int64_t* page, const int64_t* slot, const int64_t* counts,
                                       const int64_t* targets, uint8_t* raw, int64_t raw_stride) {
  const ColdFormat format{bits, dim, page_bytes};
  const ColdKernels& use = kernels();
  const int64_t capacity = format.capacity(), size = itemsize(dtype);
  const PooledPart keys(size, dim, pool, pool_stride, key_layout(layout), use.gather_channels != nullptr);
  const PooledPart values(size, dim, pool, pool_stride, value_layout(layout), false);
  const bool by_channel = keys.way() == PooledPart::kChannels;
  const int64_t most_rows = capacity > dim ? capacity : dim, channel_row = round_up(capacity, 32);
  const int64_t key_bytes = dim * (by_channel ? channel_row : capacity) * size, value_bytes = dim * capacity * size;
  const int64_t row_bytes = Pieces::bytes<const uint8_t*>(most_rows);
  const int64_t needed = 6 * row_bytes + Pieces::bytes<uint8_t>(key_bytes) + Pieces::bytes<uint8_t>(value_bytes) +
                         scratch_bytes(format);
#pragma omp parallel if (worth_threads(pages))
  {
    // Of this page and the next one, in turn: where its tokens stand.
    struct Planned {
      const uint8_t **key_places, **value_places;
      Lines keys, values;
    } held[2];
    Pieces pieces(scratch(needed));
    for (Planned& one : held) {
      one.key_places = pieces.take<const uint8_t*>(most_rows);
      one.value_places = pieces.take<const uint8_t*>(most_rows);
    }
    const uint8_t** const key_rows = pieces.take<const uint8_t*>(most_rows);
    const uint8_t** const value_rows = pieces.take<const uint8_t*>(most_rows);
    uint8_t* const key_memory = pieces.take<uint8_t>(key_bytes);
    uint8_t* const value_memory = pieces.take<uint8_t>(value_bytes);
    uint8_t* const rest = pieces.take<uint8_t>(0);
    int64_t planned = -1;
    const auto plan = [&](int64_t p) {
      Planned& one = held[p % 2];
      const int64_t *own_page = page + p * capacity, *own_slot = slot + p * capacity;
      one.keys = keys.plan(own_page, own_slot, counts[p], one.key_places);
      one.values = values.plan(own_page, own_slot, counts[p], one.value_places);
      planned = p;
      if (p + 1 == pages) return;
      for (const int64_t* places : {own_page + capacity, own_slot + capacity}) {
        for (int64_t t = 0; t < capacity; t += kLine / int64_t(sizeof(*places))) {
          prefetch_line(reinterpret_cast<const uint8_t*>(places + t));
        }
      }
    };
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pages; ++p) {
      const int64_t count = counts[p], *own_page = page + p * capacity, *own_slot = slot + p * capacity;
      if (planned != p) plan(p);
      const Planned &one = held[p % 2], &next = held[(p + 1) % 2];
      Ahead ahead;
      if (p + 1 < pages) {
        plan(p + 1);
        ahead = Ahead(next.keys, next.values, raw + targets[p + 1] * raw_stride, format.end(),
                      encode_turns(format, count, by_channel));
      }
      const ColdTokens tokens{
          keys.read(use, own_page, own_slot, count, channel_row, one.key_places, key_rows, key_memory),
          values.read(use, own_page, own_slot, count, channel_row, one.value_places, value_rows, value_memory), count,
          by_channel};
      use.encode(format, dtype, tokens, raw + targets[p] * raw_stride, rest, ahead);
    }
  }
}
