# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which tokens matter: one small class per scorer, selection once for all of them.

Importing this package imports neither torch nor vllm; see :mod:`deltamem_vllm.scoring.registry` to list and
load scorers by name.
"""
