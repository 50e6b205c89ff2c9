// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include "simd_portable.h"

#include "feature_scores.h"
#include "window_scores.h"

UtilityKernels utility_portable() {
  return {window_bytes, window_scores<Portable>, feature_bytes, feature_scores<Portable>};
}
