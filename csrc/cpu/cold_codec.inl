// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// The codec of one page for one instruction set: included once by each cold_codec_*.cpp, all in an anonymous namespace.
// The format is deltamem_vllm/codec/cold_page.py's, the rounding that of cold_codec.py, to the bit.

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
  vf zero, step, inverse, limit;

  INLINE Quantiser(vf zero, vf scale, float levels) : zero(zero) {
    const vf none = splat(0.0f), ever = splat(kInfinity);
    step = scale > none ? scale : ever;
    inverse = 1.0f / step;  // 0 for an infinite step
    limit = levels * step;  // exact: 8 bits times 11
  }

  INLINE Quantiser(vf zero, vf step, vf inverse, vf limit) : zero(zero), step(step), inverse(inverse), limit(limit) {}

  // The code in the lowest bits of every number, above them what the caller cuts off.
  INLINE vu code(vf x) const {
    // Clamped before instead of after rounding: the bounds are integers, so it makes no difference. NaN, which only a
    // step of infinity brings about, becomes 0.
    const vf x0 = least(x - zero, limit);
#if defined(__AVX512F__) || defined(__AVX2__)
    // Dividing takes longer than all the rest. This is the quotient rounded to the nearest, as division gives it: a
    // step has 11 bits, so that `left` is exact, and no quotient of 24 by 11 bits lies as close to the middle between
    // two float32 numbers as what `left * inverse` is off by.
    const vf about = x0 * inverse;
    const vf left = less_product(about, step, x0);
    const vf q = plus_product(left, inverse, about);
#else
    const vf q = x0 / step;
#endif
    // 2^23: the sum has no bits for fractions, is rounded to even, and its low bits are the integer.
    return bits_as<vu>(most(q, vf{}) + splat(8388608.0f));
  }
};

template <int Bits>
struct Coding {
  static constexpr int kParts = 8 / Bits;
  static constexpr uint32_t kMask = (1u << Bits) - 1;
  static constexpr float kLevels = float(kMask);
};

// Least and largest number of N * W neighbouring channels, both 0 where one is NaN.
template <int N, class T>
INLINE void key_ranges(const T* keys, int64_t dim, int64_t count, int64_t n, vf* low, vf* high) {
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
    Range16<T> ranges[N / 2];
    for (int64_t t = 0; t < count; ++t) {
      for (int i = 0; i < N / 2; ++i) ranges[i].see(keys + t * dim + 2 * i * W);
    }
    for (int i = 0; i < N; ++i) ranges[i / 2].read(i % 2, low + i, high + i);
  } else {
    Range ranges[N];
    for (int64_t t = 0; t < count; ++t) {
      for (int i = 0; i < N; ++i) {
        const T* at = keys + t * dim + i * W;
        ranges[i].see(n == N * W ? load(at) : load_part(at, n));
      }
    }
    for (int i = 0; i < N; ++i) {
      low[i] = ranges[i].without_nan(ranges[i].low);
      high[i] = ranges[i].without_nan(ranges[i].high);
    }
  }
}

// scale and zero of every key channel into `page`, and as float32 into `scales` and `zeros`.
template <int Bits, int N, class T>
INLINE void key_steps(const T* keys, int64_t dim, int64_t count, int64_t n, uint8_t* scale16, uint8_t* zero16,
                      float* scales, float* zeros) {
  vf low[N], high[N];
  key_ranges<N>(keys, dim, count, n, low, high);
  for (int i = 0; i < N; ++i) {
    const Step step(low[i], high[i], Coding<Bits>::kLevels);
    store(scales + i * W, step.scale);
    store(zeros + i * W, step.zero);
    const vh scale = narrow(f16{}, step.scale), zero = narrow(f16{}, step.zero);
    std::memcpy(scale16 + 2 * i * W, &scale, 2 * (n == N * W ? W : n));
    std::memcpy(zero16 + 2 * i * W, &zero, 2 * (n == N * W ? W : n));
  }
}

