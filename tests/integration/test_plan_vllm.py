# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem plan` against vLLM's own figures: its configuration and KV cache code, and engines with real weights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.kv_cache_utils import estimate_max_model_len, get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.plan.capacity import MAX_RESERVE_SHARE, Pool, Treatment, longest_context
from deltamem_vllm.evaluation.plan.catalog import Device, find_device, known_devices, known_models
from deltamem_vllm.evaluation.plan.commands import serve_command
from deltamem_vllm.evaluation.plan.formats import FORMATS
from deltamem_vllm.evaluation.plan.geometry import Geometry, load_geometry
from deltamem_vllm.evaluation.plan.memory import (
    BLOCK_SIZE,
    GPU_MEMORY_UTILIZATION,
    Serving,
    captured_sizes,
    default_batch,
    table_bytes,
    window_bytes,
)
from deltamem_vllm.evaluation.plan.planner import choose_contexts, make_plan, make_question, make_treatments
from deltamem_vllm.integration import worker
from deltamem_vllm.integration.policy import MAX_RESERVE_SHARE as POLICYS_SHARE
from deltamem_vllm.integration.spec import DeltaMemSpec
from deltamem_vllm.integration.worker import window_bytes as workers_window_bytes
from deltamem_vllm.plugin import register
from deltamem_vllm.scoring.registry import load_scorer

SUPPORT = Path(__file__).resolve().parents[1] / "support"
STOCK, STOCK_FP8, QUARTER, TENTH = make_treatments(DeltaMemConfig(), (0.25, 0.1))
MODELS = ("SmolLM2-135M", "Llama-3.3-70B", "Mistral-7B-v0.3", "Qwen2.5-7B")


# ---- names and defaults --------------------------------------------------------------------------------------------


def test_defaults_are_vllms() -> None:
    assert EngineArgs.gpu_memory_utilization == GPU_MEMORY_UTILIZATION
    assert BLOCK_SIZE == VllmConfig().cache_config.DEFAULT_BLOCK_SIZE
    assert MAX_RESERVE_SHARE == POLICYS_SHARE


@pytest.mark.parametrize("name", list(known_devices()))
def test_batch_defaults_are_vllms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = find_device(name, None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *a, **k: card.total_bytes)
    monkeypatch.setattr(type(current_platform), "get_device_name", lambda *a, **k: card.title)
    tokens, seqs = EngineArgs.get_batch_defaults(1)
    server = UsageContext.OPENAI_API_SERVER
    assert default_batch(card) == (tokens[server], seqs[server])


def test_every_printed_command_parses(tmp_path: Path) -> None:
    register()
    top = FlexibleArgumentParser(prog="vllm")
    make_arg_parser(top.add_subparsers(dest="subparser").add_parser("serve", usage="vllm serve"))
    geometry = load_geometry("Llama-3.1-8B")
    serving = Serving(ranks=2, utilization=0.9, max_num_seqs=16, batch_tokens=512, block_size=32, eager=True)
    for form in FORMATS.values():
        for treatment in (STOCK, STOCK_FP8, QUARTER):
            command = shlex.split(serve_command(geometry, form, treatment, serving, 4096, offload_gib=1.5))
            assert command[0] == "vllm"
            args = top.parse_args(command[1:])
            validate_parsed_serve_args(args)
            assert args.model_tag == ("CHECKPOINT" if form.checkpoint else "meta-llama/Llama-3.1-8B-Instruct")
            assert (args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens) == (4096, 16, 512)
            assert (args.gpu_memory_utilization, args.tensor_parallel_size, args.block_size) == (0.9, 2, 32)
            assert (args.cpu_offload_gb, args.enforce_eager) == (1.5, True)
            assert args.quantization == ("fp8_per_tensor" if form.name == "fp8" else None)
            assert args.kv_cache_dtype == ("fp8" if treatment is STOCK_FP8 else "auto")
            kept = {"deltamem": {"keep_ratio": 0.25}} if treatment is QUARTER else {}
            assert args.additional_config == kept


# ---- vLLM's KV cache code on shipped geometries, without weights ---------------------------------------------------


def vllm_config(folder: Path, name: str, ranks: int = 1) -> VllmConfig:
    """vLLM's configuration of a shipped geometry, deltamem on."""
    fields = dict(known_models()[name].config)
    classes = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    fields["architectures"] = [classes[fields["model_type"]]]
    (folder / "config.json").write_text(json.dumps(fields))
    config = EngineArgs(
        model=str(folder),
        runner="generate",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_batched_tokens=2048,
        max_num_seqs=32,
        block_size=BLOCK_SIZE if name != "SmolLM2-135M" else 32,
        enforce_eager=True,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
        additional_config={"deltamem": {}},
    ).create_engine_config()
    config.cache_config.kv_cache_layout = KVCacheLayout.LBNHC.name
    return config


