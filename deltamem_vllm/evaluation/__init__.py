# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What eviction costs a model: tasks, real servers to ask, and tables of the answers."""
