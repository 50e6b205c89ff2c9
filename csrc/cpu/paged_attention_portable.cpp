// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include "paged_attention_loop.h"
#include "simd_portable.h"

AttentionKernels attention_portable() {
  return {scratch_bytes, attend_rows<Float32Loops<Portable>>, finish_rows<Portable>};
}
