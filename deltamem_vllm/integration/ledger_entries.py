# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""All entries of the patch ledger, in the order in which a step passes through them (see ledger.py)."""

from deltamem_vllm.integration.ledger_engine_core import ENGINE_CORE
from deltamem_vllm.integration.ledger_frontend import FRONTEND
from deltamem_vllm.integration.ledger_worker import WORKER

LEDGER = (*FRONTEND, *ENGINE_CORE, *WORKER)
