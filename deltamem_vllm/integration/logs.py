# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Our log lines look like vLLM's and go where they go."""

import logging


def attach_vllm_handlers() -> None:
    """Give the logger ``deltamem_vllm`` what vLLM gave its own; without a handler INFO lines are lost.

    Called in every process and again after vLLM has read its logging configuration. A logger that somebody
    else configured is left alone.
    """
    vllm = logging.getLogger("vllm")
    ours = logging.getLogger("deltamem_vllm")
    foreign = [handler for handler in ours.handlers if not getattr(handler, "_deltamem_shared", False)]
    if foreign or not vllm.handlers:
        return
    for handler in list(ours.handlers):
        ours.removeHandler(handler)
    for handler in vllm.handlers:
        handler._deltamem_shared = True  # type: ignore[attr-defined]
        ours.addHandler(handler)
    ours.setLevel(vllm.level)
    ours.propagate = vllm.propagate
