# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The web dashboard: a page of plain files, and the stand-alone application that watches several servers with it."""
