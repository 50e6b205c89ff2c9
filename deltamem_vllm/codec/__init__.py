# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How cold tokens are written: fewer bits an element, in pages of the same size as any other."""
