// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include "token_ahead.h"

#include "memory_stream.h"

void TokensAhead::plan(const uint8_t* const* page, const int64_t* slot, int64_t count, int64_t calls) {
  page_ = page;
  slot_ = slot;
  count_ = count;
  columns_.clear();
  first_column_ = line_ = row_ = 0;
  int64_t lines = 0;
  for (const PartLayout& part : parts_) {
    if (part.per_dim == 1) lines += count * row_lines();
    else find_columns(part);
  }
  for (const Column& column : columns_) lines += column.lines;
  each_call_ = (lines + calls - 1) / calls;
}

void TokensAhead::find_columns(const PartLayout& part) {
  const int64_t channel = part.per_dim * size_;
  const int64_t step = channel < kLine ? kLine / channel * channel : channel;  // short channels share lines
  const uint8_t* last = nullptr;
  for (int64_t k = 0; k < count_; ++k) {
    const uint8_t* from = line_of(page_[k] + (part.base + slot_[k] * part.per_slot) * size_);
    if (from == last) continue;
    columns_.push_back({last = from, step, (dim_ * channel + step - 1) / step});
  }
}

int64_t TokensAhead::row_lines() const { return (dim_ * size_ + kLine - 1) / kLine; }

int64_t TokensAhead::ask_columns(int64_t lines) {
  const int64_t columns = int64_t(columns_.size());
  while (lines > 0 && first_column_ < columns) {
    const int64_t end = first_column_ + kWays < columns ? first_column_ + kWays : columns;
    int64_t longest = 0;
    for (int64_t c = first_column_; c < end; ++c) longest = columns_[c].lines > longest ? columns_[c].lines : longest;
    for (; line_ < longest && lines > 0; ++line_, lines -= end - first_column_) {
      for (int64_t c = first_column_; c < end; ++c) {
        if (line_ < columns_[c].lines) prefetch_line(columns_[c].from + line_ * columns_[c].step);
      }
    }
    if (line_ < longest) break;
    first_column_ = end;
    line_ = 0;
  }
  return lines;
}

void TokensAhead::ask_rows(int64_t lines) {
  const int64_t each = (count_ + kWays - 1) / kWays, of_row = row_lines();
  for (; lines > 0 && row_ < each * kWays; ++row_) {
    const int64_t k = row_ % kWays * each + row_ / kWays;
    if (k >= count_) continue;
    for (const PartLayout& part : parts_) {
      if (part.per_dim != 1) continue;
      const uint8_t* row = page_[k] + (part.base + slot_[k] * part.per_slot) * size_;
      const uint8_t* const end = row + dim_ * size_;
      for (const uint8_t* at = line_of(row); at < end; at += kLine) prefetch_line(at);
      lines -= of_row;
    }
  }
}

void TokensAhead::more() { ask_rows(ask_columns(each_call_)); }
