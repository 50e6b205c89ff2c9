# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The `deltamem` console command: one module per subcommand, nothing heavy at import."""
