# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""HTTP for people and programs; knows FastAPI, not vLLM. Installed as `deltamem_vllm.server`."""
