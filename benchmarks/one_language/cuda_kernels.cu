// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What `triton_kernels/` does to tokens in bfloat16, written by hand in CUDA: for comparing the machine code of both
// languages (benchmarks/one_language.py), not for serving. Sizes are constants, as in Triton's kernels; loops over them
// are unrolled, so that instructions can be counted. host_cuda.h runs the same text on a CPU.
//
// BITS, DIM, BLOCK_SIZE: of a code; D; slots of a hot page, whose bytes are those of a cold one (codec/cold_page.py).

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#else
#include "host_cuda.h"
#endif

constexpr int THREADS = 128;
constexpr int PARTS = 8 / BITS;  // codes in a byte
constexpr int MOST = (1 << BITS) - 1;
constexpr int PAGE_BYTES = BLOCK_SIZE * 2 * DIM * 2;
constexpr int CAPACITY = (PAGE_BYTES - 16 - 4 * DIM) / (4 + 2 * DIM * BITS / 8) / 4 * 4;
constexpr int KEY_SCALE = 16, KEY_ZERO = KEY_SCALE + 2 * DIM;
constexpr int VALUE_SCALE = KEY_ZERO + 2 * DIM, VALUE_ZERO = VALUE_SCALE + 2 * CAPACITY;
constexpr int KEY_CODES = VALUE_ZERO + 2 * CAPACITY, KEY_ROW = CAPACITY / PARTS;
constexpr int VALUE_CODES = KEY_CODES + DIM * KEY_ROW, VALUE_ROW = DIM / PARTS;
constexpr int USED_BYTES = VALUE_CODES + CAPACITY * VALUE_ROW;
constexpr int DIMS = 8;               // a thread's, in 16 bytes
constexpr int LANES = DIM / DIMS;     // threads side by side in a token
constexpr int ROWS = THREADS / LANES; // tokens side by side, or bytes of a channel

__device__ inline float upper(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline float lower(uint32_t pair) { return __uint_as_float(pair << 16); }

__device__ inline void widen(uint4 eight, float* out) {
  const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = lower(pairs[i]);
    out[2 * i + 1] = upper(pairs[i]);
  }
}

__device__ inline uint4 narrow(const float* in) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    pairs[i] = *reinterpret_cast<const uint32_t*>(&two);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// A range that grows; once a NaN was seen it stays a NaN in `low`.
struct Range {
  float low, high;
  __device__ void add(float x) {
    low = (x < low || x != x) ? x : low;
    high = fmaxf(high, x);
  }
  __device__ void merge(float other_low, float other_high) {
    low = (other_low < low || other_low != other_low) ? other_low : low;
    high = fmaxf(high, other_high);
  }
};

struct Code {
  __half scale, zero;
  float offset, step, inverse, top;
};

// quantise.range_of and divisor_of.
__device__ inline Code code_of(Range range, bool some) {
  const float largest = 65504.f;
  some = some && range.low == range.low;
  Code code;
  code.zero = __float2half_rn(fminf(fmaxf((some ? range.low : 0.f) + 0.f, -largest), largest));
  code.offset = __half2float(code.zero);
  const float reach = fmaxf(some ? range.high - code.offset : 0.f, 0.f) + 0.f;
  code.scale = __float2half_rn(fminf(__fdiv_rn(reach, float(MOST)), largest));
  const float scale = __half2float(code.scale);
  code.step = scale > 0.f ? scale : 1.f;
  code.inverse = __fdiv_rn(1.f, code.step);
  code.top = scale * float(MOST);
  return code;
}

// quantise.codes_of.
__device__ inline uint32_t quantised(float x, const Code& code) {
  const float above = fminf(fmaxf(x - code.offset, 0.f), code.top);
  float quotient = above * code.inverse;
  quotient = __fmaf_rn(__fmaf_rn(-quotient, code.step, above), code.inverse, quotient);
  return __float_as_uint(quotient + 12582912.f) & 0xffu;
}

// One direction of gather.gather_pages, pages with one token after the other, keys before values.
extern "C" __global__ void copy_tokens(
    const uint4* pool, uint4* rows, const int* pages, const int* slots, int count, int num_pages) {
  constexpr int TOKENS = 4096 / DIM, EACH = TOKENS / ROWS;
  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int token = blockIdx.x * TOKENS + i * ROWS + threadIdx.x / LANES;
    if (token >= count) continue;
    const int64_t page = min(max(pages[token], 0), num_pages - 1);
    const int slot = min(max(slots[token], 0), BLOCK_SIZE - 1);
    const uint4* from = pool + page * (PAGE_BYTES / 16) + slot * LANES + lane;
    uint4* to = rows + int64_t(token) * (2 * LANES) + lane;
    to[0] = from[0];
    to[LANES] = from[BLOCK_SIZE * LANES];
  }
}

