# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the instruments rely on beside the policy: checked when one of them starts an engine, never by a server."""

from deltamem_vllm.integration.ledger import Patch

_STEPS = "an engine API that is stepped by its caller and tells what each request holds"
_FORCED = "an official way to force-feed tokens and read their log-probs"

INSTRUMENTS: tuple[Patch, ...] = (
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "wrapped",
        "eval and profile read off what a request holds in the step that was just scheduled",
        _STEPS,
        "self, throttle_prefills",
    ),
    Patch(
        "vllm.v1.engine.llm_engine:LLMEngine.step",
        "used",
        "eval, profile and the ramps of bench step the engine in their own process",
        _STEPS,
        "self",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.pause_generation",
        "used",
        "bench holds requests back until all are queued, so that two engines make the same batches",
        _STEPS,
        "self, mode, clear_cache",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.resume_generation",
        "used",
        "bench lets them go together",
        _STEPS,
        "self",
    ),
    Patch(
        "vllm.v1.sample.logits_processor:LogitsProcessor.update_state",
        "subclassed",
        "eval follows requests through the batch to find each one's script",
        _FORCED,
        "self, batch_update",
    ),
    Patch(
        "vllm.v1.sample.logits_processor:LogitsProcessor.apply",
        "subclassed",
        "eval reads a request's logits and writes the next token of its script",
        _FORCED,
        "self, logits",
    ),
)
