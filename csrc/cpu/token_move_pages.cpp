// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// gather_pages: survivors of a compaction moved between pages. Arguments were checked by deltamem_vllm/ops/gather.py.

#include <cstring>
#include <vector>

#include "isa.h"
#include "memory_stream.h"
#include "page_order.h"
#include "token_move.h"

namespace {

// A move as Python asks for it: slot s of page targets[p] gets token (page[p, s], slot[p, s]).
struct Move {
  int64_t size, dim;
  uint8_t* pool;
  int64_t stride;
  PartLayout keys, values;
  const int64_t *page, *slot, *targets;
  int64_t pages;

  int64_t slots() const { return keys.slots; }
  int64_t page_bytes() const { return 2 * slots() * dim * size; }
  uint8_t* target(int64_t p) const { return pool + targets[p] * stride; }
};

// Fills some pages at a time: the memory is asked for all their tokens first.
class Filler {
 public:
  explicit Filler(const Move& move)
      : move_(move), most_(most(move.page_bytes())), begin_(most_ * move.slots()), slot_(most_ * move.slots()) {}

  static int64_t most(int64_t page_bytes) {
    const int64_t fit = 32 * 1024 / page_bytes;  // their sources, several times as large, stay in the second cache
    return fit < 1 ? 1 : fit > 16 ? 16 : fit;
  }

  // Fill pages which(i), first <= i < end. begins(page): where this page of the pool stands now. to(i): where page
  // which(i) is put together, done(i): it is.
  template <class Which, class Begins, class To, class Done>
  void fill(int64_t first, int64_t end, const Which& which, const Begins& begins, const To& to, const Done& done) {
    const Move& m = move_;
    const int64_t slots = m.slots();
    for (; first < end; first += most_) {
      const int64_t n = end - first < most_ ? end - first : most_;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t from = which(first + i) * slots;
        for (int64_t k = 0; k < slots; ++k) {
          const bool again = k > 0 && m.page[from + k] == m.page[from + k - 1];
          begin_[i * slots + k] = again ? begin_[i * slots + k - 1] : begins(m.page[from + k]);
          slot_[i * slots + k] = m.slot[from + k];
        }
      }
      prefetch_part(m.size, m.dim, m.keys, begin_.data(), slot_.data(), n, slots);
      prefetch_part(m.size, m.dim, m.values, begin_.data(), slot_.data(), n, slots);
      for (int64_t i = 0; i < n; ++i) {
        uint8_t* page = to(first + i);
        fill_part(m.size, m.dim, m.keys, &begin_[i * slots], &slot_[i * slots], page);
        fill_part(m.size, m.dim, m.values, &begin_[i * slots], &slot_[i * slots], page);
        done(first + i);
      }
    }
  }

 private:
  const Move& move_;
  int64_t most_;
  std::vector<const uint8_t*> begin_;
  std::vector<int64_t> slot_;
};

void move_apart(const Move& move, bool streamed) {
  const int64_t bytes = move.page_bytes(), most = Filler::most(bytes), parts = (move.pages + most - 1) / most;
  const auto begins = [&](int64_t page) { return move.pool + page * move.stride; };
  const auto which = [](int64_t i) { return i; };
#pragma omp parallel if (move.pages > 1)
  {
    Filler filler(move);
    const LineBuffer buffer(bytes);
    const auto to = [&](int64_t p) { return streamed ? buffer.data() : move.target(p); };
    const auto done = [&](int64_t p) {
      if (streamed) copy_kernels().stream(buffer.data(), bytes, move.target(p));
    };
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * most, end = first + most < move.pages ? first + most : move.pages;
      filler.fill(first, end, which, begins, to, done);
    }
    finish_streaming();
  }
}

// Targets among the sources. `together` pages are filled before the first of them is written. `memory` holds these and
// then, at most as many pages as are moved, what stood in pages that were written while tokens of theirs were wanted.
void move_in_place(const Move& move, bool streamed, uint8_t* memory, int64_t together) {
  const int64_t bytes = move.page_bytes(), most = Filler::most(bytes);
  PageOrder order(move.page, move.targets, move.pages, move.slots());
  uint8_t* const saved = memory + together * bytes;
  const auto begins = [&](int64_t page) -> const uint8_t* {
    const int64_t place = order.saved(page);
    return place < 0 ? move.pool + page * move.stride : saved + place * bytes;
  };
  const auto which = [&](int64_t i) { return order[i]; };
#pragma omp parallel if (move.pages > 1)
  {
    Filler filler(move);
    for (int64_t start = 0; start < move.pages; start += together) {
      const int64_t end = start + together < move.pages ? start + together : move.pages;
      const auto to = [&](int64_t i) { return memory + (i - start) * bytes; };
#pragma omp for schedule(static)
      for (int64_t first = start; first < end; first += most) {
        filler.fill(first, first + most < end ? first + most : end, which, begins, to, [](int64_t) {});
      }
#pragma omp single
      order.about_to_write(start, end);
#pragma omp for schedule(static)
      for (int64_t i = start; i < end; ++i) {
        uint8_t* target = move.target(order[i]);
        const int64_t place = order.saved(move.targets[order[i]]);
        if (place >= 0) std::memcpy(saved + place * bytes, target, bytes);
        if (streamed) copy_kernels().stream(to(i), bytes, target);
        else std::memcpy(target, to(i), bytes);
      }
    }
    finish_streaming();
  }
}

}  // namespace

// Tokens (page[p, s], slot[p, s]) of the pool -> slot s of page targets[p]. `streamed`: what is written does not fit
// into the caches. No source is among the targets, or `memory` has room for together + pages of them.
DELTAMEM_API void deltamem_gather_pages(int64_t size, int64_t dim, uint8_t* pool, int64_t stride,
                                        const int64_t* layout, const int64_t* page, const int64_t* slot,
                                        const int64_t* targets, int64_t pages, int streamed, uint8_t* memory,
                                        int64_t together) {
  const Move move{size, dim, pool, stride, key_layout(layout), value_layout(layout), page, slot, targets, pages};
  if (memory == nullptr) move_apart(move, streamed);
  else move_in_place(move, streamed, memory, together);
}
