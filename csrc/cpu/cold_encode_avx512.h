// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Writing a page with AVX-512: 32 numbers at a time, and no clamping where the range of the numbers shows that no code
// needs it. Included by cold_codec.inl, in each file's anonymous namespace.

// The ends of ranges of 32 two-byte floats, found as whole numbers in the order of the floats (Range16).
struct Ends {
  __m512i low = _mm512_set1_epi16(0x7fff), high = _mm512_set1_epi16(-0x8000);

  INLINE Ends() = default;
  INLINE explicit Ends(__m512i numbers) : low(bits_as<__m512i>(ordered(bits_as<vs>(numbers)))), high(low) {}

  INLINE void see(__m512i numbers) {
    const __m512i x = bits_as<__m512i>(ordered(bits_as<vs>(numbers)));
    low = _mm512_min_epi16(low, x);
    high = _mm512_max_epi16(high, x);
  }
};

// Whether the codes of all numbers from `low` to `high` are in range without clamping: rounding keeps order, so what
// holds for the ends holds in between. False for infinities.
INLINE bool within(vf low, vf high, const Quantiser& q, vf step) {
  const __mmask16 above = _mm512_cmp_ps_mask(low, q.zero, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, high - q.zero, q.limit + 0.499f * step, _CMP_LE_OQ) == 0xffff;
}

template <bool Clamp>
INLINE __m512i code_of(const Quantiser& q, vf x) {
  return _mm512_cvtps_epi32(Clamp ? q.clamped(x) : q.quotient(x - q.zero));  // to the nearest, ties to even
}

// Scales, zeros and what makes codes of them for 32 neighbouring channels.
template <int Bits, class T>
struct ChannelSteps {
  Two low, high;
  bool plain = true;  // so far: no NaN

  // Of channels d to d + n, n <= 32; what stands behind them counts as 0.
  INLINE ChannelSteps(const uint8_t* const* tokens, int64_t d, int64_t n, int64_t count, Ahead& ahead) {
    const __mmask32 there = first_of_32(n);
    if constexpr (sizeof(T) == 2) {
      Ends ends;
      if (n >= 32) {
        int64_t t = 0;
        for (; t + 8 <= count; t += 8) {
          for (int i = 0; i < 8; ++i) ends.see(_mm512_loadu_si512(tokens[t + i] + 2 * d));
          ahead.more();
        }
        for (; t < count; ++t) ends.see(_mm512_loadu_si512(tokens[t] + 2 * d));
      } else {
        for (int64_t t = 0; t < count; ++t) ends.see(_mm512_maskz_loadu_epi16(there, tokens[t] + 2 * d));
      }
      const __mmask32 fine = _mm512_cmple_epi16_mask(ends.high, _mm512_set1_epi16(T::kInfinity)) &
                             _mm512_cmpge_epi16_mask(ends.low, _mm512_set1_epi16(int16_t(~T::kInfinity)));
      plain = fine == ~__mmask32(0);
      low = read(ends.low, fine);
      high = read(ends.high, fine);
    } else {
      Range a, b;
      for (int64_t t = 0; t < count; ++t) {
        const Two x = load_two(numbers<T>(tokens[t]) + d, there);
        a.see(x.a);
        b.see(x.b);
      }
      plain = !a.any_nan() && !b.any_nan();
      low = {a.without_nan(a.low), b.without_nan(b.low)};
      high = {a.without_nan(a.high), b.without_nan(b.high)};
    }
  }
  INLINE static Two read(__m512i end, __mmask32 fine) {
    const vs back = ordered(bits_as<vs>(end));
    return widen(T{}, _mm512_maskz_mov_epi16(fine, bits_as<__m512i>(back)));
  }
};

