// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What one thread of a parallel region works on: a piece without gaps, so that it knows what it does next.

#pragma once

#include <omp.h>

#include <cstdint>

struct Share {
  int64_t first, end;
};

// Of first <= i < end, in whole `units` but for the last one.
inline Share share_of_thread(int64_t first, int64_t end, int64_t unit) {
  const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num(), units = (end - first + unit - 1) / unit;
  const auto begin = [&](int64_t thread) {
    const int64_t at = first + units * thread / threads * unit;
    return at < end ? at : end;
  };
  return {begin(own), begin(own + 1)};
}
