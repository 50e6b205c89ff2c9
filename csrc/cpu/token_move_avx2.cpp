// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include <immintrin.h>

#include <cstring>

#include "memory_stream.h"
#include "token_move.h"

#define DELTAMEM_STREAM_LINE(from, to)                                                \
  for (int i = 0; i < 2; ++i) {                                                       \
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i,                           \
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i)); \
  }
#include "token_rows.inl"

const CopyKernels kCopyAvx2 = {rows, stream};

namespace {

// [16, 16] numbers of two bytes: out[i] becomes lane i of all rows, which are lost.
inline void transpose(__m256i* rows, __m256i* out) {
  // Interleaving rows i and i + 8, four times over, is a transposition. Instructions do it in each half of a vector:
  // the halves are put together at the end.
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      out[2 * i] = _mm256_unpacklo_epi16(rows[i], rows[i + 8]);
      out[2 * i + 1] = _mm256_unpackhi_epi16(rows[i], rows[i + 8]);
    }
    for (int i = 0; i < 16; ++i) rows[i] = out[i];
  }
  for (int i = 0; i < 8; ++i) {
    out[i] = _mm256_permute2x128_si256(rows[2 * i], rows[2 * i + 1], 0x20);
    out[i + 8] = _mm256_permute2x128_si256(rows[2 * i], rows[2 * i + 1], 0x31);
  }
}

}  // namespace

void gather_transposed_avx2(int64_t dim, const uint8_t* from, int64_t per_dim, const uint8_t* lanes, int64_t count,
                            uint8_t* to) {
  for (int64_t d = 0; d < dim; d += 16) {
    __m256i rows[16], tokens[16];
    for (int i = 0; i < 16; ++i) {
      rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * (d + i) * per_dim));
    }
    transpose(rows, tokens);
    for (int64_t k = 0; k < count; ++k) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * (k * dim + d)), tokens[lanes[k]]);
    }
  }
}
