// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#if defined(__x86_64__)

#include "simd_avx2.h"

#include "feature_scores.h"
#include "window_scores.h"

UtilityKernels utility_avx2() {
  return {window_bytes, window_scores<Avx2>, feature_bytes, feature_scores<Avx2>};
}

#endif
