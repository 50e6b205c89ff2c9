// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What moves between caches and memory, said in advance.

#pragma once

#include <cstdint>
#include <new>

#include "isa.h"

#if DELTAMEM_X86
#include <emmintrin.h>
#endif

constexpr int64_t kLine = 64;

inline const uint8_t* line_of(const uint8_t* at) { return at - reinterpret_cast<uintptr_t>(at) % kLine; }

// Bring a line into the second cache, and go on. More of them can be on their way there than to the first one.
inline void prefetch_line(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

// Before other threads are told that the work is done.
inline void finish_streaming() {
#if DELTAMEM_X86
  _mm_sfence();
#endif
}

// Memory of one thread that begins a line.
class LineBuffer {
 public:
  explicit LineBuffer(int64_t bytes)
      : memory_(static_cast<uint8_t*>(::operator new(bytes > 0 ? bytes : 1, std::align_val_t(kLine)))) {}
  ~LineBuffer() { ::operator delete(memory_, std::align_val_t(kLine)); }
  LineBuffer(const LineBuffer&) = delete;
  LineBuffer& operator=(const LineBuffer&) = delete;
  uint8_t* data() const { return memory_; }

 private:
  uint8_t* memory_;
};