// Bytes of a channel that a thread codes: with ROWS threads behind each other they are all of them.
constexpr int KEY_BYTES = (KEY_ROW + ROWS - 1) / ROWS;

extern "C" __global__ void encode_keys(
    const uint4* keys, const long long* counts, uint8_t* raw, const long long* targets, int num_pages) {
  __shared__ float shared[2][THREADS / 32][DIM];
  const int64_t index = blockIdx.x, number = targets[index];
  if (number < 0 || number >= num_pages) return;
  const int count = int(min(max(counts[index], 0ll), (long long)CAPACITY));
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const uint4* own = keys + index * (CAPACITY * LANES) + lane;
  uint8_t* page = raw + number * PAGE_BYTES;

  uint4 tokens[KEY_BYTES][PARTS];
  Range ranges[DIMS];
#pragma unroll
  for (int d = 0; d < DIMS; ++d) ranges[d] = {INFINITY, -INFINITY};
#pragma unroll
  for (int b = 0; b < KEY_BYTES; ++b)
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int byte = row * KEY_BYTES + b, token = part * KEY_ROW + byte;
      const bool there = byte < KEY_ROW && token < count;
      tokens[b][part] = own[(there ? token : 0) * LANES];  // the first one once more moves no bound
      float wide[DIMS];
      widen(tokens[b][part], wide);
#pragma unroll
      for (int d = 0; d < DIMS; ++d) ranges[d].add(wide[d]);
    }
#pragma unroll
  for (int d = 0; d < DIMS; ++d) {
#pragma unroll
    for (int step = LANES; step < 32; step *= 2)
      ranges[d].merge(__shfl_xor_sync(~0u, ranges[d].low, step), __shfl_xor_sync(~0u, ranges[d].high, step));
    if (threadIdx.x % 32 < LANES) {
      shared[0][threadIdx.x / 32][lane * DIMS + d] = ranges[d].low;
      shared[1][threadIdx.x / 32][lane * DIMS + d] = ranges[d].high;
    }
  }
  __syncthreads();
  Code codes[DIMS];
#pragma unroll
  for (int d = 0; d < DIMS; ++d) {
    const int dim = lane * DIMS + d;
    Range range = {shared[0][0][dim], shared[1][0][dim]};
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; ++warp) range.merge(shared[0][warp][dim], shared[1][warp][dim]);
    codes[d] = code_of(range, count > 0);
    if (row == 0) {
      reinterpret_cast<__half*>(page + KEY_SCALE)[dim] = codes[d].scale;
      reinterpret_cast<__half*>(page + KEY_ZERO)[dim] = codes[d].zero;
    }
  }
#pragma unroll
  for (int b = 0; b < KEY_BYTES; ++b) {
    const int byte = row * KEY_BYTES + b;
    uint32_t packed[DIMS] = {};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      float wide[DIMS];
      widen(tokens[b][part], wide);
      const bool there = part * KEY_ROW + byte < count;
#pragma unroll
      for (int d = 0; d < DIMS; ++d) packed[d] |= quantised(there ? wide[d] : -INFINITY, codes[d]) << (BITS * part);
    }
    if (byte < KEY_ROW)
#pragma unroll
      for (int d = 0; d < DIMS; ++d) page[KEY_CODES + (lane * DIMS + d) * KEY_ROW + byte] = uint8_t(packed[d]);
  }
  if (threadIdx.x < 4) reinterpret_cast<int*>(page)[threadIdx.x] = threadIdx.x == 0 ? count : 0;
  for (int byte = USED_BYTES + threadIdx.x; byte < PAGE_BYTES; byte += THREADS) page[byte] = 0;
}

// Bytes of a token's codes that a thread has: each part of them is 16 bytes of elements.
constexpr int VALUE_LANES = VALUE_ROW / DIMS;
constexpr int VALUE_ROWS = THREADS / VALUE_LANES;

