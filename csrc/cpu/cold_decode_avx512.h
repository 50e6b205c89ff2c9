// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Reading a page with AVX-512. Included by cold_codec.inl, in each file's anonymous namespace.

// All codes of less than 8 bits as floats, over and over: the lowest bits of an index choose one of 16.
template <int Bits>
INLINE vf all_codes() {
  vf codes;
  for (int i = 0; i < W; ++i) codes[i] = float(i & int(Coding<Bits>::kMask));
  return codes;
}

// The codes in part j of bytes, as floats.
template <int Bits>
INLINE vf codes_in(vu packed, int j, vf all) {
  if constexpr (Bits == 8) return _mm512_cvtepi32_ps(bits_as<__m512i>(packed));
  else return _mm512_permutexvar_ps(bits_as<__m512i>(packed >> (Bits * j)), all);
}

// zero + code * scale. The product has no more than 8 and 11 bits: it is exact, so that there is only one rounding.
INLINE vf value_of(vf code, vf scale, vf zero) { return plus_product(code, scale, zero); }

// 16 bytes of each of 16 rows -> 16 bytes of each of 16 columns, [16, 16]. Rows from `rows` on are not there.
INLINE void transpose_rows(const uint8_t* from, int64_t row, int64_t rows, uint8_t* to) {
  const auto load_row = [&](int64_t k) INLINE_LAMBDA { return load_raw<__m128i>(from + (k < rows ? k : 0) * row); };
  __m512i a[4], b[4];
  for (int k = 0; k < 4; ++k) {  // rows k, k + 4, k + 8 and k + 12
    a[k] = _mm512_castsi128_si512(load_row(k));
    a[k] = _mm512_inserti32x4(a[k], load_row(k + 4), 1);
    a[k] = _mm512_inserti32x4(a[k], load_row(k + 8), 2);
    a[k] = _mm512_inserti32x4(a[k], load_row(k + 12), 3);
  }
  // In each quarter: the bytes of 4 rows side by side.
  b[0] = _mm512_unpacklo_epi8(a[0], a[1]);
  b[1] = _mm512_unpackhi_epi8(a[0], a[1]);
  b[2] = _mm512_unpacklo_epi8(a[2], a[3]);
  b[3] = _mm512_unpackhi_epi8(a[2], a[3]);
  a[0] = _mm512_unpacklo_epi16(b[0], b[2]);
  a[1] = _mm512_unpackhi_epi16(b[0], b[2]);
  a[2] = _mm512_unpacklo_epi16(b[1], b[3]);
  a[3] = _mm512_unpackhi_epi16(b[1], b[3]);
  // Now the quarters side by side.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int k = 0; k < 4; ++k) _mm512_storeu_si512(to + 64 * k, _mm512_permutexvar_epi32(order, a[k]));
}

template <int Bits, class T>
void decode_keys(const ColdFormat& f, const uint8_t* page, int64_t count, T* keys, uint8_t* scratch, Ahead& ahead) {
  constexpr int kParts = Coding<Bits>::kParts;
  const int64_t dim = f.dim, row = f.key_row(), padded = round_up(row, 16);
  const auto* scale16 = reinterpret_cast<const f16*>(page + f.key_scale());
  const auto* zero16 = reinterpret_cast<const f16*>(page + f.key_zero());
  const uint8_t* codes = page + f.key_codes();
  uint8_t few[32] = {};
  if (f.page_bytes - f.value_codes() < 16) {  // tiny pages: rows are read 16 bytes at a time
    std::memcpy(few, codes, dim * row);
    codes = few;
  }
  const vf all = all_codes<Bits>();
  for (int64_t d = 0; d < dim; d += 32) {
    const int64_t n = dim - d < 32 ? dim - d : 32;
    uint8_t *first = scratch, *last = scratch + 16 * padded;  // [padded, 16] each
    for (int64_t i = 0; i < row; i += 16) {
      transpose_rows(codes + d * row + i, row, n, first + 16 * i);
      if (n > 16) transpose_rows(codes + (d + 16) * row + i, row, n - 16, last + 16 * i);
    }
    if (n <= 16) last = first;
    const int64_t one = n < 16 ? n : 16, other = n - one;
    const vf scale_a = load_part(scale16 + d, one), zero_a = load_part(zero16 + d, one);
    const vf scale_b = load_part(scale16 + d + one, other), zero_b = load_part(zero16 + d + one, other);
    for (int64_t i = 0; i < row && i < count; ++i) {
      const vu a = load_bytes(first + 16 * i), b = load_bytes(last + 16 * i);
      for (int j = 0; j < kParts; ++j) {
        const int64_t t = i + j * row;
        if (t >= count) break;
        store_halves(keys + t * dim + d, value_of(codes_in<Bits>(a, j, all), scale_a, zero_a),
                     value_of(codes_in<Bits>(b, j, all), scale_b, zero_b), n);
      }
      ahead.more();
    }
  }
}