template <int Bits, class T>
void encode_keys(const ColdFormat& f, const T* keys, int64_t count, uint8_t* page, uint8_t* scratch) {
  using C = Coding<Bits>;
  const int64_t dim = f.dim, row = f.key_row(), wide = round_up(dim, 16), padded = round_up(row, 16);
  float* scales = reinterpret_cast<float*>(scratch);
  float* zeros = scales + wide;
  uint8_t* by_token = reinterpret_cast<uint8_t*>(zeros + wide);  // [padded, wide]
  uint8_t* by_channel = by_token + padded * wide;                 // [16, padded]
  uint8_t *scale16 = page + f.key_scale(), *zero16 = page + f.key_zero();
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) {
    key_steps<Bits, 4>(keys + d, dim, count, 4 * W, scale16 + 2 * d, zero16 + 2 * d, scales + d, zeros + d);
  }
  for (; d < dim; d += W) {
    const int64_t n = dim - d < W ? dim - d : W;
    key_steps<Bits, 1>(keys + d, dim, count, n, scale16 + 2 * d, zero16 + 2 * d, scales + d, zeros + d);
  }
  for (d = 0; d < dim; d += W) {
    const int64_t n = dim - d < W ? dim - d : W;
    const Quantiser quantiser(load(zeros + d), load(scales + d), C::kLevels);
    const auto code_of = [&](int64_t t) INLINE_LAMBDA {
      const T* at = keys + t * dim + d;
      return quantiser.code(n == W ? load(at) : load_part(at, n));
    };
    for (int64_t i = 0; i < row; ++i) {
      vu packed = {};
      if (i + (C::kParts - 1) * row < count) {
        for (int j = 0; j < C::kParts; ++j) packed |= code_of(i + j * row) << (Bits * j);
      } else {
        for (int j = 0; j < C::kParts && i + j * row < count; ++j) packed |= code_of(i + j * row) << (Bits * j);
      }
      store_bytes(by_token + i * wide + d, packed);
    }
  }
  for (d = 0; d < dim; d += 16) {
    for (int64_t i = 0; i < row; i += 16) transpose16(by_token + i * wide + d, wide, by_channel + i, padded);
    for (int64_t k = 0; k < 16 && d + k < dim; ++k) {
      uint8_t* to = page + f.key_codes() + (d + k) * row;
      const uint8_t* from = by_channel + k * padded;
      if (row < 16) {
        for (int64_t i = 0; i < row; ++i) to[i] = from[i];
        continue;
      }
      for (int64_t i = 0; i + 16 <= row; i += 16) store_raw(to + i, load_raw<b16>(from + i));
      store_raw(to + row - 16, load_raw<b16>(from + row - 16));  // the rest, some of it twice
    }
  }
}

// The range of one token's value, which counts as [0, 0] if there is a NaN in it.
template <class T>
INLINE void value_range(const T* token, int64_t dim, float* low, float* high) {
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
}

// The same for up to W tokens, a lane each.
template <class T>
INLINE void value_ranges(const T* values, int64_t dim, int64_t tokens, vf* low, vf* high) {
  if constexpr (sizeof(T) == 2) {
    if (dim >= 2 * W) {
      int16_t lows[W] = {}, highs[W] = {};
      for (int64_t k = 0; k < tokens; ++k) {
        const T* token = values + k * dim;
        Range16<T> range;
        for (int64_t d = 0; d + 2 * W <= dim; d += 2 * W) range.see(token + d);
        if (dim % (2 * W) != 0) range.see(token + dim - 2 * W);  // some of them twice
        lows[k] = least_lane(range.low);
        highs[k] = ~least_lane(~range.high);
      }
      return Range16<T>::read(load_raw<vh>(lows), load_raw<vh>(highs), low, high);
    }
  }
  float lows[W] = {}, highs[W] = {};
  for (int64_t k = 0; k < tokens; ++k) value_range(values + k * dim, dim, lows + k, highs + k);
  *low = load(lows);
  *high = load(highs);
}

