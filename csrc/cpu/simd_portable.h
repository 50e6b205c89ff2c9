// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Eight float32 lanes in plain C++, for every other processor. In an unnamed namespace: see simd_avx512.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "paged_attention_types.h"

namespace {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) {  // not normal: an integer multiple of 2^-24
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign ? -small : small;
  }
  return bits_to_float(sign | ((rest << 13) + (112u << 23)));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504
  if (rest < 0x38800000) {                       // not normal: adding 1/2 leaves the multiples of 2^-24
    const float shifted = bits_to_float(rest) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

struct Portable {
  static constexpr int W = 8;
  static constexpr int N = 1;
  struct F {
    float x[W];
  };
  struct I {
    uint32_t x[W];
  };

  template <class G>
  static F each(G&& lane) {
    F out;
    for (int i = 0; i < W; ++i) out.x[i] = lane(i);
    return out;
  }

  static F zero() { return set(0.0f); }
  static F set(float x) { return each([=](int) { return x; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.x[i] * b.x[i]; }); }
  static F add(F a, F b) { return each([&](int i) { return a.x[i] + b.x[i]; }); }
  static F sub(F a, F b) { return each([&](int i) { return a.x[i] - b.x[i]; }); }
  static F max(F a, F b) { return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
  static F div(F a, F b) { return each([&](int i) { return a.x[i] / b.x[i]; }); }
  static F sqrt(F a) { return each([&](int i) { return __builtin_sqrtf(a.x[i]); }); }
  static float highest(F a) {
    float out = a.x[0];
    for (int i = 1; i < W; ++i) out = a.x[i] > out ? a.x[i] : out;
    return out;
  }
  static float sum(F a) {
    float out = 0.0f;
    for (int i = 0; i < W; ++i) out += a.x[i];
    return out;
  }

  static F load(const float* p) { return each([=](int i) { return p[i]; }); }
  static F load(const half_t* p) { return each([=](int i) { return half_to_float(p[i].bits); }); }
  static F load(const bf16_t* p) { return each([=](int i) { return bits_to_float(uint32_t{p[i].bits} << 16); }); }
  static F load_part(const float* p, int n) { return each([=](int i) { return i < n ? p[i] : 0.0f; }); }
  static F load_part(const half_t* p, int n) {
    return each([=](int i) { return i < n ? half_to_float(p[i].bits) : 0.0f; });
  }

  static void store(float* p, F x) { std::memcpy(p, x.x, sizeof(x)); }
  static void store(half_t* p, F x) {
    for (int i = 0; i < W; ++i) p[i].bits = float_to_half(x.x[i]);
  }
  static void store(bf16_t* p, F x) {
    for (int i = 0; i < W; ++i) {
      const uint32_t bits = float_to_bits(x.x[i]);
      p[i].bits = x.x[i] != x.x[i] ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  static void store_part(float* p, F x, int n) { std::memcpy(p, x.x, static_cast<size_t>(n) * sizeof(float)); }

  static I bytes(const uint8_t* p) { return bytes_part(p, W); }
  static I bytes_part(const uint8_t* p, int n) {
    I out;
    for (int i = 0; i < W; ++i) out.x[i] = i < n ? p[i] : 0;
    return out;
  }
  template <int Bits, int Place>
  static F code(I bytes) {
    return each([&](int i) { return static_cast<float>(bytes.x[i] >> (Bits * Place) & ((1u << Bits) - 1)); });
  }

  static F whole(F x) {
    // Adding 1.5 * 2^23 rounds to the nearest integer; below -200 the power is 0 anyway.
    return each([&](int i) { return (x.x[i] > -200.0f ? x.x[i] : -200.0f) + 12582912.0f - 12582912.0f; });
  }
  static F times_two_to(F y, F whole) {
    return each([&](int i) {
      const int32_t exponent = static_cast<int32_t>(whole.x[i]);
      return exponent < -126 ? 0.0f : y.x[i] * bits_to_float(static_cast<uint32_t>(exponent + 127) << 23);
    });
  }
};

}  // namespace
