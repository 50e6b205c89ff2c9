# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A plan as plain values for programs: bytes and tokens, not rounded."""

from __future__ import annotations

import math
from typing import Any

from deltamem_vllm.evaluation.plan.commands import serve_command
from deltamem_vllm.evaluation.plan.notes import notes, offload_command
from deltamem_vllm.evaluation.plan.planner import Offload, Plan, Row


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in the tables and a command for each cell that is served; bytes and tokens, not rounded."""
    question, geometry = plan.question, plan.question.geometry
    return {
        "model": {
            "name": geometry.name,
            "source": geometry.source,
            "parameters": geometry.parameter_count,
            "parameters_by_kind": geometry.counts_by_kind(),
            "layers": geometry.layers,
            "query_heads": geometry.query_heads,
            "kv_heads": geometry.kv_heads,
            "head_size": geometry.head_size,
            "max_positions": geometry.max_positions,
            "quantized": geometry.quantized,
        },
        "device": {
            "name": question.device.name,
            "gib": question.device.gib,
            "estimated": question.device.estimated,
            "count": question.serving.ranks,
        },
        "contexts": list(question.contexts),
        "rows": [_row_json(plan, row) for row in plan.rows],
        "offloads": [_offload_json(plan, offload) for offload in plan.offloads],
        "cards_needed": plan.cards_needed,
        "notes": [line for line in notes(plan) if line],
    }


def _row_json(plan: Plan, row: Row) -> dict[str, Any]:
    geometry, memory, serving = plan.question.geometry, row.memory, row.serving
    return {
        "weights": row.form.name,
        "kv": row.treatment.name,
        "keep_ratio": row.treatment.budget.keep_ratio if row.treatment.budget else None,
        "max_num_seqs": serving.max_num_seqs,
        "max_num_batched_tokens": serving.batch_tokens,
        "budget_bytes": memory.budget,
        "weight_bytes": memory.weights,
        "window_bytes": memory.window,
        "page_table_bytes": memory.tables,
        "estimated": {
            "activation_bytes": memory.activations,
            "graph_bytes": memory.graphs,
            "other_bytes": memory.other,
            "compaction_scratch_bytes": row.scratch,
        },
        "pool_bytes": memory.pool,
        "pool_blocks": row.pool.blocks,
        "pool_tokens": row.pool.tokens,
        "token_bytes": geometry.token_bytes(row.treatment.element_bytes, serving.ranks),
        "longest_context": row.longest,
        "loads": [
            {
                "context": load.context,
                "pool_blocks": load.pool.blocks,
                "requests": load.requests,
                "limited_by_max_num_seqs": load.limited,
                "compacted_while_read": load.compacted_while_read,
                "stock_logged_concurrency": None
                if row.treatment.budget
                else load.pool.logged_concurrency(load.context),
                "command": serve_command(geometry, row.form, row.treatment, serving, load.context)
                if load.requests
                else None,
            }
            for load in row.loads
        ],
        "checkpoint": row.form.checkpoint or None,
    }


def _offload_json(plan: Plan, offload: Offload) -> dict[str, Any]:
    possible = math.isfinite(offload.gib)
    return {
        "weights": offload.form.name,
        "kv": offload.treatment.name,
        "context": offload.context,
        "cpu_offload_gb": offload.gib if possible else None,
        "estimated_tokens_per_second_at_most": offload.tokens_per_second if possible else None,
        "command": offload_command(plan, offload) if possible else None,
    }
