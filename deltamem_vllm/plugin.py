# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What vLLM's entry points call.

vLLM loads general plugins in every process: API servers, engine cores, workers. Here that only adds two
flags; whatever evicts is imported when a configuration asks for it.
"""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Safe to call again."""
    try:
        from deltamem_vllm.integration import engine_args, http, logs

        logs.attach_vllm_handlers()
        engine_args.install()
        http.install()
    except (ImportError, AttributeError, KeyError):
        # A vLLM whose EngineArgs looks different must go on serving without us: it was not asked to use us.
        logger.exception("deltamem cannot add its flags to this vLLM and stays off")
