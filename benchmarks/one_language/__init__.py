# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The same work in Triton and in CUDA, compared by machine code: `benchmarks/compare_languages.py`."""