def specs_of(config: VllmConfig, treatment: Treatment) -> dict[str, Any]:
    """The specs that vLLM's layers would give, made from vLLM's own reading of the configuration."""
    model, parallel = config.model_config, config.parallel_config
    kind = DeltaMemSpec if treatment.budget else FullAttentionSpec
    import torch

    spec = kind(
        block_size=config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=torch.bfloat16 if treatment.element_bytes == 2 else torch.float8_e4m3fn,
    )
    return {f"model.layers.{i}.self_attn.attn": spec for i in range(model.get_num_layers(parallel))}


@pytest.mark.parametrize("name", MODELS)
def test_pool_and_lengths_are_vllms(name: str, tmp_path: Path) -> None:
    geometry = load_geometry(name)
    config = vllm_config(tmp_path, name)
    block_size = config.cache_config.block_size
    for treatment in (STOCK, STOCK_FP8, QUARTER, TENTH):
        if treatment.budget:
            config.additional_config["deltamem"] = {"keep_ratio": treatment.budget.keep_ratio}
        config.model_config.max_model_len = 4096
        specs = specs_of(config, treatment)
        token = geometry.token_bytes(treatment.element_bytes, 1)
        assert sum(spec.page_size_bytes for spec in specs.values()) == token * block_size

        available = token * 9000 + 12345  # not whole blocks
        pool = Pool.of(available, token, block_size)
        (kv_cache,) = get_kv_cache_configs(config, [specs], [available])
        assert kv_cache.num_blocks == pool.blocks
        if not treatment.budget:
            tokens, concurrency = get_kv_cache_capacity(config, kv_cache)
            assert concurrency == pool.logged_concurrency(4096)
            assert tokens == int(pool.logged_concurrency(4096) * 4096)

        # The longest --max-model-len for which vLLM starts, found by vLLM; it keeps the null block out as we do.
        config.model_config.max_model_len = geometry.max_positions
        longest = longest_context(
            lambda _, pool=pool: pool, treatment, geometry.max_positions, config.max_in_flight_tokens
        )
        assert longest == estimate_max_model_len(config, specs, available - token * block_size)


@pytest.mark.parametrize(("name", "ranks"), [("Llama-3.3-70B", 2), ("Llama-3.3-70B", 8), ("Qwen2.5-7B", 4)])
def test_parts_of_ranks_are_vllms(name: str, ranks: int, tmp_path: Path) -> None:
    geometry = load_geometry(name)
    config = vllm_config(tmp_path, name, ranks)
    model, parallel = config.model_config, config.parallel_config
    assert geometry.rank_query_heads(ranks) == model.get_num_attention_heads(parallel)
    assert geometry.rank_kv_heads(ranks) == model.get_num_kv_heads(parallel)
    assert geometry.layers == model.get_num_layers(parallel)
    assert geometry.token_bytes(2, ranks) * 16 == sum(s.page_size_bytes for s in specs_of(config, STOCK).values())
    serving = Serving(ranks=ranks, max_num_seqs=32, eager=True)
    config.additional_config["deltamem"] = {"scorer": "snapkv"}  # one that reads the whole window
    assert window_bytes(geometry, find_device("h100", None), serving, DeltaMemConfig().window) == workers_window_bytes(
        config
    )


