// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// gather_pages: survivors of a compaction moved between pages. Arguments were checked by deltamem_vllm/ops/gather.py.

#include <cstring>
#include <vector>

#include "isa.h"
#include "memory_stream.h"
#include "page_order.h"
#include "thread_share.h"
#include "token_ahead.h"
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

// Fills some pages at a time, and asks for the tokens of the next ones meanwhile.
class Filler {
 public:
  explicit Filler(const Move& move)
      : move_(move), most_(most(move.page_bytes())), ahead_(move.size, move.dim, move.keys, move.values) {
    for (Batch& batch : batches_) {
      batch.page.resize(most_ * move.slots());
      batch.slot.resize(most_ * move.slots());
    }
  }

  static int64_t most(int64_t page_bytes) {
    const int64_t fit = 32 * 1024 / page_bytes;  // their sources, several times as large, stay in the second cache
    return fit < 1 ? 1 : fit > 16 ? 16 : fit;
  }

  // Pages which(i), first <= i < end, are next. begins(p, run, page): where the page of the pool that run `run` of the
  // tokens of page p comes from stands now. The tokens of the first of them are asked for in `calls` calls of more().
  template <class Which, class Begins>
  void start(int64_t first, int64_t end, const Which& which, const Begins& begins, int64_t calls) {
    plan(batches_[turn_], first, end, which, begins, calls);
  }
  void more() { ahead_.more(); }

  // Fill the pages that start() was called with. to(i): where page which(i) is put together, done(i): it is.
  template <class Which, class Begins, class To, class Done>
  void fill(int64_t first, int64_t end, const Which& which, const Begins& begins, const To& to, const Done& done) {
    const Move& m = move_;
    const int64_t slots = m.slots(), calls = 2 * most_ * ((slots + kTogether - 1) / kTogether);
    for (; first < end; turn_ = 1 - turn_) {
      const Batch& batch = batches_[turn_];
      plan(batches_[1 - turn_], first + batch.count, end, which, begins, calls);
      for (int64_t i = 0; i < batch.count; ++i, ++first) {
        const uint8_t* const* page = &batch.page[i * slots];
        const int64_t* slot = &batch.slot[i * slots];
        uint8_t* target = to(first);
        fill_part(m.size, m.dim, m.keys, page, slot, target, ahead_);
        fill_part(m.size, m.dim, m.values, page, slot, target, ahead_);
        done(first);
      }
    }
  }

 private:
  struct Batch {
    std::vector<const uint8_t*> page;
    std::vector<int64_t> slot;
    int64_t count = 0;  // pages
  };

  template <class Which, class Begins>
  void plan(Batch& batch, int64_t first, int64_t end, const Which& which, const Begins& begins, int64_t calls) {
    const int64_t slots = move_.slots();
    batch.count = end - first < most_ ? end - first : most_;
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t p = which(first + i), *page = move_.page + p * slots;
      const uint8_t** own = &batch.page[i * slots];
      int64_t run = 0;
      for (int64_t k = 0; k < slots; ++k) {
        own[k] = k > 0 && page[k] == page[k - 1] ? own[k - 1] : begins(p, run++, page[k]);
      }
      std::memcpy(&batch.slot[i * slots], move_.slot + p * slots, slots * sizeof(int64_t));
    }
    ahead_.plan(batch.page.data(), batch.slot.data(), batch.count * slots, calls);
  }

  const Move& move_;
  int64_t most_;
  TokensAhead ahead_;
  Batch batches_[2];
  int turn_ = 0;
};

void move_apart(const Move& move, bool streamed) {
  const int64_t bytes = move.page_bytes();
  const auto begins = [&](int64_t, int64_t, int64_t page) { return move.pool + page * move.stride; };
  const auto which = [](int64_t i) { return i; };
#pragma omp parallel if (move.pages > 1)
  {
    Filler filler(move);
    const LineBuffer buffer(bytes);
    const auto to = [&](int64_t p) { return streamed ? buffer.data() : move.target(p); };
    const auto done = [&](int64_t p) {
      if (streamed) copy_kernels().stream(buffer.data(), bytes, move.target(p));
    };
    const Share own = share_of_thread(0, move.pages, 1);
    filler.start(own.first, own.end, which, begins, 1);
    filler.more();
    filler.fill(own.first, own.end, which, begins, to, done);
    finish_streaming();
  }
}

// Targets among the sources. `together` pages are filled before the first of them is written. `memory` holds these and
// then, at most as many pages as are moved, what stood in pages that were written while tokens of theirs were wanted.
void move_in_place(const Move& move, bool streamed, uint8_t* memory, int64_t together) {
  const int64_t bytes = move.page_bytes();
  PageOrder order(move.page, move.targets, move.pages, move.slots());
  uint8_t* const saved = memory + together * bytes;
  const auto begins = [&](int64_t p, int64_t run, int64_t page) -> const uint8_t* {
    const int64_t place = order.saved_source(p, run);
    return place < 0 ? move.pool + page * move.stride : saved + place * bytes;
  };
  const auto which = [&](int64_t i) { return order[i]; };
#pragma omp parallel if (move.pages > 1)
  {
    Filler filler(move);
    const auto end_of = [&](int64_t start) { return start + together < move.pages ? start + together : move.pages; };
    Share own = share_of_thread(0, end_of(0), 1);
    filler.start(own.first, own.end, which, begins, 1);
    filler.more();
    for (int64_t start = 0; start < move.pages; start += together) {
      const int64_t end = end_of(start);
      const auto to = [&](int64_t i) { return memory + (i - start) * bytes; };
      filler.fill(own.first, own.end, which, begins, to, [](int64_t) {});
#pragma omp barrier
#pragma omp single
      order.about_to_write(start, end);
      const Share next = share_of_thread(end, end_of(end), 1);
      filler.start(next.first, next.end, which, begins, own.end - own.first + 1);  // a thread may have nothing to write
      for (int64_t i = own.first; i < own.end; ++i) {
        uint8_t* target = move.target(order[i]);
        const int64_t place = order.saved(order[i]);
        if (place >= 0) std::memcpy(saved + place * bytes, target, bytes);
        filler.more();
        if (streamed) copy_kernels().stream(to(i), bytes, target);
        else std::memcpy(target, to(i), bytes);
      }
      own = next;
#pragma omp barrier
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
