// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#if defined(__x86_64__)

// GCC 12 takes the undefined vectors inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "paged_attention_loop.h"
#include "simd_avx512.h"

AttentionKernels attention_avx512() { return {scratch_bytes, attend_rows<Float32Loops<Avx512>>, finish_rows<Avx512>}; }

#endif
