// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Where the tokens of a cold page come from when they are taken out of the pool.

#pragma once

#include <cstdint>

#include "cold_ahead.h"
#include "cold_codec.h"
#include "token_move.h"

// Parts of one piece of memory, each beginning with a line.
class Pieces {
 public:
  explicit Pieces(uint8_t* from) : at_(from) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return piece;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return lines_of(count * int64_t(sizeof(T))) * kLineBytes;
  }

 private:
  uint8_t* at_;
};

// One part of the tokens, keys or values, of every page.
class PooledPart {
 public:
  enum Way { kWhere, kChannels, kCopies };

  PooledPart(int64_t size, int64_t dim, const uint8_t* pool, int64_t stride, const PartLayout& part, bool channels)
      : size_(size), dim_(dim), stride_(stride), pool_(pool), part_(part) {
    const bool by_channel = channels && size == 2 && part.per_slot == 1 && part.slots % 16 == 0;
    // Tokens whose elements lie side by side are read where they stand.
    way_ = part.per_dim == 1 ? kWhere : by_channel ? kChannels : kCopies;
    lanes_shift_ = part.slots % 32 == 0 ? 5 : 4;
  }

  Way way() const { return way_; }

  // The places that reading a page's tokens begins at: every token if they are read where they stand, every row of
  // slots that has some of them if they are gathered. `places` has room for all tokens.
  Lines plan(const int64_t* page, const int64_t* slot, int64_t count, const uint8_t** places) const {
    if (way_ == kCopies) return {};
    if (way_ == kWhere) {
      for (int64_t t = 0; t < count; ++t) {
        places[t] = pool_ + page[t] * stride_ + (part_.base + slot[t] * part_.per_slot) * size_;
      }
      return {places, count, lines_of(dim_ * size_), kLineBytes};
    }
    int64_t made = 0;
    const uint8_t* last = nullptr;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = slot[t] >> lanes_shift_ << lanes_shift_;
      const uint8_t* from = pool_ + page[t] * stride_ + (part_.base + first) * size_;
      places[made] = from;
      made += from != last;
      last = from;
    }
    const int64_t step = part_.per_dim * size_;
    if (step > kLineBytes) return {places, made, dim_, step};
    return {places, made, lines_of((dim_ - 1) * step + (size_ << lanes_shift_)), kLineBytes};
  }

  // Rows for the codec, of tokens or of channels: those of plan(), or what is read into `memory`.
  const uint8_t* const* read(const ColdKernels& kernels, const int64_t* page, const int64_t* slot, int64_t count,
                             int64_t channel_row, const uint8_t** places, const uint8_t** rows,
                             uint8_t* memory) const {
    if (way_ == kWhere) return places;
    if (way_ == kChannels) {
      kernels.gather_channels(dim_, pool_, stride_, part_, page, slot, count, reinterpret_cast<uint16_t*>(memory),
                              channel_row);
      for (int64_t d = 0; d < dim_; ++d) rows[d] = memory + 2 * d * channel_row;
    } else {
      gather_part(size_, dim_, pool_, stride_, part_, page, slot, count, memory);
      for (int64_t t = 0; t < count; ++t) rows[t] = memory + t * dim_ * size_;
    }
    return rows;
  }

 private:
  int64_t size_, dim_, stride_, lanes_shift_;
  const uint8_t* pool_;
  PartLayout part_;
  Way way_;
};
