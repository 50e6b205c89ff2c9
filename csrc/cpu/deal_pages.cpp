// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// deal_pages: which tokens of a request stay. Tokens are ranked inside their pair (layer, head), pages are rated and
// dealt to the pairs that they are worth most to. Integers and orders are those of dealing/deal.py to the bit; sums are
// made in float64 and rounded once. Arguments were checked by deltamem_vllm/ops/deal_pages.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "isa.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// With fewer tokens, waking other threads takes longer than the work.
constexpr int64_t kWorthThreads = 8192;

// Numbers as integers of the same order: -0.0 equals 0.0, NaN equals -inf (dealing/order.py).
inline int32_t ordered_bits(float number) {
  const float clean = (number != number ? -kInfinity : number) + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &clean, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Scores that cannot be summed up stand for numbers.
inline float summable(float score) {
  constexpr float kLargest = 1e30f;
  if (score != score) return 0.0f;
  return std::min(std::max(score, -kLargest), kLargest);
}

struct Entry {
  uint32_t key;  // ascending: the highest score first
  uint32_t index;
};

// Least significant byte first; equal keys keep their order.
void sort_by_key(std::vector<Entry>& entries, std::vector<Entry>& spare) {
  uint32_t counts[4][256] = {};
  for (const Entry& entry : entries) {
    for (int byte = 0; byte < 4; ++byte) ++counts[byte][entry.key >> (8 * byte) & 255];
  }
  for (int byte = 0; byte < 4; ++byte) {
    uint32_t* count = counts[byte];
    const int shift = 8 * byte;
    if (!entries.empty() && count[entries[0].key >> shift & 255] == entries.size()) continue;  // all alike
    uint32_t start = 0;
    for (int value = 0; value < 256; ++value) {
      const uint32_t own = count[value];
      count[value] = start;
      start += own;
    }
    spare.resize(entries.size());
    for (const Entry& entry : entries) spare[count[entry.key >> shift & 255]++] = entry;
    entries.swap(spare);
  }
}

// One pair's tokens: protected ones, then the others by score, then what is past its length; of equals the newer first.
void rank_tokens(const float* scores, int64_t length, int64_t tokens, int64_t sink, int64_t recent, int64_t* order,
                 std::vector<Entry>& entries, std::vector<Entry>& spare) {
  const int64_t first = std::min(sink, length), end = std::max(first, length - recent);
  int64_t* out = order;
  for (int64_t t = length; t-- > end;) *out++ = t;
  for (int64_t t = first; t-- > 0;) *out++ = t;
  entries.resize(static_cast<size_t>(end - first));
  for (int64_t t = end; t-- > first;) {
    const uint32_t rising = static_cast<uint32_t>(ordered_bits(scores[t])) ^ 0x80000000u;
    entries[static_cast<size_t>(end - 1 - t)] = {~rising, static_cast<uint32_t>(t)};
  }
  sort_by_key(entries, spare);
  for (const Entry& entry : entries) *out++ = entry.index;
  for (int64_t t = tokens; t-- > length;) *out++ = t;
}

}  // namespace

// scores [pairs, tokens], lengths [pairs] -> order [pairs, tokens] and utility [pairs, tokens / size] as of
// dealing/deal.py: page_utilities.
DELTAMEM_API void deltamem_rank_pages(const float* scores, const int64_t* lengths, int64_t pairs, int64_t tokens,
                                      int64_t size, int64_t sink, int64_t recent, int64_t* order, float* utility) {
  const int64_t pages = tokens / size;
#pragma omp parallel if (pairs * tokens >= kWorthThreads)
  {
    std::vector<Entry> entries, spare;
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const float* own = scores + pair * tokens;
      int64_t* ranked = order + pair * tokens;
      rank_tokens(own, lengths[pair], tokens, sink, recent, ranked, entries, spare);
      const int64_t whole = lengths[pair] / size, protected_pages = (sink + recent + size - 1) / size;
      float* out = utility + pair * pages;
      for (int64_t page = 0; page < pages; ++page) {
        if (page >= whole) {
          out[page] = -kInfinity;
          continue;
        }
        double sum = 0.0;
        for (int64_t i = page * size; i < (page + 1) * size; ++i) sum += static_cast<double>(summable(own[ranked[i]]));
        out[page] = static_cast<float>(sum);
        // Pages of descending tokens descend by themselves, but for the rounding of the sums.
        if (page > protected_pages) out[page] = std::min(out[page], out[page - 1]);
      }
    }
  }
}

// worth [pairs, count] -> pages [pairs]: the `wanted` best, as of dealing/deal.py: deal_pages.
DELTAMEM_API void deltamem_deal_pages(const float* worth, int64_t pairs, int64_t count, int64_t wanted,
                                         int64_t* pages) {
  constexpr int64_t kFirst = 0x7fffffff;
  std::memset(pages, 0, static_cast<size_t>(pairs) * sizeof(*pages));
  if (wanted == 0) return;
  std::vector<int64_t> keys(static_cast<size_t>(pairs * count));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    float least = kInfinity;
    for (int64_t page = 0; page < count; ++page) {
      const float own = worth[pair * count + page];
      least = std::min(least, own != own ? 0.0f : own);  // a page is dealt after all earlier ones of its pair
      const int64_t rank = own == kInfinity ? kFirst : ordered_bits(least);
      // Of equal pages the earlier in its pair, then the lower pair: no two keys are equal.
      keys[static_cast<size_t>(pair * count + page)] = rank * (int64_t{1} << 32) + 0xffffffff - (page * pairs + pair);
    }
  }
  std::vector<int64_t> sorted(keys);
  const auto last = sorted.begin() + (wanted - 1);
  std::nth_element(sorted.begin(), last, sorted.end(), std::greater<int64_t>());
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t page = 0; page < count; ++page) pages[pair] += keys[static_cast<size_t>(pair * count + page)] >= *last;
  }
}

