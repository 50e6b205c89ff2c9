// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Memory asked for while something else is worked on. Pages lie anywhere in the pool: the hardware sees what comes next
// only inside a page, and would begin to wait again with every one of them.

#pragma once

#include <cstdint>

// always_inline: files compiled for other instruction sets include this, and the linker must not choose between them.
#define AHEAD_INLINE inline __attribute__((always_inline))

constexpr int64_t kLineBytes = 64;

inline constexpr int64_t lines_of(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes; }

// `each` lines of memory, `step` bytes from one to the next, from each of `count` places on.
struct Lines {
  const uint8_t* const* from = nullptr;
  int64_t count = 0, each = 0, step = kLineBytes;
};

// What the next page needs, asked for a few lines at a time.
class Ahead {
 public:
  AHEAD_INLINE Ahead() = default;

  // Everything in about `turns` calls of more(): keys and values to read, and a page to write.
  AHEAD_INLINE Ahead(const Lines& keys, const Lines& values, const uint8_t* written, int64_t bytes, int64_t turns)
      : parts_{values, keys}, written_(written), unwritten_(lines_of(bytes)) {
    reads_ = (keys.count * keys.each + values.count * values.each) / turns + 1;
    writes_ = unwritten_ / turns + 1;
    next_part();
  }

  AHEAD_INLINE void more() {
    int64_t left = left_;
    for (int64_t budget = reads_; left > 0;) {
      const int64_t n = budget < left ? budget : left;
      const uint8_t* at = at_;
      for (int64_t i = 0; i < n; ++i) {
        // Into the second cache: pages have the same places in the first one, where they would push each other out.
        __builtin_prefetch(at, 0, 2);
        at += now_.step;
      }
      at_ = at;
      left -= n;
      budget -= n;
      if (left == 0) {
        if (--now_.count > 0) {
          at_ = *++now_.from;
          left = now_.each;
        } else {
          next_part();
          left = left_;
        }
      }
      if (budget == 0) break;
    }
    left_ = left;
    if (unwritten_ > 0) {
      for (int64_t i = 0; i < writes_; ++i) __builtin_prefetch(written_ + i * kLineBytes, 1, 2);
      written_ += writes_ * kLineBytes;
      unwritten_ -= writes_;
    }
  }

 private:
  AHEAD_INLINE void next_part() {
    left_ = 0;
    while (left_ == 0 && parts_left_ > 0) {
      now_ = parts_[--parts_left_];
      if (now_.count == 0) continue;
      at_ = *now_.from;
      left_ = now_.each;
    }
  }

  Lines parts_[2], now_;
  int64_t parts_left_ = 2, reads_ = 0, writes_ = 0;
  const uint8_t *at_ = nullptr, *written_ = nullptr;
  int64_t left_ = 0, unwritten_ = 0;
};
