// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// What loops over vectors share, for any vector type V of simd_*.h. In an unnamed namespace: see simd_avx512.h.
#pragma once

#include <cstdint>

namespace {

template <int R>
struct Rows {
  static constexpr int value = R;
};

// Calls work(first row, Rows<R>) for groups of at most Most rows.
template <int Most, class Work>
inline void by_rows(int rows, const Work& work, int row = 0) {
  for (; rows - row >= Most; row += Most) work(row, Rows<Most>{});
  if constexpr (Most > 1) by_rows<Most - 1>(rows, work, row);
}

// 2^x with a relative error below 3e-7; 0 below -126, and NaN stays NaN.
template <class V>
inline typename V::F exp2(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set(-200.0f), x);
  const F whole = V::whole(x), rest = V::sub(x, whole);
  F y = V::set(0.0013276470126584172f);
  y = V::fma(y, rest, V::set(0.009675540961325169f));
  y = V::fma(y, rest, V::set(0.05550713092088699f));
  y = V::fma(y, rest, V::set(0.24022120237350464f));
  y = V::fma(y, rest, V::set(0.6931469440460205f));
  y = V::fma(y, rest, V::set(1.0000001192092896f));
  return V::times_two_to(y, whole);
}

}  // namespace
