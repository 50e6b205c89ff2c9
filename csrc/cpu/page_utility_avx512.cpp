// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#if defined(__x86_64__)

// GCC 12 takes the undefined vectors inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "simd_avx512.h"

#include "feature_scores.h"
#include "window_scores.h"

UtilityKernels utility_avx512() {
  return {window_bytes, window_scores<Avx512>, feature_bytes, feature_scores<Avx512>};
}

#endif
