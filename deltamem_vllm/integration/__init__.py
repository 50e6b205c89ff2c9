# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The only room that imports vLLM. Every name it touches stands in ``ledger.py``."""
