# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The client side of the routes: ask servers, follow their streams, add their numbers up. No torch, no vLLM."""
