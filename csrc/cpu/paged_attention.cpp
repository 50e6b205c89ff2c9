// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Attention over hot and cold pages: checks the tables, splits the work, runs it and merges the parts.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"
#include "paged_attention_types.h"

namespace {

// What deltamem_paged_attention returns; ops/paged_attention.py words them.
enum Fault : int64_t { kFine = 0, kBadSequence = 1, kBadHotPage = 2, kBadColdPage = 3, kNoMemory = 4 };

// With fewer tokens to read in all, waking other threads takes longer than the work.
constexpr int64_t kWorthThreads = 2048;
// Parts for each thread, if sequences must be split: uneven parts then still end together.
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kFewestTokens = 512;  // of a part

AttentionKernels choose(int64_t asked) {
  int isa = deltamem_isa();
  if (asked >= 0 && asked < isa) isa = static_cast<int>(asked);
#if defined(__x86_64__)
  if (isa >= kAvx512Bf16 && __builtin_cpu_supports("avx512vnni")) return attention_avx512bf16();
  if (isa >= kAvx512) return attention_avx512();
  if (isa >= kAvx2) return attention_avx2();
#endif
  return attention_portable();
}

// Every entry that will be read, once: a wrong one must never be followed.
int64_t check(const AttentionCall& call, int64_t* where) {
  const int32_t* start = call.query_start_loc;
  for (int64_t s = 0; s < call.sequences; ++s) {
    *where = s;
    const int64_t tokens = call.seq_lens[s], hot = (tokens + call.block_size - 1) / call.block_size;
    if (start[s] < 0 || start[s + 1] < start[s] || start[s + 1] > call.tokens) return kBadSequence;
    if (tokens < 0 || hot > call.block_table_width) return kBadSequence;
    const int64_t cold = call.bits != 0 ? call.cold_pages[s] : 0;
    if (cold < 0 || (cold > 0 && cold > call.cold_table_width)) return kBadSequence;
    if (start[s] == start[s + 1]) continue;
    const auto outside = [&](const int32_t* table, int64_t count) {
      uint32_t most = 0;  // negative numbers become large ones
      for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint32_t>(table[i]));
      return count > 0 && most >= call.num_pages;
    };
    if (outside(call.block_table + s * call.block_table_stride, hot)) return kBadHotPage;
    if (cold > 0 && outside(call.cold_table + s * call.cold_table_stride, cold)) return kBadColdPage;
  }
  return kFine;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Merge {
  size_t first, count;  // of the parts, neighbours in the plan
};

struct Plan {
  std::vector<AttentionWork> parts;
  std::vector<Merge> merges;
  std::unique_ptr<float, Free> partials;
  int threads = 1;
};

// Tokens at most: what a page costs, cold or hot, goes with its tokens.
int64_t tokens_of(const AttentionCall& call, const AttentionWork& work) {
  return int64_t{work.cold_end} * call.capacity + int64_t{work.hot_end} * call.block_size;
}

// Rows of one sequence that are worked on together, with all their pages.
void add_rows(const AttentionCall& call, int64_t s, std::vector<AttentionWork>& out) {
  const int64_t start = call.query_start_loc[s], queries = call.query_start_loc[s + 1] - start;
  const int64_t together = std::max<int64_t>(1, kMostRows / call.group);
  for (int64_t first = 0; first < queries; first += together) {
    const int64_t count = std::min(together, queries - first);
    const int64_t limit = call.seq_lens[s] - queries + first + 1;  // of the first query; may be 0 or less
    const int64_t last = std::max<int64_t>(0, limit + count - 1);
    AttentionWork work;
    work.sequence = s;
    work.first_row = (start + first) * call.group;
    work.rows = static_cast<int32_t>(count * call.group);
    work.first_limit = static_cast<int32_t>(limit);
    work.cold_begin = 0;
    work.cold_end = call.bits != 0 ? call.cold_pages[s] : 0;
    work.hot_begin = 0;
    work.hot_end = static_cast<int32_t>((last + call.block_size - 1) / call.block_size);
    work.partial = nullptr;
    out.push_back(work);
  }
}

// Part `index` of `count` of a work's pages, of about equal numbers of tokens; cold pages come first.
AttentionWork part_of(const AttentionCall& call, const AttentionWork& whole, int64_t index, int64_t count) {
  const int64_t all = tokens_of(call, whole), in_cold = whole.cold_end * call.capacity;
  const auto cold_page = [&](int64_t token) { return token < in_cold ? token / call.capacity : whole.cold_end; };
  const auto hot_page = [&](int64_t token) { return token < in_cold ? 0 : (token - in_cold) / call.block_size; };
  const int64_t begin = all * index / count, end = all * (index + 1) / count;
  AttentionWork part = whole;
  part.cold_begin = static_cast<int32_t>(cold_page(begin));
  part.cold_end = static_cast<int32_t>(cold_page(end));
  part.hot_begin = static_cast<int32_t>(hot_page(begin));
  part.hot_end = static_cast<int32_t>(hot_page(end));
  return part;
}

// Depends on the call and the number of threads only, so that the same call gives the same bits.
Plan make_plan(const AttentionCall& call) {
  Plan plan;
  std::vector<AttentionWork> whole;
  whole.reserve(static_cast<size_t>(call.sequences));
  for (int64_t s = 0; s < call.sequences; ++s) add_rows(call, s, whole);
  int64_t cost = 0, tokens = 0;
  for (const AttentionWork& work : whole) {
    cost += tokens_of(call, work) * work.rows;
    tokens += tokens_of(call, work);
  }
  plan.threads = static_cast<int>(call.threads > 0 ? call.threads : omp_get_max_threads());
  if (tokens < kWorthThreads) plan.threads = 1;
  const int64_t fair = std::max<int64_t>(1, cost / (plan.threads * kPartsPerThread));
  int64_t floats = 0;
  for (const AttentionWork& work : whole) {
    const int64_t own = tokens_of(call, work);
    int64_t count = plan.threads > 1 ? (own * work.rows + fair - 1) / fair : 1;
    count = std::max<int64_t>(1, std::min(count, own / kFewestTokens));
    if (count == 1) {
      plan.parts.push_back(work);
      continue;
    }
    plan.merges.push_back({plan.parts.size(), static_cast<size_t>(count)});
    for (int64_t i = 0; i < count; ++i) plan.parts.push_back(part_of(call, work, i, count));
    floats += count * work.rows * (call.dim + 2);
  }
  plan.partials.reset(static_cast<float*>(std::malloc(static_cast<size_t>(floats) * sizeof(float) + 1)));
  float* next = plan.partials.get();
  for (const Merge& merge : plan.merges) {
    for (size_t i = merge.first; i < merge.first + merge.count; ++i) {
      plan.parts[i].partial = next;
      next += plan.parts[i].rows * (call.dim + 2);
    }
  }
  return plan;
}

// Adds up the parts of some rows, weighted by their highest scores, into the first of them.
void merge_parts(const AttentionCall& call, const Plan& plan, const Merge& merge, const AttentionKernels& kernels) {
  const AttentionWork& first = plan.parts[merge.first];
  const int64_t rows = first.rows, dim = call.dim;
  const PartialSums sum = partial_sums(first.partial, rows, dim);
  for (int64_t row = 0; row < rows; ++row) {
    float highest = -INFINITY;
    for (size_t i = 0; i < merge.count; ++i) {
      highest = std::max(highest, partial_sums(plan.parts[merge.first + i].partial, rows, dim).highest[row]);
    }
    for (size_t i = 0; i < merge.count; ++i) {
      const PartialSums part = partial_sums(plan.parts[merge.first + i].partial, rows, dim);
      // A part that saw nothing has -infinity; so have all of them where no part saw anything.
      const float weight = part.highest[row] == highest ? 1.0f : std::exp2(part.highest[row] - highest);
      const float kept = i == 0 ? 0.0f : 1.0f;
      for (int64_t d = row * dim; d < (row + 1) * dim; ++d) sum.sums[d] = kept * sum.sums[d] + weight * part.sums[d];
      sum.total[row] = kept * sum.total[row] + weight * part.total[row];
    }
    sum.highest[row] = highest;
  }
  kernels.finish(call, first.first_row, rows, sum);
}

// Kept from call to call: a decode step makes one call for each layer.
char* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (memory) size = bytes;
  }
  return memory.get();
}

}  // namespace

// Returns kFine, or which Fault with the sequence in *where; the output is then not written.
DELTAMEM_API int64_t deltamem_paged_attention(const AttentionCall* arguments, int64_t* where) {
  const AttentionCall& call = *arguments;
  *where = 0;
  const int64_t fault = check(call, where);
  if (fault != kFine) return fault;
  const AttentionKernels kernels = choose(call.isa);
  const Plan plan = make_plan(call);
  if (!plan.partials) return kNoMemory;
  const size_t bytes = kernels.scratch_bytes(call);
  bool short_of_memory = false;
  const int64_t parts = static_cast<int64_t>(plan.parts.size()), merges = static_cast<int64_t>(plan.merges.size());
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1) reduction(|| : short_of_memory)
  {
    char* scratch = thread_scratch(bytes);
    short_of_memory = scratch == nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < parts; ++i) {
      if (scratch != nullptr) kernels.attend(call, plan.parts[static_cast<size_t>(i)], scratch);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < merges; ++i) merge_parts(call, plan, plan.merges[static_cast<size_t>(i)], kernels);
  }
  return short_of_memory ? kNoMemory : kFine;
}
