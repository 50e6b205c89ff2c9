// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Reading a page, W numbers at a time with what every machine has. Included by cold_codec.inl, in each file's anonymous
// namespace.

// zero + code * scale of `n` neighbouring numbers, W at most.
template <class T>
INLINE void put(T* to, vf codes, vf scale, vf zero, int64_t n) {
#if defined(__AVX2__)
  const vf x = plus_product(codes, scale, zero);  // a product of 8 by 11 bits is exact: there is only one rounding
#else
  const vf x = zero + codes * scale;
#endif
  if (n == W) store(to, x);
  else store_part(to, x, n);
}

template <int Bits>
INLINE vf part_of(vu packed, int j) {
  return __builtin_convertvector(bits_as<vi>(packed >> (Bits * j) & Coding<Bits>::kMask), vf);
}

template <int Bits, class T>
void decode_keys(const ColdFormat& f, const uint8_t* page, int64_t count, T* keys, uint8_t* scratch, Ahead& ahead) {
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
      ahead.more();
    }
  }
}

template <int Bits, class T>
void decode_values(const ColdFormat& f, const uint8_t* page, int64_t count, T* values, Ahead& ahead) {
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
    ahead.more();
  }
}