template <int Bits, class T>
void encode_values(const ColdFormat& f, const T* values, int64_t count, uint8_t* page) {
  using C = Coding<Bits>;
  const int64_t dim = f.dim, row = f.value_row();
  for (int64_t first = 0; first < count; first += W) {
    // W tokens at a time: their steps are worked out side by side.
    const int64_t tokens = count - first < W ? count - first : W;
    float zeros[W], divisors[W], inverses[W], limits[W];
    vf low, high;
    value_ranges(values + first * dim, dim, tokens, &low, &high);
    const Step steps(low, high, C::kLevels);
    const vh scale = narrow(f16{}, steps.scale), zero = narrow(f16{}, steps.zero);
    std::memcpy(page + f.value_scale() + 2 * first, &scale, 2 * tokens);
    std::memcpy(page + f.value_zero() + 2 * first, &zero, 2 * tokens);
    const Quantiser all(steps.zero, steps.scale, C::kLevels);
    store(zeros, all.zero);
    store(divisors, all.step);
    store(inverses, all.inverse);
    store(limits, all.limit);
    for (int64_t k = 0; k < tokens; ++k) {
      const Quantiser quantiser(splat(zeros[k]), splat(divisors[k]), splat(inverses[k]), splat(limits[k]));
      const T* token = values + (first + k) * dim;
      uint8_t* to = page + f.value_codes() + (first + k) * row;
      for (int64_t i = 0; i < row; i += W) {
        const int64_t n = row - i < W ? row - i : W;
        vu packed = {};
        for (int j = 0; j < C::kParts; ++j) {
          const T* at = token + i + j * row;
          packed |= quantiser.code(n == W ? load(at) : load_part(at, n)) << (Bits * j);
        }
        if (n == W) store_bytes(to + i, packed);
        else store_bytes_part(to + i, packed, n);
      }
    }
  }
}

template <int Bits, class T>
void encode_page(const ColdFormat& f, const T* keys, const T* values, int64_t count, uint8_t* page, uint8_t* scratch) {
  const int64_t capacity = f.capacity();
  const int32_t header[4] = {int32_t(count), 0, 0, 0};
  std::memcpy(page, header, sizeof(header));
  encode_keys<Bits>(f, keys, count, page, scratch);
  encode_values<Bits>(f, values, count, page);
  // Nothing of what the page held before stays.
  std::memset(page + f.value_scale() + 2 * count, 0, 2 * (capacity - count));
  std::memset(page + f.value_zero() + 2 * count, 0, 2 * (capacity - count));
  std::memset(page + f.value_codes() + count * f.value_row(), 0, (capacity - count) * f.value_row());
  std::memset(page + f.end(), 0, f.page_bytes - f.end());
}

// zero + code * scale of `n` neighbouring numbers, W at most.
template <class T>
INLINE void put(T* to, vf codes, vf scale, vf zero, int64_t n) {
  const vf x = zero + codes * scale;
  if (n == W) store(to, x);
  else store_part(to, x, n);
}

template <int Bits>
INLINE vf part_of(vu packed, int j) {
  return __builtin_convertvector(bits_as<vi>(packed >> (Bits * j) & Coding<Bits>::kMask), vf);
}

template <int Bits, class T>
void decode_keys(const ColdFormat& f, const uint8_t* page, int64_t count, T* keys, uint8_t* scratch) {
  using C = Coding<Bits>;
  const int64_t dim = f.dim, row = f.key_row(), wide = round_up(dim, 16), padded = round_up(row, 16);
  uint8_t* by_channel = scratch;                      // [16, padded]
  uint8_t* by_token = by_channel + 16 * padded;       // [padded, wide]
  for (int64_t d = 0; d < dim; d += 16) {
    const int64_t here = dim - d < 16 ? dim - d : 16;
    const uint8_t* from = page + f.key_codes() + d * row;
    const int64_t whole = row / 16 * 16;
    if (here == 16) {
      for (int64_t i = 0; i < whole; i += 16) transpose16(from + i, row, by_token + i * wide + d, wide);
    }
    const int64_t start = here == 16 ? whole : 0;
    if (start < row) {
      for (int64_t k = 0; k < here; ++k) {
        std::memcpy(by_channel + k * padded + start, from + k * row + start, row - start);
      }
      for (int64_t i = start; i < row; i += 16) transpose16(by_channel + i, padded, by_token + i * wide + d, wide);
    }
  }
  const auto* scale16 = reinterpret_cast<const f16*>(page + f.key_scale());
  const auto* zero16 = reinterpret_cast<const f16*>(page + f.key_zero());
  for (int64_t d = 0; d < dim; d += W) {
    const int64_t n = dim - d < W ? dim - d : W;
    const vf scale = n == W ? load(scale16 + d) : load_part(scale16 + d, n);
    const vf zero = n == W ? load(zero16 + d) : load_part(zero16 + d, n);
    for (int64_t i = 0; i < row && i < count; ++i) {
      const vu packed = load_bytes(by_token + i * wide + d);
      for (int j = 0; j < C::kParts; ++j) {
        const int64_t t = i + j * row;
        if (t < count) put(keys + t * dim + d, part_of<Bits>(packed, j), scale, zero, n);
      }
    }
  }
}

