// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Tokens asked of the memory while others are moved. It delivers most when it is asked for several pages in turn (for
// one page after the other it takes a third longer), and for some lines at a time: what it is asked for while it has
// enough to do seems to be forgotten.

#pragma once

#include <cstdint>
#include <vector>

#include "token_move.h"

class TokensAhead {
 public:
  TokensAhead(int64_t size, int64_t dim, const PartLayout& keys, const PartLayout& values)
      : size_(size), dim_(dim), parts_{keys, values} {}

  // From now on it is about tokens k < count, in slot[k] of the page that begins at page[k]; both have to stay. They
  // are asked for in `calls` calls of more().
  void plan(const uint8_t* const* page, const int64_t* slot, int64_t count, int64_t calls);
  void more();

 private:
  static constexpr int64_t kWays = 4;  // places that are asked for in turn

  void find_columns(const PartLayout& part);
  int64_t ask_columns(int64_t lines);  // returns how many are left to ask for
  void ask_rows(int64_t lines);
  int64_t row_lines() const;

  int64_t size_, dim_;
  PartLayout parts_[2];
  const uint8_t* const* page_ = nullptr;
  const int64_t* slot_ = nullptr;
  int64_t count_ = 0, each_call_ = 0;
  // Where the elements of a token stand apart, its neighbours share their lines: a column has a line of each channel.
  struct Column {
    const uint8_t* from;
    int64_t step;  // bytes to the next line
    int64_t lines;
  };
  std::vector<Column> columns_;
  int64_t first_column_ = 0, line_ = 0;  // asked for: all columns before, and so many lines of the next ones
  int64_t row_ = 0;                      // asked for: all rows before, in turn
};
