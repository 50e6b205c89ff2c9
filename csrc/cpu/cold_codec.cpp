// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// encode_delta and decode_delta for many pages. Arguments were checked by deltamem_vllm/ops/cold.py; what stands in a
// page was not.

#include "cold_codec.h"

#include <cstring>
#include <new>

#include "isa.h"
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

}  // namespace

// keys, values [pages, C, D] contiguous, counts [pages] 1 to C -> page targets[p] (or p if null) of raw.
DELTAMEM_API void deltamem_encode_delta(int bits, int64_t dim, int64_t page_bytes, int dtype, int64_t pages,
                                        const uint8_t* keys, const uint8_t* values, const int64_t* counts,
                                        const int64_t* targets, uint8_t* raw, int64_t raw_stride) {
  const ColdFormat format{bits, dim, page_bytes};
  const ColdKernels& use = kernels();
  const int64_t part = format.capacity() * dim * itemsize(dtype);
#pragma omp parallel for schedule(static) if (worth_threads(pages))
  for (int64_t p = 0; p < pages; ++p) {
    uint8_t* page = raw + (targets ? targets[p] : p) * raw_stride;
    use.encode(format, dtype, keys + p * part, values + p * part, counts[p], page, scratch(scratch_bytes(format)));
  }
}

// Page ids[p] (or p if null) of raw -> keys, values [pages, C, D] contiguous, counts [pages].
DELTAMEM_API void deltamem_decode_delta(int bits, int64_t dim, int64_t page_bytes, int dtype, int64_t pages,
                                        const uint8_t* raw, int64_t raw_stride, const int64_t* ids, uint8_t* keys,
                                        uint8_t* values, int64_t* counts) {
  const ColdFormat format{bits, dim, page_bytes};
  const ColdKernels& use = kernels();
  const int64_t capacity = format.capacity(), part = capacity * dim * itemsize(dtype);
#pragma omp parallel for schedule(static) if (worth_threads(pages))
  for (int64_t p = 0; p < pages; ++p) {
    const uint8_t* page = raw + (ids ? ids[p] : p) * raw_stride;
    int32_t count;
    std::memcpy(&count, page, sizeof(count));
    counts[p] = count < 0 ? 0 : count < capacity ? count : capacity;
    use.decode(format, dtype, page, counts[p], keys + p * part, values + p * part, scratch(scratch_bytes(format)));
  }
}

// Tokens (page[p, t], slot[p, t]), t < counts[p], of the pool -> page targets[p] of raw, which holds none of them.
DELTAMEM_API void deltamem_encode_from(int bits, int64_t dim, int64_t page_bytes, int dtype, int64_t pages,
                                       const uint8_t* pool, int64_t pool_stride, const int64_t* layout,
                                       const int64_t* page, const int64_t* slot, const int64_t* counts,
                                       const int64_t* targets, uint8_t* raw, int64_t raw_stride) {
  const ColdFormat format{bits, dim, page_bytes};
  const ColdKernels& use = kernels();
  const int64_t capacity = format.capacity(), size = itemsize(dtype), part = round_up(capacity * dim * size, 64);
  const PartLayout key_part = key_layout(layout), value_part = value_layout(layout);
#pragma omp parallel for schedule(static) if (worth_threads(pages))
  for (int64_t p = 0; p < pages; ++p) {
    uint8_t* keys = scratch(2 * part + scratch_bytes(format));
    const int64_t *own_page = page + p * capacity, *own_slot = slot + p * capacity;
    gather_part(size, dim, pool, pool_stride, key_part, own_page, own_slot, counts[p], keys);
    gather_part(size, dim, pool, pool_stride, value_part, own_page, own_slot, counts[p], keys + part);
    use.encode(format, dtype, keys, keys + part, counts[p], raw + targets[p] * raw_stride, keys + 2 * part);
  }
}
