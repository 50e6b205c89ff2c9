// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// page_utility: scores of tokens where they stand, in pages. Checks the tables and shares sequences out to threads.

#include "page_utility_types.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "isa.h"

namespace {

// What the functions return; ops/page_utility.py words them.
enum Fault : int64_t { kFine = 0, kBadLength = 1, kBadPage = 2, kNoMemory = 3 };

// With fewer tokens in all, waking other threads takes longer than the work.
constexpr int64_t kWorthThreads = 1024;

UtilityKernels choose() {
  const int isa = deltamem_isa();
#if DELTAMEM_X86
  if (isa >= kAvx512) return utility_avx512();
  if (isa >= kAvx2) return utility_avx2();
#endif
  (void)isa;
  return utility_portable();
}

int64_t all_tokens(const SequencePages& pages, int64_t s) {
  return pages.seq_lens[s] + (pages.older_start == nullptr ? 0 : pages.older_start[s + 1] - pages.older_start[s]);
}

// Every entry that will be read, once: a wrong one must never be followed.
int64_t check(const SequencePages& pages, int64_t* where) {
  for (int64_t s = 0; s < pages.sequences; ++s) {
    *where = s;
    const int64_t tokens = pages.seq_lens[s];
    if (tokens < 0 || tokens > pages.table_width * pages.block_size) return kBadLength;
    const int32_t* table = pages.block_table + s * pages.table_stride;
    const int64_t count = (tokens + pages.block_size - 1) / pages.block_size;
    uint32_t most = 0;  // negative numbers become large ones
    for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint32_t>(table[i]));
    if (count > 0 && most >= pages.num_pages) return kBadPage;
  }
  return kFine;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Calls work(sequence, scratch) for all sequences. Each is one thread's, so results do not depend on their number.
template <class Work>
int64_t by_sequence(const SequencePages& pages, size_t bytes, const Work& work) {
  int64_t tokens = 0;
  for (int64_t s = 0; s < pages.sequences; ++s) tokens += all_tokens(pages, s);
  bool short_of_memory = false;
#pragma omp parallel if (tokens >= kWorthThreads) reduction(|| : short_of_memory)
  {
    const std::unique_ptr<char, Free> scratch(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    short_of_memory = scratch == nullptr;
    // The longest of them may be several times as long as others.
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < pages.sequences; ++s) {
      if (scratch != nullptr) work(s, scratch.get());
    }
  }
  return short_of_memory ? kNoMemory : kFine;
}

}  // namespace

// Scores by what a window of queries attends to. Returns kFine, or which Fault with the sequence in *where.
DELTAMEM_API int64_t deltamem_page_utility(const WindowCall* call, int64_t* where) {
  *where = 0;
  const int64_t fault = check(call->pages, where);
  if (fault != kFine) return fault;
  int64_t longest = 0;
  for (int64_t s = 0; s < call->pages.sequences; ++s) longest = std::max(longest, all_tokens(call->pages, s));
  const UtilityKernels kernels = choose();
  return by_sequence(call->pages, kernels.window_bytes(*call, longest),
                     [&](int64_t s, char* scratch) { kernels.window(*call, s, scratch); });
}

// Scores by keys and values alone. As above.
DELTAMEM_API int64_t deltamem_feature_scores(const FeatureCall* call, int64_t* where) {
  *where = 0;
  const int64_t fault = check(call->pages, where);
  if (fault != kFine) return fault;
  const UtilityKernels kernels = choose();
  return by_sequence(call->pages, kernels.feature_bytes(*call),
                     [&](int64_t s, char* scratch) { kernels.features(*call, s, scratch); });
}
