# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The engine of `deltamem profile`: a child process that serves one prompt and writes down what the policy did.

vLLM's engine runs in this process, so that its worker and scheduler can be watched. One JSON object a line:

    in   {"engine_args": {...}}                                          first line
    out  {"ready": {...}}
    in   {"prompt": [...], "output_tokens": n, "arrays": "file.npz"}
    out  {"recording": {...}}, fields as in evaluation.profile.recording.Recording; its arrays are in the file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from deltamem_vllm.codec.cold_page import LOSS, ColdFormat
from deltamem_vllm.config import AUTO
from deltamem_vllm.dealing.cold_pages import ColdChoice
from deltamem_vllm.integration.calibrations import find_calibration
from deltamem_vllm.integration.ledger import verify_ledger
from deltamem_vllm.integration.ledger_instruments import INSTRUMENTS
from deltamem_vllm.integration.parent_pipe import ParentPipe
from deltamem_vllm.memory.plans import CompactionPlan
from deltamem_vllm.scoring.base import Scorer, ScoreView

# What a step takes over from the scheduler's levels.
_LEVELS = ("logical_tokens", "resident_tokens", "logical_bytes", "tier_bytes", "cold_tokens")


class ScoreTap(Scorer):
    """Another scorer, whose scores of one compaction are kept, and beside them what the window attended to.

    A layer is scored in one view or in several, a few heads each; until the first compaction all heads have the same
    tokens. `recording` is off after it.

    Parameters
    ----------
    scorer
        Does the scoring.

    Attributes
    ----------
    utility, attention
        [heads, n] float32 by layer and first kv head of a view, of the last time it was scored: the scheduler may have
        asked for scores before it compacts. Attention is the mean over the window's queries and over the query heads
        that share a kv head, so each row sums to 1. Utility is what the scorer gave: repeats are discounted, and pages
        rated, after it.
    recording
        Whether these are kept.
    """

    # Whatever the scorer needs: attention is recorded for all of them.
    needs_queries = True

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        # Dealing asks for these; of class variables, because a scorer's own do not depend on the instance.
        self.name = scorer.name  # type: ignore[misc]
        self.comparable = scorer.comparable  # type: ignore[misc]
        self.profiled = scorer.profiled  # type: ignore[misc]
        self.lasting = scorer.lasting  # type: ignore[misc]
        self.over_heads = scorer.over_heads  # type: ignore[misc]
        self.utility: dict[tuple[int, int], Tensor] = {}
        self.attention: dict[tuple[int, int], Tensor] = {}
        self.recording = True

    def score(self, view: ScoreView) -> Tensor:
        scores = self._scorer.score(view)
        if self.recording:
            # A copy: on a CPU it would be the scores themselves, which whoever asked may change.
            part = view.layer, view.first_head
            self.utility[part] = scores.to("cpu", torch.float32, copy=True)
            self.attention[part] = view.attention().mean((1, 2)).cpu()
        return scores


