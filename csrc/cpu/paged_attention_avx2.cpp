// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#if defined(__x86_64__)

#include "paged_attention_loop.h"
#include "simd_avx2.h"

AttentionKernels attention_avx2() { return {scratch_bytes, attend_rows<Float32Loops<Avx2>>, finish_rows<Avx2>}; }

#endif
