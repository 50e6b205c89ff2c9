# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem plan` without vLLM: published sizes, the arithmetic of formats and pools, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from deltamem_vllm.cli.plan import plan as plan_command
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.plan.capacity import (
    Pool,
    Treatment,
    load_of,
    longest_context,
    needed_blocks,
    parse_context,
    resting_blocks,
)
from deltamem_vllm.evaluation.plan.catalog import GIB, find_device, find_known_model, known_models
from deltamem_vllm.evaluation.plan.errors import PlanError
from deltamem_vllm.evaluation.plan.formats import FORMATS
from deltamem_vllm.evaluation.plan.geometry import Geometry, load_geometry
from deltamem_vllm.evaluation.plan.memory import (
    Serving,
    memory_of,
    table_bytes,
)
from deltamem_vllm.evaluation.plan.planner import (
    Plan,
    choose_contexts,
    make_plan,
    make_question,
    make_row,
    make_treatments,
)
from deltamem_vllm.memory.budgets import cdiv

geometry_of: Callable[[str], Geometry] = cache(load_geometry)
STOCK, STOCK_FP8, HALF, QUARTER, TENTH = make_treatments(DeltaMemConfig(), (0.5, 0.25, 0.1))


def make(model: str, device: str | float, ranks: int = 1, formats: tuple[str, ...] = (), **options: Any) -> Plan:
    geometry = geometry_of(model)
    card = find_device(device, None) if isinstance(device, str) else find_device(None, device)
    contexts = choose_contexts(options.pop("contexts", None), geometry.max_positions)
    serving = Serving(ranks=ranks, utilization=options.pop("utilization", 0.92))
    forms = [FORMATS[name] for name in formats or FORMATS]
    treatments = (STOCK, STOCK_FP8, HALF, QUARTER, TENTH)
    seqs, tokens = options.pop("max_num_seqs", None), options.pop("batch_tokens", None)
    assert not options
    return make_plan(make_question(geometry, card, contexts, forms, treatments, 8, serving, seqs, tokens))


# ---- sizes ---------------------------------------------------------------------------------------------------------

# The totals that the checkpoints' own safetensors metadata states on Hugging Face.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.3-70B": 70_553_706_496,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Small-24B": 23_572_403_200,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
}


def test_every_shipped_geometry_has_its_published_parameter_count() -> None:
    assert {name: geometry_of(name).parameter_count for name in known_models()} == PUBLISHED


@pytest.mark.parametrize(
    ("model", "kib"), [("Llama-3.1-8B", 128), ("Llama-3.3-70B", 320), ("Qwen2.5-7B", 56), ("SmolLM2-135M", 22.5)]
)
def test_kv_bytes_of_a_token(model: str, kib: float) -> None:
    geometry = geometry_of(model)
    assert geometry.token_bytes(2, 1) == kib * 1024
    assert geometry.token_bytes(1, 1) == kib * 512, "fp8 takes half"


def test_kv_heads_are_split_over_ranks_and_copied_when_there_are_fewer() -> None:
    geometry = geometry_of("Qwen2.5-7B")  # 28 query and 4 KV heads
    assert [geometry.rank_kv_heads(ranks) for ranks in (1, 2, 4, 8)] == [4, 2, 1, 1]
    with pytest.raises(PlanError, match="28 query heads cannot be split into 8"):
        geometry.rank_query_heads(8)
    with pytest.raises(PlanError, match="4 KV heads can be neither"):
        geometry.rank_kv_heads(3)


def test_tied_embeddings_count_once_and_stay_at_16_bits() -> None:
    geometry = geometry_of("Llama-3.2-1B")
    assert "head" not in geometry.counts_by_kind()
    kept = geometry.parameter_count - geometry.counts_by_kind()["matrix"]
    assert kept == 128256 * 2048 + (2 * 16 + 1) * 2048, "embeddings, and norms of 16 layers and the end"
    matrices = geometry.weight_bytes(FORMATS["fp8"], 1) - 2 * kept
    assert matrices == geometry.counts_by_kind()["matrix"], "one byte a value"


def test_bytes_of_one_matrix() -> None:
    rows, columns = 256, 1024
    values, groups = rows * columns, rows * 8
    assert FORMATS["bf16"].matrix_bytes(rows, columns) == values * 2
    assert FORMATS["int8"].matrix_bytes(rows, columns) == values + rows * 2
    assert FORMATS["int4"].matrix_bytes(rows, columns) == values // 2 + groups * 20 // 8
    assert FORMATS["int2"].matrix_bytes(rows, columns) == values // 4 + groups * 2
    assert FORMATS["int4"].effective_bits == 4.15625
    assert FORMATS["int4"].matrix_bytes(rows, 129) == rows * 129 // 2 + rows * 2 * 20 // 8, "a started group is whole"


