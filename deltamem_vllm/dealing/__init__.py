# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How a request's pages are dealt to its (layer, kv head) pairs."""