// Codes of a byte's worth of tokens, two bytes of each channel's row in a number: [(row + 1) / 2, 32].
template <int Bits, bool Clamp, class T>
INLINE void codes_by_token(const uint8_t* const* tokens, int64_t d, int64_t n, int64_t count, int64_t row,
                           const Quantiser a, const Quantiser b, uint8_t* pairs, Ahead& ahead) {
  const __mmask32 there = first_of_32(n);
  const auto codes_of = [&](int64_t t) INLINE_LAMBDA {
    const T* from = numbers<T>(tokens[t]) + d;
    const Two x = n >= 32 ? load_two(from) : load_two(from, there);
    return joined(T{}, code_of<Clamp>(a, x.a), code_of<Clamp>(b, x.b));
  };
  const auto bytes_of = [&](int64_t i) INLINE_LAMBDA {
    constexpr int kParts = Coding<Bits>::kParts;
    __m512i packed = _mm512_setzero_si512();
    if (i + (kParts - 1) * row < count) {
      packed = codes_of(i);
      for (int j = 1; j < kParts; ++j) {
        packed = _mm512_or_si512(packed, _mm512_slli_epi16(codes_of(i + j * row), Bits * j));
      }
    } else {
      for (int j = 0; j < kParts && i + j * row < count; ++j) {
        packed = _mm512_or_si512(packed, _mm512_slli_epi16(codes_of(i + j * row), Bits * j));
      }
    }
    return packed;
  };
  for (int64_t i = 0; i < row; i += 2) {
    __m512i pair = bytes_of(i);
    if (i + 1 < row) pair = _mm512_or_si512(pair, _mm512_slli_epi16(bytes_of(i + 1), 8));
    _mm512_storeu_si512(pairs + 32 * i, pair);
    ahead.more();
  }
}

// What makes codes of 32 neighbouring channels.
struct ChannelQuantiser {
  Quantiser a, b;
  bool plain;
};

// 16 bytes of each of n channels' rows, transposed chunk by chunk, to where the rows stand. Chunks are written whole:
// what is too much of a row is written over by the next one. Only up to `end`.
template <int Chunks>
INLINE void store_channels(const uint8_t* from, int64_t chunks, int64_t n, int64_t row, uint8_t* to,
                           const uint8_t* end) {
  if (Chunks > 0) chunks = Chunks;
  int64_t k = 0;
  const auto chunk = [&](int64_t c) INLINE_LAMBDA {
    return load_raw<__m128i>(from + uint64_t(k) % 8 * 64 + uint64_t(k) / 8 * 16 + 512 * c);
  };
  for (; k < n && to + 16 * chunks <= end; ++k, to += row) {
    for (int64_t c = 0; c < chunks; ++c) store_raw(to + 16 * c, chunk(c));
  }
  for (; k < n; ++k, to += row) {
    for (int64_t c = 0; c < chunks; ++c) _mm_mask_storeu_epi8(to + 16 * c, first_of_32(row - 16 * c), chunk(c));
  }
}

template <int Bits, class T>
void encode_tokens(const ColdFormat& f, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch, Ahead& ahead) {
  constexpr float kLevels = Coding<Bits>::kLevels;
  const int64_t dim = f.dim, row = f.key_row(), chunks = (row + 15) / 16;
  uint8_t* const codes = page + f.key_codes();
  uint8_t* const end = codes + dim * row;
  auto* const quantisers = reinterpret_cast<ChannelQuantiser*>(scratch);
  uint8_t* const pairs = scratch + (dim + 31) / 32 * int64_t(sizeof(ChannelQuantiser));
  // All steps before the first code: working one out takes long, but several at the same time hardly longer.
  for (int64_t d = 0; d < dim; d += 32) {
    const int64_t n = dim - d < 32 ? dim - d : 32;
    const ChannelSteps<Bits, T> range(tokens.keys, d, n, tokens.count, ahead);
    const Step a(range.low.a, range.high.a, kLevels), b(range.low.b, range.high.b, kLevels);
    const __m512i scale = narrow_two<T>({a.scale, b.scale}), zero = narrow_two<T>({a.zero, b.zero});
    uint8_t *scale16 = page + f.key_scale() + 2 * d, *zero16 = page + f.key_zero() + 2 * d;
    if (n == 32) {
      store_raw(scale16, scale);
      store_raw(zero16, zero);
    } else {
      std::memcpy(scale16, &scale, 2 * n);
      std::memcpy(zero16, &zero, 2 * n);
    }
    ChannelQuantiser& q = quantisers[d / 32];
    q.a = Quantiser(a.zero, a.scale, kLevels);
    q.b = Quantiser(b.zero, b.scale, kLevels);
    q.plain = range.plain && within(range.low.a, range.high.a, q.a, q.a.step) &&
              within(range.low.b, range.high.b, q.b, q.b.step);
  }
  for (int64_t d = 0; d < dim; d += 32) {
    const int64_t n = dim - d < 32 ? dim - d : 32;
    const ChannelQuantiser& q = quantisers[d / 32];
    if (q.plain) codes_by_token<Bits, false, T>(tokens.keys, d, n, tokens.count, row, q.a, q.b, pairs, ahead);
    else codes_by_token<Bits, true, T>(tokens.keys, d, n, tokens.count, row, q.a, q.b, pairs, ahead);
    for (int64_t c = 0; c < chunks; ++c) {
      __m512i rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = _mm512_loadu_si512(pairs + 512 * c + 64 * i);
      transpose_quarters(rows);
      for (int i = 0; i < 8; ++i) _mm512_storeu_si512(pairs + 512 * c + 64 * i, rows[i]);
    }
    if (chunks == 4) store_channels<4>(pairs, chunks, n, row, codes + d * row, end);
    else if (chunks == 2) store_channels<2>(pairs, chunks, n, row, codes + d * row, end);
    else store_channels<0>(pairs, chunks, n, row, codes + d * row, end);
  }
}