def test_ranks_hold_equal_parts_but_norms_and_copied_kv_heads() -> None:
    geometry, bf16 = geometry_of("Llama-3.3-70B"), FORMATS["bf16"]
    norms = 2 * geometry.counts_by_kind()["other"]
    whole = geometry.weight_bytes(bf16, 1)
    assert geometry.weight_bytes(bf16, 2) == (whole - norms) // 2 + norms
    # 16 ranks, 8 KV heads: every rank has a whole one, twice its share.
    kv = 2 * sum(p.count for p in geometry.parameters if p.module in ("k_proj", "v_proj"))
    assert geometry.weight_bytes(bf16, 16) == (whole - norms - kv) // 16 + kv // 8 + norms


def test_experts_and_routers(tmp_path: Path) -> None:
    fields = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 100,
        "sliding_window": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    geometry = load_geometry(str(tmp_path))
    experts = 2 * 4 * 3 * 64 * 96
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert geometry.counts_by_kind()["matrix"] == experts + attention
    assert geometry.counts_by_kind()["other"] == 2 * 4 * 64 + 5 * 64, "routers and norms"
    assert geometry.experts_per_token == 2
    padding = 2 * (128 - 100) * 64  # vLLM's, of embeddings and head
    assert geometry.weight_bytes(FORMATS["bf16"], 1) == 2 * (geometry.parameter_count + padding)


# ---- pools ---------------------------------------------------------------------------------------------------------


def test_pool_is_whole_blocks_less_the_null_block() -> None:
    pool = Pool.of(10 * 16 * 100 + 1599, token_bytes=100, block_size=16)
    assert (pool.blocks, pool.usable, pool.tokens) == (10, 9, 144)
    assert Pool.of(-5, 100, 16).usable == 0
    assert pool.logged_concurrency(33) == 10 / 3


@pytest.mark.parametrize("treatment", [STOCK, HALF, QUARTER, TENTH], ids=lambda t: t.name)
@pytest.mark.parametrize("blocks", [2, 30, 90, 300])
def test_longest_context_is_the_last_that_fits(treatment: Treatment, blocks: int) -> None:
    pool, chunk, limit = Pool(blocks, 16), 128, 20_000
    longest = longest_context(lambda _: pool, treatment, limit, chunk)
    fitting = [n for n in range(1, limit + 1) if needed_blocks(treatment.budget, n, 16, chunk) <= pool.usable]
    assert longest == max(fitting, default=0)
    assert len(fitting) == longest, "no gap below it"


def test_stock_holds_whole_requests() -> None:
    load = load_of(Pool(101, 16), STOCK, 160, max_num_seqs=256, chunk_tokens=4096)
    assert (load.requests, load.limited, load.compacted_while_read) == (10, False, False)
    assert load_of(Pool(101, 16), STOCK, 160, 4, 4096) == replace(load, requests=4, limited=True)
    assert load_of(Pool(101, 16), STOCK, 1601, 256, 4096).requests == 0


@pytest.mark.parametrize("treatment", [HALF, QUARTER, TENTH], ids=lambda t: t.name)
@pytest.mark.parametrize("context", [1024, 4096, 8192])
def test_one_more_request_than_planned_would_not_fit(treatment: Treatment, context: int) -> None:
    pool, budget = Pool(2001, 16), treatment.budget
    assert budget is not None
    load = load_of(pool, treatment, context, 10_000, 4096)
    dense, copy = cdiv(context, 16), int(budget.keep_ratio * context) // 16
    rest = copy + budget.interval // 16
    assert resting_blocks(budget, context, 16) == rest
    peak = dense + min(copy, 250)
    assert (load.requests - 1) * rest + peak <= pool.usable < load.requests * rest + peak
    assert load.requests > pool.usable // dense, "more than without eviction"


def test_a_prompt_longer_than_the_pool_is_marked() -> None:
    load = load_of(Pool(401, 16), TENTH, 10_000, 256, 512)
    assert load.requests >= 1 and load.compacted_while_read
    assert load_of(Pool(401, 16), STOCK, 10_000, 256, 512).requests == 0


def test_short_requests_are_left_alone() -> None:
    assert resting_blocks(TENTH.budget, 255, 16) == 16, "below min_tokens"


def test_what_is_dealt_are_whole_blocks() -> None:
    assert TENTH.dealt and not STOCK.dealt
    # A tenth of 4096 tokens is 409.6: 25 blocks of 16 and not 26, and the 128 tokens of an interval.
    assert resting_blocks(TENTH.budget, 4096, 16) == 25 + 8
    (equal,) = make_treatments(DeltaMemConfig(dealing="equal"), (0.1,))[2:]
    assert not equal.dealt and resting_blocks(equal.budget, 4096, 16) == cdiv(410 + 128, 16) == 34


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("8k", 8192), (" 32K ", 32768)])
def test_contexts_are_read(text: str, tokens: int) -> None:
    assert parse_context(text) == tokens


