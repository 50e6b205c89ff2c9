# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How far log-probs may be apart, and how far they must be for a control to show anything."""

# float32 in another order of additions; the largest seen in the whole matrix is 2.8e-5 (SmolLM2, 30 layers).
TOLERANCE = 1e-4
# Below this a run would also pass without its mask, and prove nothing.
CONTROL = 1e-2
# A run with a fault put in must be off by more than this.
FAULT = 1e-3
