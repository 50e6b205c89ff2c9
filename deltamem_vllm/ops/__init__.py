# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Moving cached tokens between pages: the operations, and the slow obvious reference of each."""
