// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Writing a page, W numbers at a time with what every machine has. Included by cold_codec.inl, in each file's anonymous
// namespace.

// Least and largest number of N * W neighbouring channels, both 0 where one is NaN.
template <int N, class T>
INLINE void key_ranges(const uint8_t* const* keys, int64_t d, int64_t count, int64_t n, vf* low, vf* high) {
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
    Range16<T> ranges[N / 2];
    for (int64_t t = 0; t < count; ++t) {
      for (int i = 0; i < N / 2; ++i) ranges[i].see(numbers<T>(keys[t]) + d + 2 * i * W);
    }
    for (int i = 0; i < N; ++i) ranges[i / 2].read(i % 2, low + i, high + i);
  } else {
    Range ranges[N];
    for (int64_t t = 0; t < count; ++t) {
      for (int i = 0; i < N; ++i) {
        const T* at = numbers<T>(keys[t]) + d + i * W;
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
INLINE void key_steps(const uint8_t* const* keys, int64_t d, int64_t count, int64_t n, uint8_t* scale16,
                      uint8_t* zero16, float* scales, float* zeros) {
  vf low[N], high[N];
  key_ranges<N, T>(keys, d, count, n, low, high);
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
void encode_keys(const ColdFormat& f, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch, Ahead& ahead) {
  using C = Coding<Bits>;
  const int64_t dim = f.dim, row = f.key_row(), wide = round_up(dim, 16), padded = round_up(row, 16);
  const int64_t count = tokens.count;
  const uint8_t* const* keys = tokens.keys;
  float* scales = reinterpret_cast<float*>(scratch);
  float* zeros = scales + wide;
  uint8_t* by_token = reinterpret_cast<uint8_t*>(zeros + wide);  // [padded, wide]
  uint8_t* by_channel = by_token + padded * wide;                 // [16, padded]
  uint8_t *scale16 = page + f.key_scale(), *zero16 = page + f.key_zero();
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) {
    key_steps<Bits, 4, T>(keys, d, count, 4 * W, scale16 + 2 * d, zero16 + 2 * d, scales + d, zeros + d);
  }
  for (; d < dim; d += W) {
    const int64_t n = dim - d < W ? dim - d : W;
    key_steps<Bits, 1, T>(keys, d, count, n, scale16 + 2 * d, zero16 + 2 * d, scales + d, zeros + d);
  }
  for (d = 0; d < dim; d += W) {
    const int64_t n = dim - d < W ? dim - d : W;
    const Quantiser quantiser(load(zeros + d), load(scales + d), C::kLevels);
    const auto code_of = [&](int64_t t) INLINE_LAMBDA {
      const T* at = numbers<T>(keys[t]) + d;
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
      ahead.more();
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

// The same for up to W tokens, a lane each.
template <class T>
INLINE void value_ranges(const uint8_t* const* values, int64_t dim, int64_t tokens, vf* low, vf* high) {
  if constexpr (sizeof(T) == 2) {
    if (dim >= 2 * W) {
      int16_t lows[W] = {}, highs[W] = {};
      for (int64_t k = 0; k < tokens; ++k) {
        const T* token = numbers<T>(values[k]);
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
  for (int64_t k = 0; k < tokens; ++k) value_range(numbers<T>(values[k]), dim, lows + k, highs + k);
  *low = load(lows);
  *high = load(highs);
}

template <int Bits, class T>
void encode_values(const ColdFormat& f, const ColdTokens& from, uint8_t* page, Ahead& ahead) {
  using C = Coding<Bits>;
  const int64_t dim = f.dim, row = f.value_row(), count = from.count;
  for (int64_t first = 0; first < count; first += W) {
    // W tokens at a time: their steps are worked out side by side.
    const int64_t tokens = count - first < W ? count - first : W;
    vf low, high;
    value_ranges<T>(from.values + first, dim, tokens, &low, &high);
    const Step steps(low, high, C::kLevels);
    store_some(page + f.value_scale() + 2 * first, narrow(f16{}, steps.scale), tokens);
    store_some(page + f.value_zero() + 2 * first, narrow(f16{}, steps.zero), tokens);
    EachQuantiser<1> each;
    each.set(0, Quantiser(steps.zero, steps.scale, C::kLevels));
    for (int64_t k = 0; k < tokens; ++k) {
      const Quantiser quantiser = each[k];
      const T* token = numbers<T>(from.values[first + k]);
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
      ahead.more();
    }
  }
}
