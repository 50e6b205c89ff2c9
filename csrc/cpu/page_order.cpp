// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include "page_order.h"

PageOrder::PageOrder(const int64_t* page, const int64_t* targets, int64_t pages, int64_t slots)
    : targets_(targets), pages_(pages), start_(pages + 1), wanted_(pages), saved_(pages, -1) {
  while ((int64_t(1) << bits_) < 2 * pages) ++bits_;
  table_.assign(uint64_t(1) << bits_, -1);
  for (int64_t p = 0; p < pages; ++p) {
    uint64_t at = hash(targets[p]);
    while (table_[at] >= 0) at = after(at);
    table_[at] = int32_t(p);
  }
  for (int64_t p = 0; p < pages; ++p) {
    const int64_t* own = page + p * slots;
    for (int64_t k = 0; k < slots; ++k) {
      if (k > 0 && own[k] == own[k - 1]) continue;
      runs_.push_back(find(own[k]));
      if (wants(p, runs_.back())) ++wanted_[runs_.back()];
    }
    start_[p + 1] = int64_t(runs_.size());
  }
  find_order();
}

int32_t PageOrder::find(int64_t page) const {
  for (uint64_t at = hash(page); table_[at] >= 0; at = after(at)) {
    if (targets_[table_[at]] == page) return table_[at];
  }
  return -1;
}

void PageOrder::find_order() {
  std::vector<int32_t> wanted = wanted_;
  std::vector<bool> listed(pages_);
  const auto list = [&](int64_t p) {
    order_.push_back(int32_t(p));
    listed[p] = true;
  };
  for (int64_t p = 0; p < pages_; ++p) {
    if (wanted[p] == 0) list(p);
  }
  int64_t oldest = 0;  // all before are listed
  for (int64_t i = 0; i < pages_; ++i) {
    if (i == int64_t(order_.size())) {  // only cycles are left, and what leads out of them
      while (listed[oldest]) ++oldest;
      list(oldest);
    }
    for (int64_t r = start_[order_[i]]; r < start_[order_[i] + 1]; ++r) {
      const int32_t from = runs_[r];
      if (wants(order_[i], from) && --wanted[from] == 0 && !listed[from]) list(from);
    }
  }
}

void PageOrder::about_to_write(int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) {
    for (int64_t r = start_[order_[i]]; r < start_[order_[i] + 1]; ++r) {
      const int32_t from = runs_[r];
      if (!wants(order_[i], from) || --wanted_[from] > 0 || saved_[from] < 0) continue;
      free_.push_back(saved_[from]);
      saved_[from] = -1;
    }
  }
  for (int64_t i = first; i < end; ++i) {
    if (wanted_[order_[i]] == 0) continue;
    if (free_.empty()) free_.push_back(places_++);
    saved_[order_[i]] = free_.back();
    free_.pop_back();
  }
}