class Session:
    """A vLLM engine in this process, with taps on its scheduler and its compactor."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        verify_ledger(INSTRUMENTS)
        arguments = EngineArgs(**engine_args, async_scheduling=False, disable_log_stats=True)
        self._engine = LLMEngine.from_engine_args(arguments)
        core = self._engine.engine_core.engine_core  # type: ignore[attr-defined]  # the engine runs in this process
        self._scheduler = core.scheduler
        self._manager = self._scheduler.deltamem_manager
        compactor = core.model_executor.driver_worker.worker.deltamem.compactor
        self._tap = ScoreTap(compactor.scorers[self._scheduler.deltamem_config.scorer])
        compactor.scorers = {self._scheduler.deltamem_config.scorer: self._tap}
        compactor.on_compaction = self._on_compaction
        compactor.on_coded = self._on_coded
        self._take_cold = compactor.take_cold
        compactor.take_cold = self._watched_take_cold
        self._schedule = self._scheduler.schedule
        self._scheduler.schedule = self._watched_schedule
        self._steps: list[dict[str, Any]] = []
        self._compactions: list[dict[str, Any]] = []
        self._arrays: dict[str, np.ndarray] = {}
        config = core.vllm_config
        calibration = find_calibration(config, self._scheduler.deltamem_config)
        model, parallel = config.model_config, config.parallel_config
        pool = self._scheduler.deltamem_stats()["pool"]
        self.facts: dict[str, Any] = {
            "vllm": vllm_version,
            "torch": torch.__version__,
            "device": config.device_config.device_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "layers": model.get_num_layers(parallel),
            "kv_heads": model.get_num_kv_heads(parallel),
            "query_heads": model.get_num_attention_heads(parallel),
            "head_size": model.get_head_size(),
            "block_tokens": pool["block_tokens"],
            "block_bytes": pool["block_bytes"],
            "pool_blocks": pool["blocks"],
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "policy": self._scheduler.deltamem_config.to_json_dict(),
            # What pages were dealt by: scores that compare between heads, the calibration's profile of them, or both.
            "comparable_scores": self._tap.comparable,
            "calibration": None if calibration is None else calibration.card.fingerprint,
        }
        self.facts["cold"] = self._cold_facts()

    def run(self, prompt: list[int], output_tokens: int, arrays: str) -> dict[str, Any]:
        """Serve the prompt and return the recording; its arrays go to the file `arrays`."""
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request("profile", {"prompt_token_ids": prompt}, params)
        written: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                assert isinstance(output, RequestOutput), "a generating request was sent"
                written = list(output.outputs[0].token_ids)
        np.savez(arrays, **self._arrays)  # type: ignore[arg-type]  # numpy's stub takes the keys for options
        return {
            "steps": self._steps,
            "compactions": self._compactions,
            "written": written,
            "counters": self._scheduler.deltamem_stats()["totals"]["counters"],
        }

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Note what the request holds in this step, its new tokens included."""
        output = self._schedule(*args, **kwargs)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self._scheduler.requests[request_id]
            compacts = bool(output.deltamem.compactions)
            prefills = request.num_computed_tokens <= request.num_prompt_tokens
            self._steps.append(
                {
                    "kind": "compaction" if compacts else "prefill" if prefills else "decode",
                    "new_tokens": scheduled,
                    "blocks": len(self._manager.req_to_blocks[request_id]),
                    **self._levels(),
                }
            )
        return output

    def _levels(self) -> dict[str, Any]:
        levels = self._scheduler.deltamem_stats()["totals"]["levels"]
        return {name: levels[name] for name in _LEVELS}

    def _watched_take_cold(self) -> dict[str, Any]:
        """Correct the levels of a step that compacts, once its worker knows which pages are cold.

        The scheduler is told here already: it hears of it when the step is over, and may then let go of the request in
        the same breath.
        """
        held: dict[str, Any] = self._take_cold()
        if held:
            self._manager.take_cold(held)
            self._steps[-1].update(self._levels())
        return held

    def _on_compaction(self, plan: CompactionPlan, survivors: list[list[Tensor]]) -> None:
        if not self._compactions:
            for name, parts in (("utility", self._tap.utility), ("attention", self._tap.attention)):
                heads = torch.cat([parts[part] for part in sorted(parts)])
                self._arrays[name] = heads.view(len(survivors), -1, heads.shape[1]).numpy()
            self._tap.recording = False
        # The scheduler has noted the step before the worker gets to it.
        step = len(self._steps) - 1
        number = len(self._compactions)
        self._store(f"survivors_{number}", survivors)
        fields = asdict(plan)
        counts = {name: len(fields.pop(f"{name}_blocks")) for name in ("source", "target")}
        del fields["request_id"], fields["blocks_after"]
        self._compactions.append(
            {**fields, "step": step, "source_blocks": counts["source"], "target_blocks": counts["target"]}
        )

    def _on_coded(self, plan: CompactionPlan, choice: ColdChoice) -> None:
        # Survivors are told first.
        number = len(self._compactions) - 1
        layers, heads = choice.made.shape
        pages: list[list[list[Tensor]]] = [[[] for _ in range(heads)] for _ in range(layers)]
        for pair, tokens, count in zip(choice.pair.tolist(), choice.tokens, choice.counts.tolist(), strict=True):
            pages[pair // heads][pair % heads].append(tokens[:count].sort().values)
        nothing = choice.tokens.new_zeros(0)
        self._store(f"coded_{number}", [[torch.cat([nothing, *pair]) for pair in layer] for layer in pages])
        sizes = [[torch.tensor([len(page) for page in pair]) for pair in layer] for layer in pages]
        self._store(f"sizes_{number}", sizes)
        stay = choice.stay if choice.stay is not None else torch.zeros(layers, heads, 0, dtype=torch.bool)
        self._store(f"stay_{number}", [[pair.nonzero().squeeze(1) for pair in layer] for layer in stay])

    def _store(self, name: str, pairs: Sequence[Sequence[Tensor]]) -> None:
        """Pairs may have different numbers of entries: one list after the other, and how long each is."""
        flat = torch.cat([pair for layer in pairs for pair in layer])
        self._arrays[name] = flat.cpu().numpy().astype(np.int32)
        self._arrays[f"{name}_counts"] = np.array([[len(pair) for pair in layer] for layer in pairs])

    def _cold_facts(self) -> dict[str, Any] | None:
        """What a cold page of this engine is; None if it makes none."""
        config, facts = self._scheduler.deltamem_config, self.facts
        if config.cold_bits in (0, AUTO):
            return None
        page_bytes = facts["block_bytes"] // (facts["layers"] * facts["kv_heads"])
        layout = ColdFormat(config.cold_bits, facts["head_size"], page_bytes)
        loss = LOSS[config.cold_bits] if config.cold_loss is None else config.cold_loss
        return {"bits": layout.bits, "page_tokens": layout.capacity, "loss": loss}


def main() -> None:
    """Serve the parent process until it closes the pipe."""
    pipe = ParentPipe()
    session = Session(pipe.read()["engine_args"])
    pipe.answer("ready", session.facts)
    while (command := pipe.read()) is not None:
        pipe.answer("recording", session.run(**command))


if __name__ == "__main__":
    main()
