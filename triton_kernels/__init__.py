# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Triton GPU kernels, one a file. Installed as `deltamem_vllm.triton_kernels`."""