def test_usual_contexts_end_at_the_models_own_limit() -> None:
    assert choose_contexts(None, 8192) == (4096, 8192)
    assert choose_contexts(None, 1000) == (1000,)
    assert choose_contexts([9, 5, 9], 100) == (5, 9)


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_slots_are_those_that_hold_most_requests() -> None:
    plan = make("Llama-3.1-8B", "rtx4090", formats=("bf16",))
    question = plan.question
    assert question.serving.max_num_seqs == 256
    for row in plan.rows:
        fixed = [
            make_row(
                replace(question, fixed_seqs=True, serving=question.serving.with_seqs(seqs)), row.form, row.treatment
            )
            for seqs in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        ]
        assert row.loads[0].requests == max(one.loads[0].requests for one in fixed)


def test_each_context_has_the_pool_that_its_page_tables_leave() -> None:
    plan = make("Llama-3.1-8B", "h100", formats=("bf16",))
    stock, tenth = plan.rows[0], plan.rows[-1]
    assert len({load.pool for load in stock.loads}) == 1
    blocks = [load.pool.blocks for load in tenth.loads]
    assert blocks == sorted(blocks, reverse=True) and len(set(blocks)) == len(blocks)
    assert tenth.pool == tenth.loads[0].pool
    geometry, card = plan.question.geometry, plan.question.device
    short, long = (table_bytes(geometry, card, tenth.serving, c) for c in (4096, 131072))
    assert short == tenth.memory.tables
    assert blocks[0] - blocks[-1] == pytest.approx((long - short) / (geometry.token_bytes(2, 1) * 16), abs=1)


def test_70b_on_one_24_gb_card() -> None:
    plan = make("Llama-3.3-70B", "rtx4090")
    assert not any(plan.fits(form) for form in plan.question.formats), "not at 4k, in no format"
    assert plan.cards_needed == {"bf16": 8, "fp8": 4, "int8": 4, "int4": 2, "int3": 2, "int2": 2}
    int4 = next(o for o in plan.offloads if o.form.name == "int4" and o.treatment is STOCK and o.context == 4096)
    assert 17 <= int4.gib <= 18, "37.0 GiB of weights and 1.3 of KV, 21.7 for all"
    assert int4.tokens_per_second == pytest.approx(25e9 / (int4.gib * GIB))
    assert {o.form.name for o in plan.offloads} == {"bf16", "int8", "int4", "int3", "int2"}, "not what is made online"


def test_offload_is_the_least_that_makes_a_request_fit() -> None:
    plan = make("Llama-3.3-70B", "rtx4090", formats=("int4",), contexts=[4096, 32768])
    geometry, card = plan.question.geometry, plan.question.device
    for offload in plan.offloads:
        window = 8 if offload.treatment.budget else 0
        dealt = offload.context if offload.treatment.dealt else 0
        memory = memory_of(geometry, card, geometry.weight_bytes(offload.form, 1), offload.serving, window, dealt)
        token = geometry.token_bytes(offload.treatment.element_bytes, 1)
        pools = [Pool.of(int(memory.pool + gib * GIB), token, 16) for gib in (offload.gib, offload.gib - 0.5)]
        enough, less = ([load_of(pool, offload.treatment, offload.context, 1, 4096).requests] for pool in pools)
        assert (enough, less) == ([1], [0])
    impossible = make("Llama-3.3-70B", "rtx4090", formats=("int4",), contexts=[131072]).offloads[0]
    assert impossible.treatment is STOCK and math.isinf(impossible.gib), "40 GiB of KV on a 24 GB card"


def test_two_cards_serve_70b_at_4_bits() -> None:
    plan = make("Llama-3.3-70B", "rtx4090", ranks=2, formats=("int4",))
    stock, eighth = plan.rows[0], plan.rows[-1]
    assert plan.fits(FORMATS["int4"]) and plan.offloads == ()
    assert stock.loads[0].requests >= 2 and stock.loads[2].requests == 0
    assert eighth.loads[0].requests > 3 * stock.loads[0].requests
    assert eighth.longest > 2 * stock.longest


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, list(arguments))


