// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// The codec of one page for one instruction set: included once by each cold_codec_*.cpp, all in an anonymous namespace.
// The format is deltamem_vllm/codec/cold_page.py's, the rounding that of cold_codec.py, to the bit.

#include <type_traits>

#include "cold_codec.h"
#include "cold_vec.h"

namespace {

constexpr float kLargest = 65504.0f;  // of float16
constexpr float kInfinity = __builtin_inff();

// The range of numbers seen so far.
struct Range {
  vf low = splat(kInfinity), high = splat(-kInfinity);
#if defined(__AVX512F__)
  __mmask16 nan = 0;
  INLINE void see(vf x) {
    low = least(x, low);
    high = most(x, high);
    nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  }
  INLINE vf without_nan(vf x) const { return _mm512_maskz_mov_ps(~nan, x); }
  INLINE bool any_nan() const { return nan != 0; }
#else
  vi nan = {};
  INLINE void see(vf x) {
    low = least(x, low);
    high = most(x, high);
    nan |= x != x;
  }
  INLINE vf without_nan(vf x) const { return bits_as<vf>(bits_as<vi>(x) & ~nan); }
  INLINE bool any_nan() const {
    int32_t any = 0;
    for (int i = 0; i < W; ++i) any |= nan[i];
    return any != 0;
  }
#endif
};

// The range of two-byte floats, 2 W of them at a time, without widening them. As whole numbers of the same order NaNs
// lie beyond the infinities: the range itself tells whether there was one.
template <class T>
struct Range16 {
  vs low = vs{} + 0x7fff, high = ~(vs{} + 0x7fff);

  INLINE void see(const T* numbers) {
    const vs x = ordered(load_raw<vs>(numbers));
    low = least(x, low);
    high = most(x, high);
  }
  // W of the lanes, the first or the second half.
  INLINE void read(int half, vf* least, vf* largest) const {
    vh lows[2], highs[2];
    std::memcpy(lows, &low, sizeof(low));
    std::memcpy(highs, &high, sizeof(high));
    read(lows[half], highs[half], least, largest);
  }
  INLINE static void read(vh lows, vh highs, vf* least, vf* largest) {
    typedef int16_t v __attribute__((vector_size(2 * W)));
    const int16_t infinity = T::kInfinity;
    const v low = bits_as<v>(lows), high = bits_as<v>(highs);
    const v fine = (high <= infinity) & (low >= int16_t(~infinity));
    *least = widen(T{}, bits_as<vh>(ordered(low) & fine));
    *largest = widen(T{}, bits_as<vh>(ordered(high) & fine));
  }
};

// What codes of a range are made with: rounded to float16 first, so that what is read back is what was coded for.
struct Step {
  vf zero, scale;

  // With a NaN in it a range is [0, 0]: all its codes read back as 0.
  INLINE Step(vf low, vf high, float levels) {
    // + 0: a zero is never negative, or its sign would depend on the order in which tokens were looked at.
    zero = round16(most(least(low, splat(kLargest)), splat(-kLargest)) + 0.0f);
    const vf reach = most(high - zero, vf{});
    scale = round16(least(reach / levels, splat(kLargest)));
  }
  INLINE static vf round16(vf x) { return widen(f16{}, narrow(f16{}, x)); }
};

// Numbers as codes. A scale of 0 (every number is the zero) has only codes 0.
struct Quantiser {
  vf zero, step, limit, inverse, rest;

  INLINE Quantiser() = default;
  INLINE Quantiser(vf zero, vf scale, float levels) : zero(zero) {
    const vf none = splat(0.0f), ever = splat(kInfinity);
    step = scale > none ? scale : ever;
    limit = levels * step;  // exact: 8 bits times 11
    inverse = 1.0f / step;  // 0 for an infinite step
#if defined(__AVX2__)
    // What `inverse` is off by: a step has 11 bits, so that 1 - inverse * step is exact.
    rest = scale > none ? less_product(inverse, step, splat(1.0f)) * inverse : none;
#else
    rest = none;
#endif
  }

  // x0 / step, rounded to the nearest.
  INLINE vf quotient(vf x0) const {
#if defined(__AVX2__)
    // Dividing takes longer than all the rest. inverse + rest is 1 / step but for less than 2^-46 of it, and so is what
    // is rounded here, once. No quotient of 24 by 11 bits lies as close to the middle between two float32 numbers: M,
    // 25 bits and odd, times the step has more than the 24 bits of x0, so that x0 and M * step, of 36 bits, differ by
    // at least one part in 2^36. Below 2^-100, where products lose bits, it is a 0 in any case.
    return plus_product(x0, inverse, x0 * rest);
#else
    return x0 / step;
#endif
  }

  // The quotient, kept between 0 and the largest code. Clamped before instead of after rounding to a code: the bounds
  // are integers, so it makes no difference. NaN, which only a step of infinity brings about, becomes 0.
  INLINE vf clamped(vf x) const { return most(quotient(least(x - zero, limit)), vf{}); }

  // The code in the lowest bits of every number, above them what the caller cuts off.
  INLINE vu code(vf x) const {
    // 2^23: the sum has no bits for fractions, is rounded to even, and its low bits are the integer.
    return bits_as<vu>(clamped(x) + splat(8388608.0f));
  }
};

// The quantisers of N * W rows, of which each is the same for all numbers of its row.
template <int N>
struct EachQuantiser {
  float zero[N * W], step[N * W], limit[N * W], inverse[N * W], rest[N * W];

