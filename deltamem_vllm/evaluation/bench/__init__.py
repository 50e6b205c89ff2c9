# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem bench`: stock vLLM and deltamem in one run, taking turns."""