@pytest.mark.parametrize(("name", "ranks"), [("Llama-3.1-8B", 1), ("Llama-3.3-70B", 8), ("Qwen2.5-7B", 4)])
def test_page_tables_are_the_workers(name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, card = load_geometry(name), find_device("h100", None)
    serving = Serving(ranks=ranks, max_num_seqs=32)
    config = vllm_config(tmp_path, name, ranks)
    # As on a GPU: graphs, for the sizes that vLLM captures there.
    monkeypatch.setattr(worker, "has_graphs", lambda config: True)
    monkeypatch.setattr(config.compilation_config, "cudagraph_capture_sizes", captured_sizes(card, serving))
    config.additional_config["deltamem"] = {"cold_bits": 0}  # what `auto` is there
    assert table_bytes(geometry, card, serving, 4096) == worker.table_bytes(config)
    assert worker.batch_limits(config)[0] == 64, "more than the slots: padding for graphs counts"
    config.additional_config["deltamem"] = {"dealing": "equal"}
    assert worker.table_bytes(config) == 0


# ---- engines -------------------------------------------------------------------------------------------------------

# One process: vLLM is imported once, and each engine lives in a fork of its own.
ENGINES = """
import json, os, sys
import vllm.v1.worker.cpu_worker
from vllm import LLM
from vllm.model_executor.model_loader import base_loader

def measure(arguments, out):
    found = {}
    stock = base_loader.process_weights_after_loading
    def process(model, *args, **kwargs):
        # Before this step: the CPU platform then packs weights into objects that are no parameters.
        sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
        found["weight_bytes"] = sum(sizes.values())
        return stock(model, *args, **kwargs)
    base_loader.process_weights_after_loading = process
    core = LLM(**arguments).llm_engine.engine_core.engine_core
    config, kv = core.vllm_config, core.scheduler.kv_cache_config
    (group,) = kv.kv_cache_groups
    found["blocks"] = kv.num_blocks
    found["layers"] = len(group.layer_names)
    found["page_bytes"] = group.kv_cache_spec.page_size_bytes
    found["concurrency"] = config.cache_config.kv_cache_max_concurrency
    found["kv_tokens"] = config.cache_config.kv_cache_size_tokens
    found["in_flight_tokens"] = config.max_in_flight_tokens
    with open(out, "w") as file:
        json.dump(found, file)

for i, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        try:
            measure(arguments, f"{sys.argv[2]}/{i}.json")
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
CASES = ("smollm2 stock", "smollm2 fp8", "smollm2 deltamem", "tiny mistral", "tiny qwen2")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Geometry, dict[str, Any]]]]:
    """What vLLM says of each case, with the geometry that the plan reads."""
    sys.path.insert(0, str(SUPPORT))
    try:
        from tiny_models import build_tiny_model
    finally:
        sys.path.remove(str(SUPPORT))
    from deltamem_vllm.models.catalog import resolve_model

    folder = tmp_path_factory.mktemp("plan")
    smollm2 = resolve_model("smollm2")
    models = [smollm2] * 3 + [str(build_tiny_model(family, folder)) for family in ("mistral", "qwen2")]
    extra: list[dict[str, Any]] = [
        {},
        {"kv_cache_dtype": "fp8"},
        {"additional_config": {"deltamem": {"keep_ratio": 0.25}}},
        {},
        {},
    ]
    common = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "block_size": 32,
    }
    arguments = [{"model": model, **common, **more} for model, more in zip(models, extra, strict=True)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ENGINES, json.dumps(arguments), str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    answers = [folder / f"{i}.json" for i in range(len(CASES))]
    missing = [case for case, answer in zip(CASES, answers, strict=True) if not answer.is_file()]
    assert not missing, f"no engine for {missing}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    yield {
        case: (load_geometry(model), json.loads(answer.read_text()))
        for case, model, answer in zip(CASES, models, answers, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_engines_agree(case: str, engines: dict[str, tuple[Geometry, dict[str, Any]]]) -> None:
    geometry, found = engines[case]
    serving = Serving(max_num_seqs=16, batch_tokens=512, block_size=32, eager=True)
    treatment = {"smollm2 fp8": STOCK_FP8, "smollm2 deltamem": QUARTER}.get(case, STOCK)
    token = geometry.token_bytes(treatment.element_bytes, 1)
    assert found["weight_bytes"] == geometry.weight_bytes(FORMATS["bf16"], 1)
    assert found["layers"] * found["page_bytes"] == token * 32
    cpu = Device("cpu", "CPU", 1.0, 1.0)
    observed = load_scorer("predictor-tova").observed(DeltaMemConfig().window)  # that of the shipped calibration
    window = window_bytes(geometry, cpu, serving, observed) if treatment.budget else 0
    pool = Pool.of((1 << 30) - window, token, 32)
    assert found["blocks"] == pool.blocks
    if not treatment.budget:
        assert found["concurrency"] == pool.logged_concurrency(4096)
        assert found["kv_tokens"] == int(pool.logged_concurrency(4096) * 4096)


@pytest.mark.slow
def test_a_plan_of_the_engines_memory_has_its_figures(
    engines: dict[str, tuple[Geometry, dict[str, Any]]],
) -> None:
    """From the card to the row: a card that leaves the engine's KV memory over makes the same pool."""
    geometry, found = engines["smollm2 stock"]
    serving = Serving(utilization=1.0, block_size=32, eager=True)
    contexts = choose_contexts([4096], geometry.max_positions)
    form = FORMATS["bf16"]

    def plan_for(gib: float) -> Any:
        question = make_question(
            geometry, find_device(None, gib), contexts, [form], [STOCK], 0, serving, max_num_seqs=16, batch_tokens=512
        )
        return make_plan(question).rows[0]

    taken = plan_for(8.0).memory
    card = 1 + (taken.weights + taken.estimated) / (1 << 30)
    row = plan_for(card)
    assert abs(row.pool.blocks - found["blocks"]) <= 1, "GiB of the card are rounded to bytes"
    assert row.loads[0].requests == int(found["concurrency"])