def test_prints_tables_and_commands() -> None:
    result = run("Llama-3.3-70B", "--device", "rtx4090", "--count", "2")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "70,553,706,496 parameters" in text
    assert "vllm serve CHECKPOINT --max-model-len 8192" in text and "--tensor-parallel-size 2" in text
    assert "--deltamem-config.keep_ratio 0.1" in text
    assert "no cold and no host tier" in text and "docs/results" in text
    assert "int3" not in text, "narrow formats are only for those who need them"
    assert "fp8 does not serve 4k: short by" in text and "needs --count 4" in text


def test_narrow_formats_appear_when_4_bits_do_not_fit() -> None:
    text = " ".join(run("Llama-3.3-70B", "--device", "rtx4090").output.split())
    assert "No format asked for fits" in text and "int2" in text and "humming-kernels" in text
    assert "The fastest offload above with int4 weights: vllm serve CHECKPOINT" in text
    assert "--cpu-offload-gb" in text


def test_groups_that_do_not_divide_a_row_are_named() -> None:
    note = "int4: rows of some matrices are no multiple of the group"
    assert note in run("SmolLM2-135M", "--gib", "4").output, "576 inputs, groups of 128"
    assert note not in run("Llama-3.1-8B", "--gib", "24").output


def test_compaction_that_may_run_out_of_memory_is_named() -> None:
    asked = ("Llama-3.1-8B", "--device", "h100", "--context", "128k", "--max-num-seqs", "32", "--weights", "int4")
    assert "Compacting the longest prompt may run out of memory" in run(*asked, "--gpu-memory-utilization", "1").output
    assert "run out of memory" not in run(*asked).output


def test_json_has_everything() -> None:
    result = run("meta-llama/llama-3.1-8b-instruct", "--gib", "24", "--context", "8k", "--weights", "fp8", "--json")
    answer = json.loads(result.output)
    assert answer["model"]["parameters"] == 8_030_261_248
    assert [row["kv"] for row in answer["rows"]] == [t.name for t in (STOCK, STOCK_FP8, HALF, QUARTER, TENTH)]
    row = answer["rows"][0]
    assert row["pool_blocks"] == row["pool_bytes"] // (row["token_bytes"] * 16)
    assert row["pool_tokens"] == (row["pool_blocks"] - 1) * 16
    assert row["loads"][0]["stock_logged_concurrency"] == row["pool_blocks"] / 512
    assert "--quantization fp8_per_tensor" in row["loads"][0]["command"]
    assert answer["offloads"] == [] and answer["cards_needed"] == {}


def test_a_quantised_checkpoint_is_recognised(tmp_path: Path) -> None:
    known = find_known_model("SmolLM2-135M")
    assert known is not None
    fields = {**known.config, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert "already quantised (awq)" in run(str(tmp_path), "--gib", "8").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "h100"), "name a model"),
        (("Llama-3.1-8B",), "name one card"),
        (("Llama-3.1-8B", "--device", "h100", "--gib", "3"), "name one card"),
        (("Llama-3.1-8B", "--device", "h10"), "did you mean 'h100'?); available: b200"),
        (("Llama-3.1-8B", "--gib", "0"), "allowed: GiB of one card, > 0"),
        (("lama-3.1-8b", "--gib", "8"), "did you mean 'Llama-3.1-8B'?"),
        (("Llama-3.1-8B", "--gib", "8", "--weights", "q2"), "unknown weight format 'q2'; available: bf16"),
        (("Llama-3.1-8B", "--gib", "8", "--context", "many"), "allowed: tokens such as 8192 or 8k"),
        (("Llama-3.1-8B", "--gib", "8", "--context", "200k"), "up to the model's own 131072 positions"),
        (("Llama-3.1-8B", "--gib", "8", "--keep-ratio", "2"), "keep_ratio: got 2.0, allowed: float, > 0 and <= 1"),
        (("Llama-3.1-8B", "--gib", "8", "--gpu-memory-utilization", "92"), "allowed: > 0 and <= 1"),
        (("Llama-3.1-8B", "--gib", "8", "--max-num-seqs", "9999"), "up to --max-num-batched-tokens (2048)"),
        (("SmolLM2-135M", "--gib", "8", "--count", "2"), "9 query heads cannot be split into 2 equal parts"),
    ],
)
def test_bad_input_is_explained(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding-window attention (sliding_window=4096)"),
        ({"model_type": "gemma2"}, "layers of type sliding_attention"),
        ({"model_type": "deepseek_v3"}, "multi-head latent attention"),
        ({"model_type": "t5"}, "an encoder and a decoder"),
        ({"model_type": "llava"}, "several modalities"),
        ({"model_type": "mamba"}, "layers of type linear_attention"),
        ({"model_type": "bloom"}, "ALiBi"),
    ],
)
def test_other_kinds_of_kv_cache_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(PlanError) as refused:
        load_geometry(str(tmp_path))
    assert message in str(refused.value) and "full attention in every layer" in str(refused.value)
