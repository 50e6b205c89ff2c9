// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// An order in which pages can be overwritten with tokens of each other.

#pragma once

#include <cstdint>
#include <vector>

// Page targets[p] gets tokens of the pages page[p, 0 ... slots - 1]. It is best written when nobody wants its old
// tokens any more. Cycles make that impossible: then what stands in one page of the cycle is saved elsewhere first. The
// order only makes such pages few: whatever it is, a page is saved if anybody still wants it. Fewer than 2^31 pages.
class PageOrder {
 public:
  PageOrder(const int64_t* page, const int64_t* targets, int64_t pages, int64_t slots);

  // The p that comes at place i.
  int64_t operator[](int64_t i) const { return order_[i]; }

  // Pages at places first to end - 1 have been filled, somewhere else, and are going to be written. Decides what has to
  // be saved before.
  void about_to_write(int64_t first, int64_t end);

  // Where the old tokens of page targets[p] are saved, a small number; -1 if they stand in the page, or nobody wants
  // them any more.
  int64_t saved(int64_t p) const { return saved_[p]; }

  // The same for the page that the tokens of targets[p] come from, in run `run` of them: tokens of one page that follow
  // each other. -1, too, if that is no target.
  int64_t saved_source(int64_t p, int64_t run) const {
    const int32_t from = runs_[start_[p] + run];
    return from < 0 ? -1 : saved_[from];
  }

 private:
  int32_t find(int64_t page) const;  // its p, -1 if it is no target
  static bool wants(int64_t p, int32_t from) { return from >= 0 && from != p; }
  uint64_t after(uint64_t entry) const { return (entry + 1) & ((uint64_t(1) << bits_) - 1); }
  uint64_t hash(int64_t page) const { return uint64_t(page) * 0x9E3779B97F4A7C15u >> (64 - bits_); }
  void find_order();

  const int64_t* targets_;
  int64_t pages_;
  int bits_ = 1;                 // of a hash: there are 2^bits entries in the table
  std::vector<int32_t> table_;   // p at the hash of targets[p], or at the next entry that was free; else -1
  std::vector<int32_t> runs_;    // for every run of the tokens of each p, the p of the page it comes from or -1
  std::vector<int64_t> start_;   // where those of each p start
  std::vector<int32_t> wanted_;  // how often pages that were not filled yet take tokens from each p, itself aside
  std::vector<int32_t> order_, saved_, free_;
  int32_t places_ = 0;  // that were ever used at the same time
};
