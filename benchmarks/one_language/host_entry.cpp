// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Entry points for calling the CUDA kernels on a CPU: the test's library.

#include "cuda_kernels.cu"

extern "C" int capacity() { return CAPACITY; }

extern "C" void host_copy(
    const uint4* pool, uint4* rows, const int* pages, const int* slots, int count, int num_pages) {
  constexpr int TOKENS = 4096 / DIM;
  launch(copy_tokens, (count + TOKENS - 1) / TOKENS, 1, THREADS, pool, rows, pages, slots, count, num_pages);
}

extern "C" void host_encode(const uint4* keys, const uint4* values, const long long* counts, uint8_t* raw,
                            const long long* targets, int pages, int num_pages) {
  constexpr int TOKENS = 4096 / DIM < VALUE_ROWS ? VALUE_ROWS : 4096 / DIM;
  launch(encode_keys, pages, 1, THREADS, keys, counts, raw, targets, num_pages);
  launch(encode_values, pages, (CAPACITY + TOKENS - 1) / TOKENS, THREADS, values, counts, raw, targets, num_pages);
}

extern "C" void host_decode(const uint8_t* raw, const long long* ids, uint4* keys, uint4* values, long long* counts,
                            int pages, int num_pages) {
  launch(decode_page, pages, 1, THREADS, raw, ids, keys, values, counts, num_pages);
}