// The ends of 16 rows, in one vector for the lower and one for the upper ones. Two rows become one vector, again and
// again, until each has one lane for either end.
INLINE Ends ends_of_rows(__m512i* a) {
  for (int k = 0; k < 8; ++k) {
    a[k] = _mm512_min_epi16(_mm512_shuffle_i64x2(a[k], a[k + 8], 0x88), _mm512_shuffle_i64x2(a[k], a[k + 8], 0xdd));
  }
  for (int step = 4; step > 0; step /= 2) {
    for (int k = 0; k < step; ++k) {
      a[k] = _mm512_min_epi16(_mm512_unpacklo_epi16(a[k], a[k + step]), _mm512_unpackhi_epi16(a[k], a[k + step]));
    }
  }
  const __m512i apart = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7), a[0]);
  Ends ends;
  ends.low = apart;
  ends.high = _mm512_castsi256_si512(~half_of(apart, 1));
  return ends;
}

// Of 32 numbers: the lower end in the first half, the upper one, inverted, in the second. Then the least of everything
// is wanted.
INLINE __m512i folded(const Ends& ends) {
  const __m512i inverted = ~ends.high;
  return _mm512_min_epi16(_mm512_shuffle_i64x2(ends.low, inverted, 0x44),
                          _mm512_shuffle_i64x2(ends.low, inverted, 0xee));
}

// Of 16 rows of `length` numbers in `Vectors` vectors, some of them twice; of any length if that is 0.
template <int Vectors>
INLINE Ends row_ends(const uint8_t* const* rows, int64_t length, Ahead& ahead) {
  __m512i a[16];
  for (int k = 0; k < 16; ++k) {
    const uint8_t* row = rows[k];
    Ends ends;
    if constexpr (Vectors > 0) {
      ends = Ends(_mm512_loadu_si512(row + 2 * (length - 32)));
      for (int i = 0; i < Vectors - 1; ++i) ends.see(_mm512_loadu_si512(row + 64 * i));
    } else {
      const int64_t whole = length / 32 * 32;
      const __mmask32 rest = first_of_32(length - whole);
      for (int64_t i = 0; i < whole; i += 32) ends.see(_mm512_loadu_si512(row + 2 * i));
      ends.see(_mm512_mask_loadu_epi16(_mm512_set1_epi16(load_raw<int16_t>(row)), rest, row + 2 * whole));
    }
    a[k] = folded(ends);
    if (k % 4 == 3) ahead.more();
  }
  return ends_of_rows(a);
}

INLINE Ends row_ends(const uint8_t* const* rows, int64_t length, Ahead& ahead) {
  if (length == 32) return row_ends<1>(rows, length, ahead);
  if (length > 32 && length <= 64) return row_ends<2>(rows, length, ahead);
  if (length > 64 && length <= 96) return row_ends<3>(rows, length, ahead);
  if (length > 96 && length <= 128) return row_ends<4>(rows, length, ahead);
  return row_ends<0>(rows, length, ahead);
}

// The ranges of 16 rows of `length` numbers, a lane each; both ends 0 where there is a NaN. Returns whether there is
// none.
template <class T>
INLINE bool row_ranges(const uint8_t* const* rows, int64_t length, vf* low, vf* high, Ahead& ahead) {
  if constexpr (sizeof(T) == 2) {
    const Ends ends = row_ends(rows, length, ahead);
    const __m256i lows = half_of(ends.low, 0), highs = half_of(ends.high, 0);
    const __mmask16 fine = _mm256_cmple_epi16_mask(highs, _mm256_set1_epi16(T::kInfinity)) &
                           _mm256_cmpge_epi16_mask(lows, _mm256_set1_epi16(int16_t(~T::kInfinity)));
    Range16<T>::read(bits_as<vh>(lows), bits_as<vh>(highs), low, high);
    return fine == 0xffff;
  } else {
    float lows[W], highs[W];
    bool plain = true;
    for (int k = 0; k < W; ++k) plain &= value_range(numbers<T>(rows[k]), length, lows + k, highs + k);
    *low = load(lows);
    *high = load(highs);
    return plain;
  }
}