// What each code of one token stands for, in both halves of a vector of numbers of T.
template <class T>
INLINE __m512i table_of(vf all, float scale, float zero) {
  const vf x = value_of(all, splat(scale), splat(zero));
  return _mm512_broadcast_i64x4(bits_as<__m256i>(narrow(T{}, x)));
}

// The value of a token, `row` bytes of codes. With fewer than 8 bits there are at most 16 different numbers: they are
// worked out first and looked up.
template <int Bits, class T>
INLINE void decode_value(const uint8_t* from, int64_t row, vf all, float scale, float zero, T* to) {
  constexpr int kParts = Coding<Bits>::kParts;
  if constexpr (Bits < 8 && sizeof(T) == 2) {
    const __m512i table = table_of<T>(all, scale, zero);
    if (kParts == 4 && row == 16) {  // vectors of two parts
      const __m256i bytes = _mm256_cvtepu8_epi16(load_raw<__m128i>(from));
      const __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 2), 1);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes, table));
      _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
      return;
    }
    for (int64_t i = 0; i < row; i += 32) {
      const int64_t n = row - i < 32 ? row - i : 32;
      const __m256i bytes = n == 32 ? load_raw<__m256i>(from + i) : _mm256_maskz_loadu_epi8(first_of_32(n), from + i);
      const __m512i codes = _mm512_cvtepu8_epi16(bytes);
      for (int j = 0; j < kParts; ++j) {
        const __m512i x = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, Bits * j), table);
        if (n == 32) _mm512_storeu_si512(to + i + j * row, x);
        else _mm512_mask_storeu_epi16(to + i + j * row, first_of_32(n), x);
      }
    }
  } else {
    const vf scales = splat(scale), zeros = splat(zero);
    for (int64_t i = 0; i < row; i += 32) {
      const int64_t n = row - i < 32 ? row - i : 32;
      const __m256i bytes = n == 32 ? load_raw<__m256i>(from + i) : _mm256_maskz_loadu_epi8(first_of_32(n), from + i);
      const vu a = wide(bits_as<vb>(_mm256_castsi256_si128(bytes)));
      const vu b = wide(bits_as<vb>(_mm256_extracti128_si256(bytes, 1)));
      for (int j = 0; j < kParts; ++j) {
        store_halves(to + i + j * row, value_of(codes_in<Bits>(a, j, all), scales, zeros),
                     value_of(codes_in<Bits>(b, j, all), scales, zeros), n);
      }
    }
  }
}

template <int Bits, class T>
void decode_values(const ColdFormat& f, const uint8_t* page, int64_t count, T* values, Ahead& ahead) {
  const int64_t dim = f.dim, row = f.value_row();
  const auto* scale16 = reinterpret_cast<const f16*>(page + f.value_scale());
  const auto* zero16 = reinterpret_cast<const f16*>(page + f.value_zero());
  const vf all = all_codes<Bits>();
  for (int64_t first = 0; first < count; first += W) {
    const int64_t n = count - first < W ? count - first : W;
    float scales[W], zeros[W];
    store(scales, load_part(scale16 + first, n));
    store(zeros, load_part(zero16 + first, n));
    for (int64_t k = 0; k < n; ++k) {
      decode_value<Bits>(page + f.value_codes() + (first + k) * row, row, all, scales[k], zeros[k],
                         values + (first + k) * dim);
      ahead.more();
    }
  }
}