extern "C" __global__ void encode_values(
    const uint4* values, const long long* counts, uint8_t* raw, const long long* targets, int num_pages) {
  constexpr int TOKENS = 4096 / DIM < VALUE_ROWS ? VALUE_ROWS : 4096 / DIM, EACH = TOKENS / VALUE_ROWS;
  const int64_t index = blockIdx.x, number = targets[index];
  if (number < 0 || number >= num_pages) return;
  const int count = int(min(max(counts[index], 0ll), (long long)CAPACITY));
  const int lane = threadIdx.x % VALUE_LANES;
  uint8_t* page = raw + number * PAGE_BYTES;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int token = blockIdx.y * TOKENS + i * VALUE_ROWS + threadIdx.x / VALUE_LANES;
    const uint4* own = values + (index * CAPACITY + min(token, CAPACITY - 1)) * LANES + lane;
    uint4 parts[PARTS];
    Range range = {INFINITY, -INFINITY};
    float wide[DIMS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      parts[part] = own[part * VALUE_LANES];
      widen(parts[part], wide);
#pragma unroll
      for (int d = 0; d < DIMS; ++d) range.add(wide[d]);
    }
#pragma unroll
    for (int step = 1; step < VALUE_LANES; step *= 2)
      range.merge(__shfl_xor_sync(~0u, range.low, step), __shfl_xor_sync(~0u, range.high, step));
    const Code code = code_of(range, token < count);
    uint32_t packed[2] = {};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      widen(parts[part], wide);
#pragma unroll
      for (int d = 0; d < DIMS; ++d) packed[d / 4] |= quantised(wide[d], code) << (BITS * part + 8 * (d % 4));
    }
    if (token < CAPACITY) {
      if (lane == 0) {
        reinterpret_cast<__half*>(page + VALUE_SCALE)[token] = code.scale;
        reinterpret_cast<__half*>(page + VALUE_ZERO)[token] = code.zero;
      }
      uint32_t* to = reinterpret_cast<uint32_t*>(page + VALUE_CODES + token * VALUE_ROW + lane * DIMS);
      to[0] = packed[0];
      to[1] = packed[1];
    }
  }
}

extern "C" __global__ void decode_page(
    const uint8_t* raw, const long long* pages, uint4* keys, uint4* values, long long* counts, int num_pages) {
  const int64_t index = blockIdx.x, number = min(max(pages[index], 0ll), (long long)(num_pages - 1));
  const uint8_t* page = raw + number * PAGE_BYTES;
  const int count = min(max(*reinterpret_cast<const int*>(page), 0), CAPACITY);
  if (threadIdx.x == 0) counts[index] = count;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  uint4* own_keys = keys + index * (CAPACITY * LANES) + lane;
  float scale[DIMS], zero[DIMS], wide[DIMS];
#pragma unroll
  for (int d = 0; d < DIMS; ++d) {
    scale[d] = __half2float(reinterpret_cast<const __half*>(page + KEY_SCALE)[lane * DIMS + d]);
    zero[d] = __half2float(reinterpret_cast<const __half*>(page + KEY_ZERO)[lane * DIMS + d]);
  }
#pragma unroll
  for (int b = 0; b < KEY_BYTES; ++b) {
    const int byte = b * ROWS + row;
    if (byte >= KEY_ROW) continue;
    uint32_t packed[DIMS];
#pragma unroll
    for (int d = 0; d < DIMS; ++d) packed[d] = page[KEY_CODES + (lane * DIMS + d) * KEY_ROW + byte];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int token = part * KEY_ROW + byte;
#pragma unroll
      for (int d = 0; d < DIMS; ++d)
        wide[d] = __fmaf_rn(float((packed[d] >> (BITS * part)) & MOST), scale[d], zero[d]);
      own_keys[token * LANES] = token < count ? narrow(wide) : make_uint4(0, 0, 0, 0);
    }
  }
  constexpr int EACH = (CAPACITY + VALUE_ROWS - 1) / VALUE_ROWS;
  const int value_lane = threadIdx.x % VALUE_LANES;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int token = i * VALUE_ROWS + threadIdx.x / VALUE_LANES;
    if (token >= CAPACITY) continue;
    const bool there = token < count;
    const float by = there ? __half2float(reinterpret_cast<const __half*>(page + VALUE_SCALE)[token]) : 0.f;
    const float from = there ? __half2float(reinterpret_cast<const __half*>(page + VALUE_ZERO)[token]) : 0.f;
    const uint32_t* at = reinterpret_cast<const uint32_t*>(page + VALUE_CODES + token * VALUE_ROW + value_lane * DIMS);
    const uint32_t packed[2] = {at[0], at[1]};
    uint4* to = values + (index * CAPACITY + token) * LANES + value_lane;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int d = 0; d < DIMS; ++d)
        wide[d] = __fmaf_rn(float((packed[d / 4] >> (8 * (d % 4) + BITS * part)) & MOST), by, from);
      to[part * VALUE_LANES] = narrow(wide);
    }
  }
}
