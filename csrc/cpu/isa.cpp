// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

int best_of_machine() {
#if DELTAMEM_X86
  __builtin_cpu_init();  // the builtins look at what the operating system saves, too
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return kScalar;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return kAvx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return bf16 ? kAvx512Bf16 : kAvx512;
#else
  return kScalar;
#endif
}

// Python refuses a name that is unknown or above the machine; here such a name changes nothing.
int chosen_at_start() {
  const int best = deltamem_isa_supported();
  const char* name = std::getenv("DELTAMEM_ISA");
  if (name == nullptr) return best;
  const char* names[] = {"scalar", "avx2", "avx512", "avx512bf16"};
  for (int isa = kScalar; isa < best; ++isa) {
    if (std::strcmp(name, names[isa]) == 0) return isa;
  }
  return best;
}

std::atomic<int>& current() {
  static std::atomic<int> isa{chosen_at_start()};
  return isa;
}

}  // namespace

int deltamem_isa_supported() {
  static const int best = best_of_machine();
  return best;
}

int deltamem_isa() { return current().load(std::memory_order_relaxed); }

int deltamem_use_isa(int isa) {
  if (isa < kScalar || isa > deltamem_isa_supported()) return -1;
  current().store(isa, std::memory_order_relaxed);
  return 0;
}

int deltamem_abi() { return DELTAMEM_ABI; }

int deltamem_threads() {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += 1;
  return threads;
}