// order [pairs, tokens], pages [pairs] -> keep [pairs, tokens]: the first pages * size tokens of each pair's order. 0, or
// 1 if the order names a token that does not exist.
DELTAMEM_API int64_t deltamem_survivors(const int64_t* order, const int64_t* pages, int64_t pairs, int64_t tokens,
                                        int64_t size, uint8_t* keep) {
  bool wrong = false;
#pragma omp parallel for schedule(static) if (pairs * tokens >= kWorthThreads) reduction(|| : wrong)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    uint8_t* own = keep + pair * tokens;
    std::memset(own, 0, static_cast<size_t>(tokens));
    for (int64_t i = 0; i < pages[pair] * size; ++i) {
      const int64_t token = order[pair * tokens + i];
      if (token < 0 || token >= tokens) wrong = true;
      else own[token] = 1;
    }
  }
  return wrong;
}

// scores [pairs, tokens], lengths [pairs], order [pairs, tokens] -> mass [pairs, tokens / size] as of dealing/deal.py:
// page_mass. 0, or 1 if the order names a token that does not exist.
DELTAMEM_API int64_t deltamem_page_mass(const float* scores, const int64_t* lengths, const int64_t* order,
                                        int64_t pairs, int64_t tokens, int64_t size, int64_t sink, int64_t recent,
                                        float* mass) {
  const int64_t pages = tokens / size;
  bool wrong = false;
#pragma omp parallel for schedule(static) if (pairs * tokens >= kWorthThreads) reduction(|| : wrong)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float* own = scores + pair * tokens;
    const int64_t first = sink, end = std::max(first, lengths[pair] - recent);
    float lowest = 0.0f;
    for (int64_t t = first; t < end; ++t) lowest = std::min(lowest, summable(own[t]));
    double total = 0.0;
    for (int64_t t = first; t < end; ++t) total += static_cast<double>(summable(own[t]) - lowest);
    const bool some = total > 0.0;
    const double even = end > first ? 1.0 / static_cast<double>(end - first) : 0.0;
    for (int64_t page = 0; page < pages; ++page) {
      double sum = 0.0;
      for (int64_t i = page * size; i < (page + 1) * size; ++i) {
        const int64_t t = order[pair * tokens + i];
        wrong = wrong || t < 0 || t >= tokens;
        if (t >= first && t < end) sum += some ? static_cast<double>(summable(own[t]) - lowest) / total : even;
      }
      mass[pair * pages + page] = static_cast<float>(sum);
    }
  }
  return wrong;
}

// worth [pairs, tokens], lengths [pairs] -> gains [pairs, most] and hot [pairs, most + 1], most = ceil(tokens / size),
// as of dealing/tiers.py: tier_path.
DELTAMEM_API void deltamem_tier_path(const float* worth, const int64_t* lengths, int64_t pairs, int64_t tokens,
                                     int64_t size, int64_t capacity, double loss, int64_t floor, float* gains,
                                     int64_t* hot) {
  const int64_t most = (tokens + size - 1) / size;
#pragma omp parallel if (pairs * tokens >= kWorthThreads)
  {
    std::vector<double> total(static_cast<size_t>(tokens + 1), 0.0);  // worth of a pair's so many best tokens
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t length = lengths[pair];
      for (int64_t t = 0; t < length; ++t) {
        total[static_cast<size_t>(t + 1)] = total[static_cast<size_t>(t)] + static_cast<double>(worth[pair * tokens + t]);
      }
      double before = 0.0;
      for (int64_t pages = 0; pages <= most; ++pages) {
        // Worth of so many pages with so many of them hot.
        const auto value = [&](int64_t own) {
          const int64_t start = own * size, end = std::min(start + (pages - own) * capacity, length);
          return loss * total[static_cast<size_t>(start)] + (1.0 - loss) * total[static_cast<size_t>(end)];
        };
        const int64_t wanting = (pages - 1) * capacity - length, step = capacity - size;
        const int64_t whole = wanting >= 0 ? wanting / step : -((-wanting + step - 1) / step);  // rounded down
        int64_t low = std::max(whole + 1, floor), high = std::min(pages, length / size);
        const bool exists = low <= high && pages >= floor;
        low = std::min(low, high);
        while (low < high) {
          const int64_t middle = (low + high + 1) / 2;
          if (value(middle) >= value(middle - 1)) low = middle;
          else high = middle - 1;
        }
        const double best = value(low);
        hot[pair * (most + 1) + pages] = low;
        if (pages > 0) {
          const float gain = exists ? static_cast<float>(best - before) : -kInfinity;
          gains[pair * most + pages - 1] = pages <= floor ? kInfinity : gain;
        }
        before = best;
      }
    }
  }
}
