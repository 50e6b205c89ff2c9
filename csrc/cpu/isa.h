// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Which instructions the kernels use. One binary holds all versions; the machine decides when it is loaded.

#pragma once

// What Python calls has C linkage and is visible; everything else stays inside the library.
#define DELTAMEM_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define DELTAMEM_X86 1
#else
#define DELTAMEM_X86 0
#endif

enum DeltamemIsa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best that machine and operating system support. kAvx512Bf16 means AVX-512 with F, BW, VL, DQ, BF16 and VBMI.
DELTAMEM_API int deltamem_isa_supported();

// What the kernels use: the best there is, or less if the environment variable DELTAMEM_ISA (scalar, avx2, avx512,
// avx512bf16) or deltamem_use_isa says so. Never more than the machine has.
DELTAMEM_API int deltamem_isa();

// Choose for the whole process. Returns 0, or -1 (and changes nothing) if the machine has no such instructions.
DELTAMEM_API int deltamem_use_isa(int isa);

// The number that deltamem_vllm/ops/native.py expects. Count up when a function that Python calls changes.
#define DELTAMEM_ABI 5
DELTAMEM_API int deltamem_abi();

// Threads that a parallel region of this library gets here and now.
DELTAMEM_API int deltamem_threads();