// Codes of `present` of the numbers of a row of `row` bytes, zeros behind them. What follows the row up to `end` may be
// written, too.
template <int Bits, bool Clamp, class T>
INLINE void row_codes(const T* from, int64_t present, int64_t row, const Quantiser& q, uint8_t* to,
                      const uint8_t* end) {
  constexpr int kParts = Coding<Bits>::kParts;
  const auto codes_of = [&](Two x) INLINE_LAMBDA {
    return joined(T{}, code_of<Clamp>(q, x.a), code_of<Clamp>(q, x.b));
  };
  if (kParts == 4 && row == 16 && present == 64) {  // vectors of two parts each
    const __m512i parts =
        _mm512_or_si512(codes_of(load_two(from)), _mm512_slli_epi16(codes_of(load_two(from + 32)), 4));
    const __m256i bytes = half_of(parts, 0) | _mm256_slli_epi16(half_of(parts, 1), 2);
    store_raw(to, _mm256_cvtepi16_epi8(bytes));
    return;
  }
  const bool all = present == kParts * row;
  if (all && row % 32 == 0) {  // without masks
    for (int64_t i = 0; i < row; i += 32) {
      __m512i packed = codes_of(load_two(from + i));
      for (int j = 1; j < kParts; ++j) {
        packed = _mm512_or_si512(packed, _mm512_slli_epi16(codes_of(load_two(from + i + j * row)), Bits * j));
      }
      store_raw(to + i, _mm512_cvtepi16_epi8(packed));
    }
    return;
  }
  for (int64_t i = 0; i < row; i += 32) {
    const __mmask32 there = first_of_32(row - i);
    __m512i packed;
    if (all) {
      packed = codes_of(load_two(from + i, there));
      for (int j = 1; j < kParts; ++j) {
        packed = _mm512_or_si512(packed, _mm512_slli_epi16(codes_of(load_two(from + i + j * row, there)), Bits * j));
      }
    } else {
      packed = _mm512_setzero_si512();
      for (int j = 0; j < kParts; ++j) {
        const int64_t left = present - i - j * row;
        if (left <= 0) break;
        const __mmask32 some = there & first_of_32(left);
        const __m512i codes = _mm512_maskz_mov_epi16(some, codes_of(load_two(from + i + j * row, some)));
        packed = _mm512_or_si512(packed, _mm512_slli_epi16(codes, Bits * j));
      }
    }
    const __m256i bytes = _mm512_cvtepi16_epi8(packed);
    if (to + i + 32 <= end) store_raw(to + i, bytes);
    else _mm256_mask_storeu_epi8(to + i, there, bytes);
  }
}

// `count` rows of which each has a scale and a zero: their first `present` numbers, codes for `row` bytes.
template <int Bits, class T>
void encode_rows(const uint8_t* const* rows, int64_t count, int64_t present, int64_t row, uint8_t* scale16,
                 uint8_t* zero16, uint8_t* codes, Ahead& ahead) {
  constexpr float kLevels = Coding<Bits>::kLevels;
  constexpr int64_t kBlock = 8;  // vectors of rows
  const uint8_t* const end = codes + count * row;
  for (int64_t first = 0; first < count; first += kBlock * W) {
    const int64_t n = count - first < kBlock * W ? count - first : kBlock * W;
    // All steps before the first code: working one out takes long, but several at the same time hardly longer.
    EachQuantiser<kBlock> each;
    bool plain[kBlock];
    for (int64_t k = 0; k < n; k += W) {
      const uint8_t* const* these = rows + first + k;
      const uint8_t* few[W];
      if (n - k < W) {
        for (int i = 0; i < W; ++i) few[i] = these[i < n - k ? i : 0];
        these = few;
      }
      vf low, high;
      const bool no_nan = row_ranges<T>(these, present, &low, &high, ahead);
      const Step steps(low, high, kLevels);
      store_some(scale16 + 2 * (first + k), narrow(f16{}, steps.scale), n - k < W ? n - k : W);
      store_some(zero16 + 2 * (first + k), narrow(f16{}, steps.zero), n - k < W ? n - k : W);
      const Quantiser quantiser(steps.zero, steps.scale, kLevels);
      plain[k / W] = no_nan && within(low, high, quantiser, quantiser.step);
      each.set(k, quantiser);
    }
    for (int64_t k = 0; k < n; ++k) {
      const T* from = numbers<T>(rows[first + k]);
      uint8_t* to = codes + (first + k) * row;
      if (plain[k / W]) row_codes<Bits, false>(from, present, row, each[k], to, end);
      else row_codes<Bits, true>(from, present, row, each[k], to, end);
      ahead.more();
    }
  }
}

