# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The section of a conversation scenario."""

from __future__ import annotations

from deltamem_vllm.evaluation.bench.kinds import ConversationScenario
from deltamem_vllm.evaluation.bench.report.tables import View, shown, table
from deltamem_vllm.evaluation.bench.runs.session import DELTAMEM, SIDES

_ROWS = 12


def measured(view: View, scenario: ConversationScenario, measure: str) -> dict[str, list[float]]:
    """What a target is judged by."""
    return {f"{measure}, deltamem": view.values(measure, DELTAMEM)}


def section(view: View, scenario: ConversationScenario) -> list[str]:
    """What was done, how far each side got, and how a turn's time grows."""
    blocks, block_size = scenario.pool_blocks - 1, scenario.engine.block_size
    lines = [
        f"{scenario.turns} turns through the OpenAI client, each of about {scenario.message_tokens} tokens of a user",
        f"and exactly {scenario.reply_tokens} of the model; every turn sends all that was said before. The KV pool of",
        f"each server has {blocks} blocks of {block_size} tokens, which hold {scenario.pool_turns} turns. Stock vLLM",
        "does not start for requests longer than its pool, so its server is started for requests as long as that.",
        "",
    ]
    rows = []
    for side in SIDES:
        cells = view.repeats(side)
        rows.append(
            [
                side,
                shown([len(cell["turns"]) for cell in cells], ".0f"),
                shown([cell["peak_pool_usage"] for cell in cells], ".0%"),
                "; ".join(dict.fromkeys(cell["error"] for cell in cells if cell["error"])) or "-",
                shown([cell["load"] for cell in cells], ".1f"),
            ]
        )
    lines += table(("server", f"of {scenario.turns} turns answered", "pool in use, most", "the next one", "load"), rows)
    return lines + table(
        ("turn", "prompt tokens", "stock, s", "deltamem, s", "deltamem, output tokens/s", "pool in use"),
        [_turn(view, turn) for turn in _shown_turns(scenario.turns)],
    )


def _shown_turns(turns: int) -> list[int]:
    """Up to `_ROWS` of them, evenly, the first and the last among them."""
    if turns <= _ROWS:
        return list(range(turns))
    return sorted({round(i * (turns - 1) / (_ROWS - 1)) for i in range(_ROWS)})


def _turn(view: View, turn: int) -> list[str]:
    found = {side: [cell["turns"][turn] for cell in view.repeats(side) if turn < len(cell["turns"])] for side in SIDES}
    ours = found[DELTAMEM]
    return [
        str(turn + 1),
        shown([one["prompt_tokens"] for one in ours], ".0f"),
        *(shown([one["seconds"] for one in found[side]], ".1f") for side in SIDES),
        shown([one["output_tokens"] / one["seconds"] for one in ours], ".1f"),
        shown([one["peak_pool_usage"] for one in ours], ".0%"),
    ]
