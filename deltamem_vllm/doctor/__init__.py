# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem doctor`: what is wrong with an installation, and how to mend it.

Works without vLLM, or with a wrong or broken one: what has to import torch or vLLM runs in child processes, which may
fail or crash, and whose end is then a finding like any other.
"""
