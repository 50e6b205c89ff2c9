// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include <immintrin.h>

#include <cstring>

#include "memory_stream.h"
#include "token_ahead.h"
#include "token_move.h"

#define DELTAMEM_STREAM_LINE(from, to) \
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from))
#include "token_rows.inl"

const CopyKernels kCopyAvx512 = {rows, stream};

namespace {

// `Lanes` neighbouring slots that take some of their tokens from one row of `Lanes` slots of a source page.
struct Run {
  const uint8_t* from;
  __mmask32 lanes;
  uint16_t source[32];
};

struct Wide {
  static constexpr int64_t kLanes = 32;
  using V = __m512i;
  static V load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(void* to, V v) { _mm512_storeu_si512(to, v); }
  static V pick(V kept, __mmask32 lanes, V source, V row) {
    return _mm512_mask_permutexvar_epi16(kept, lanes, source, row);
  }
};

// _mm256_mask_permutexvar_epi16 fills the lanes that it does not pick from its first argument, like the above.
struct Narrow {
  static constexpr int64_t kLanes = 16;
  using V = __m256i;
  static V load(const void* from) { return _mm256_loadu_si256(static_cast<const V*>(from)); }
  static void store(void* to, V v) { _mm256_storeu_si256(static_cast<V*>(to), v); }
  static V pick(V kept, __mmask32 lanes, V source, V row) {
    return _mm256_mask_permutexvar_epi16(kept, __mmask16(lanes), source, row);
  }
};

// Runs for kLanes slots, found in the order in which tokens come: survivors of a page follow each other.
template <class S>
int find_runs(int64_t base, const uint8_t* const* page, const int64_t* slot, Run* runs) {
  int count = 0;
  const uint8_t* last = nullptr;
  for (int64_t k = 0; k < S::kLanes; ++k) {
    const uint8_t* from = page[k] + 2 * (base + slot[k] / S::kLanes * S::kLanes);
    if (from != last) {
      runs[count].from = last = from;
      runs[count++].lanes = 0;
    }
    runs[count - 1].lanes |= __mmask32(1) << k;
    runs[count - 1].source[k] = uint16_t(slot[k] % S::kLanes);
  }
  return count;
}

template <class S>
void fill(int64_t dim, int64_t per_dim, const Run* runs, int count, uint8_t* to) {
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {  // four channels at a time: a run's places are read once for them
    typename S::V rows[4] = {};
    for (int r = 0; r < count; ++r) {
      const typename S::V source = S::load(runs[r].source);
      for (int i = 0; i < 4; ++i) {
        rows[i] = S::pick(rows[i], runs[r].lanes, source, S::load(runs[r].from + 2 * (d + i) * per_dim));
      }
    }
    for (int i = 0; i < 4; ++i) S::store(to + 2 * (d + i) * per_dim, rows[i]);
  }
  for (; d < dim; ++d) {
    typename S::V row = {};
    for (int r = 0; r < count; ++r) {
      row = S::pick(row, runs[r].lanes, S::load(runs[r].source), S::load(runs[r].from + 2 * d * per_dim));
    }
    S::store(to + 2 * d * per_dim, row);
  }
}

template <class S>
void fill_page(int64_t dim, const PartLayout& part, const uint8_t* const* page, const int64_t* slot, uint8_t* to,
               TokensAhead& ahead) {
  for (int64_t first = 0; first < part.slots; first += S::kLanes) {
    Run runs[S::kLanes];
    const int count = find_runs<S>(part.base, page + first, slot + first, runs);
    fill<S>(dim, part.per_dim, runs, count, to + 2 * (part.base + first));
    ahead.more();
  }
}

}  // namespace

bool fill_transposed_avx512(int64_t dim, const PartLayout& part, const uint8_t* const* page, const int64_t* slot,
                            uint8_t* to, TokensAhead& ahead) {
  if (part.slots % Wide::kLanes == 0) fill_page<Wide>(dim, part, page, slot, to, ahead);
  else if (part.slots % Narrow::kLanes == 0) fill_page<Narrow>(dim, part, page, slot, to, ahead);
  else return false;
  return true;
}
