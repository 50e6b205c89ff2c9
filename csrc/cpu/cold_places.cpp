// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Whether the places that encode_from is to read can be followed: one pass over them, where tensors would take many.

#include <cstdint>
#include <vector>

#include "isa.h"

// Tokens (page[p, t], slot[p, t]), t < counts[p] <= capacity; others are not looked at. Targets are pages of the pool.
// Returns -1 if a token is outside num_pages pages of `slots` slots, 1 if one stands in a page among `targets`, else 0.
DELTAMEM_API int deltamem_check_cold_places(int64_t pages, int64_t capacity, const int64_t* page, const int64_t* slot,
                                            const int64_t* counts, int64_t num_pages, int64_t slots,
                                            const int64_t* targets) {
  std::vector<uint8_t> written(num_pages);
  for (int64_t p = 0; p < pages; ++p) written[targets[p]] = 1;
  uint8_t among = 0;
  for (int64_t p = 0; p < pages; ++p) {
    const int64_t *own_page = page + p * capacity, *own_slot = slot + p * capacity, count = counts[p];
    uint64_t outside = 0;  // as numbers without a sign, negative ones are too large as well
    for (int64_t t = 0; t < count; ++t) {
      outside |= (uint64_t(own_page[t]) >= uint64_t(num_pages)) | (uint64_t(own_slot[t]) >= uint64_t(slots));
    }
    if (outside) return -1;
    for (int64_t t = 0; t < count; ++t) among |= written[own_page[t]];
  }
  return among;
}