template <int Bits, class T>
void decode_values(const ColdFormat& f, const uint8_t* page, int64_t count, T* values) {
  using C = Coding<Bits>;
  const int64_t dim = f.dim, row = f.value_row();
  const auto* scale16 = reinterpret_cast<const f16*>(page + f.value_scale());
  const auto* zero16 = reinterpret_cast<const f16*>(page + f.value_zero());
  for (int64_t t = 0; t < count; ++t) {
    const vf scale = splat(load_part(scale16 + t, 1)[0]), zero = splat(load_part(zero16 + t, 1)[0]);
    const uint8_t* from = page + f.value_codes() + t * row;
    for (int64_t i = 0; i < row; i += W) {
      const int64_t n = row - i < W ? row - i : W;
      const vu packed = n == W ? load_bytes(from + i) : load_bytes_part(from + i, n);
      for (int j = 0; j < C::kParts; ++j) {
        put(values + t * dim + i + j * row, part_of<Bits>(packed, j), scale, zero, n);
      }
    }
  }
}

template <int Bits, class T>
void decode_page(const ColdFormat& f, const uint8_t* page, int64_t count, T* keys, T* values, uint8_t* scratch) {
  decode_keys<Bits>(f, page, count, keys, scratch);
  decode_values<Bits>(f, page, count, values);
  const int64_t absent = (f.capacity() - count) * f.dim * int64_t(sizeof(T));
  std::memset(static_cast<void*>(keys + count * f.dim), 0, absent);
  std::memset(static_cast<void*>(values + count * f.dim), 0, absent);
}

template <class T>
void encode_as(const ColdFormat& f, const void* keys, const void* values, int64_t count, uint8_t* page,
               uint8_t* scratch) {
  const T *k = static_cast<const T*>(keys), *v = static_cast<const T*>(values);
  if (f.bits == 8) encode_page<8>(f, k, v, count, page, scratch);
  else if (f.bits == 4) encode_page<4>(f, k, v, count, page, scratch);
  else encode_page<2>(f, k, v, count, page, scratch);
}

template <class T>
void decode_as(const ColdFormat& f, const uint8_t* page, int64_t count, void* keys, void* values, uint8_t* scratch) {
  T *k = static_cast<T*>(keys), *v = static_cast<T*>(values);
  if (f.bits == 8) decode_page<8>(f, page, count, k, v, scratch);
  else if (f.bits == 4) decode_page<4>(f, page, count, k, v, scratch);
  else decode_page<2>(f, page, count, k, v, scratch);
}

void encode_one(const ColdFormat& f, int dtype, const void* keys, const void* values, int64_t count, uint8_t* page,
                uint8_t* scratch) {
  if (dtype == kFloat32) encode_as<float>(f, keys, values, count, page, scratch);
  else if (dtype == kBFloat16) encode_as<bf16>(f, keys, values, count, page, scratch);
  else encode_as<f16>(f, keys, values, count, page, scratch);
}

void decode_one(const ColdFormat& f, int dtype, const uint8_t* page, int64_t count, void* keys, void* values,
                uint8_t* scratch) {
  if (dtype == kFloat32) decode_as<float>(f, page, count, keys, values, scratch);
  else if (dtype == kBFloat16) decode_as<bf16>(f, page, count, keys, values, scratch);
  else decode_as<f16>(f, page, count, keys, values, scratch);
}

}  // namespace
