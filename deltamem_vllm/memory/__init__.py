# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much memory a request keeps, and when: pure decisions, no torch and no vLLM."""