  // Of rows k to k + W.
  INLINE void set(int64_t k, const Quantiser& some) {
    store(zero + k, some.zero);
    store(step + k, some.step);
    store(limit + k, some.limit);
    store(inverse + k, some.inverse);
    store(rest + k, some.rest);
  }
  INLINE Quantiser operator[](int64_t k) const {
    Quantiser one;
    one.zero = splat(zero[k]);
    one.step = splat(step[k]);
    one.limit = splat(limit[k]);
    one.inverse = splat(inverse[k]);
    one.rest = splat(rest[k]);
    return one;
  }
};

template <int Bits>
struct Coding {
  static constexpr int kParts = 8 / Bits;
  static constexpr uint32_t kMask = (1u << Bits) - 1;
  static constexpr float kLevels = float(kMask);
};

// The first n of float16 numbers.
INLINE void store_some(uint8_t* to, vh x, int64_t n) {
  if (n == W) {
    store_raw(to, x);
  } else {
#if defined(__AVX512BW__)
    _mm256_mask_storeu_epi16(to, __mmask16((1u << n) - 1), bits_as<__m256i>(x));
#else
    std::memcpy(to, &x, 2 * n);
#endif
  }
}

template <class T>
INLINE const T* numbers(const uint8_t* from) {
  return reinterpret_cast<const T*>(from);
}

// The range of one token's value, which counts as [0, 0] if there is a NaN in it. Returns whether there is none.
template <class T>
INLINE bool value_range(const T* token, int64_t dim, float* low, float* high) {
  Range range;
  int64_t d = 0;
  for (; d + W <= dim; d += W) range.see(load(token + d));
  if (dim < W) {  // one number in all lanes
    for (; d < dim; ++d) range.see(splat(load_part(token + d, 1)[0]));
  } else if (d < dim) {
    range.see(load(token + dim - W));  // some of them twice
  }
  const bool nan = range.any_nan();
  *low = nan ? 0.0f : least_lane(range.low);
  *high = nan ? 0.0f : most_lane(range.high);
  return !nan;
}

#if defined(__AVX512BW__)
#include "cold_two_avx512.h"

#include "cold_encode_avx512.h"

#include "cold_decode_avx512.h"
#else
#include "cold_encode_any.h"

#include "cold_decode_any.h"
#endif

template <int Bits, class T>
void encode_page(const ColdFormat& f, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch, Ahead& ahead) {
  const int64_t capacity = f.capacity(), count = tokens.count;
  const int32_t header[4] = {int32_t(count), 0, 0, 0};
  std::memcpy(page, header, sizeof(header));
  encode_keys<Bits, T>(f, tokens, page, scratch, ahead);
  encode_values<Bits, T>(f, tokens, page, ahead);
  // Nothing of what the page held before stays.
  if (count < capacity) {
    std::memset(page + f.value_scale() + 2 * count, 0, 2 * (capacity - count));
    std::memset(page + f.value_zero() + 2 * count, 0, 2 * (capacity - count));
    std::memset(page + f.value_codes() + count * f.value_row(), 0, (capacity - count) * f.value_row());
  }
  std::memset(page + f.end(), 0, f.page_bytes - f.end());
}

template <int Bits, class T>
void decode_page(const ColdFormat& f, const uint8_t* page, int64_t count, T* keys, T* values, uint8_t* scratch,
                 Ahead& ahead) {
  decode_keys<Bits>(f, page, count, keys, scratch, ahead);
  decode_values<Bits>(f, page, count, values, ahead);
  const int64_t absent = (f.capacity() - count) * f.dim * int64_t(sizeof(T));
  std::memset(static_cast<void*>(keys + count * f.dim), 0, absent);
  std::memset(static_cast<void*>(values + count * f.dim), 0, absent);
}

template <class T>
void encode_as(const ColdFormat& f, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch, Ahead& ahead) {
  if (f.bits == 8) encode_page<8, T>(f, tokens, page, scratch, ahead);
  else if (f.bits == 4) encode_page<4, T>(f, tokens, page, scratch, ahead);
  else encode_page<2, T>(f, tokens, page, scratch, ahead);
}

template <class T>
void decode_as(const ColdFormat& f, const uint8_t* page, int64_t count, void* keys, void* values, uint8_t* scratch,
               Ahead& ahead) {
  T *k = static_cast<T*>(keys), *v = static_cast<T*>(values);
  if (f.bits == 8) decode_page<8>(f, page, count, k, v, scratch, ahead);
  else if (f.bits == 4) decode_page<4>(f, page, count, k, v, scratch, ahead);
  else decode_page<2>(f, page, count, k, v, scratch, ahead);
}

void encode_one(const ColdFormat& f, int dtype, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch,
                Ahead& ahead) {
  if (dtype == kFloat32) encode_as<float>(f, tokens, page, scratch, ahead);
  else if (dtype == kBFloat16) encode_as<bf16>(f, tokens, page, scratch, ahead);
  else encode_as<f16>(f, tokens, page, scratch, ahead);
}

void decode_one(const ColdFormat& f, int dtype, const uint8_t* page, int64_t count, void* keys, void* values,
                uint8_t* scratch, Ahead& ahead) {
  if (dtype == kFloat32) decode_as<float>(f, page, count, keys, values, scratch, ahead);
  else if (dtype == kBFloat16) decode_as<bf16>(f, page, count, keys, values, scratch, ahead);
  else decode_as<f16>(f, page, count, keys, values, scratch, ahead);
}

}  // namespace
