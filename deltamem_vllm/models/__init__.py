# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Models that come with a Python package and need no download (`deltamem model get`)."""