template <int Bits, class T>
void encode_keys(const ColdFormat& f, const ColdTokens& tokens, uint8_t* page, uint8_t* scratch, Ahead& ahead) {
  if (!tokens.by_channel) return encode_tokens<Bits, T>(f, tokens, page, scratch, ahead);
  encode_rows<Bits, T>(tokens.keys, f.dim, tokens.count, f.key_row(), page + f.key_scale(), page + f.key_zero(),
                       page + f.key_codes(), ahead);
}

template <int Bits, class T>
void encode_values(const ColdFormat& f, const ColdTokens& tokens, uint8_t* page, Ahead& ahead) {
  encode_rows<Bits, T>(tokens.values, tokens.count, f.dim, f.value_row(), page + f.value_scale(),
                       page + f.value_zero(), page + f.value_codes(), ahead);
}

// Tokens of up to Lanes neighbouring slots of one page that become neighbours in a block of 32 tokens.
struct Gathered {
  const uint8_t* from;
  __mmask32 lanes;
  uint16_t slots[32];
};

// How a block of up to 32 tokens is put together, in the order of the tokens: those of a page follow each other.
template <int Lanes>
INLINE int gathered(const uint8_t* pool, int64_t stride, int64_t base, const int64_t* page, const int64_t* slot,
                    int64_t count, Gathered* parts) {
  int made = 0;
  const uint8_t* last = nullptr;
  for (int64_t k = 0; k < count; ++k) {
    const uint64_t at = uint64_t(slot[k]);
    const uint8_t* from = pool + page[k] * stride + 2 * (base + int64_t(at / Lanes * Lanes));
    if (from != last) {
      parts[made].from = last = from;
      parts[made++].lanes = 0;
    }
    parts[made - 1].lanes |= __mmask32(1) << k;
    parts[made - 1].slots[k] = uint16_t(at % Lanes);
  }
  return made;
}

template <int Lanes>
INLINE void gather_blocks(int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part,
                          const int64_t* page, const int64_t* slot, int64_t count, uint16_t* to, int64_t to_row) {
  const int64_t step = 2 * part.per_dim;
  for (int64_t first = 0; first < count; first += 32) {
    Gathered parts[32];
    const int made = gathered<Lanes>(pool, stride, part.base, page + first, slot + first,
                                     count - first < 32 ? count - first : 32, parts);
    constexpr int kTogether = 4;  // channels: a part's places are read once for them
    int64_t d = 0;
    const auto fill = [&](auto channels) INLINE_LAMBDA {
      constexpr int kChannels = decltype(channels)::value;
      __m512i rows[kChannels];
      for (int i = 0; i < kChannels; ++i) rows[i] = _mm512_setzero_si512();
      for (int r = 0; r < made; ++r) {
        const __m512i slots = _mm512_loadu_si512(parts[r].slots);
        const uint8_t* from = parts[r].from + d * step;
        for (int i = 0; i < kChannels; ++i) {
          const __m512i row = Lanes == 32 ? _mm512_loadu_si512(from + i * step)
                                          : _mm512_castsi256_si512(load_raw<__m256i>(from + i * step));
          rows[i] = _mm512_mask_permutexvar_epi16(rows[i], parts[r].lanes, slots, row);
        }
      }
      for (int i = 0; i < kChannels; ++i) _mm512_storeu_si512(to + (d + i) * to_row + first, rows[i]);
    };
    for (; d + kTogether <= dim; d += kTogether) fill(std::integral_constant<int, kTogether>{});
    for (; d < dim; ++d) fill(std::integral_constant<int, 1>{});
  }
}

void gather_channels(int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part, const int64_t* page,
                     const int64_t* slot, int64_t count, uint16_t* to, int64_t to_row) {
  if (part.slots % 32 == 0) gather_blocks<32>(dim, pool, stride, part, page, slot, count, to, to_row);
  else gather_blocks<16>(dim, pool, stride, part, page, slot, count, to, to_row);
}
