// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Runs the kernels of cuda_kernels.cu on a CPU, a thread of the system for each of a block, so that their results can be
// checked where there is no GPU. All threads that are left in a block take part in every barrier and shuffle.

#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct uint4 { uint32_t x, y, z, w; };
struct Index { int x, y; };
using __half = _Float16;
struct __nv_bfloat162 { uint16_t x, y; };
using std::max;
using std::min;

inline thread_local Index blockIdx, threadIdx;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline float exchanged[1024];

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  exchanged[threadIdx.x] = value;
  __syncthreads();
  const float other = exchanged[threadIdx.x ^ mask];
  __syncthreads();
  return other;
}

inline uint32_t __float_as_uint(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline __half __float2half_rn(float x) { return static_cast<_Float16>(x); }
inline float __half2float(__half x) { return x; }

inline uint16_t rounded(float x) {  // to bfloat16, ties to even; a NaN stays one
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {rounded(x), rounded(y)}; }

// kernel<<<(width, height), threads>>>(arguments...): one block after the other.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int width, int height, int threads, Arguments... arguments) {
  for (int block = 0; block < width * height; ++block) {
    block_barrier = std::make_unique<std::barrier<>>(threads);
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([=] {
        blockIdx = {block % width, block / width};
        threadIdx = {thread, 0};
        kernel(arguments...);
        block_barrier->arrive_and_drop();
      });
  }
}
