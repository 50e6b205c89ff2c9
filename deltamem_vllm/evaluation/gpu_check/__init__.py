# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Are the GPU kernels right, and how fast: `make gpu-check`. Without a GPU, whether they compile for two."""
