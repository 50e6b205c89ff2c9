# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem codec`: its controls, what it counts, what it prints and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from deltamem_vllm.cli.main import app
from deltamem_vllm.codec.cold_page import BITS as SERVED_BITS
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.codec.layer_maps import fit_layer_maps
from deltamem_vllm.evaluation.codec.coding import (
    Between,
    Cache,
    code,
    from_pages,
    from_rows,
    layer_coder,
    to_pages,
    to_rows,
)
from deltamem_vllm.evaluation.codec.errors import CodecError
from deltamem_vllm.evaluation.codec.measure import attention_outputs, divergence, output_change, relative_error
from deltamem_vllm.evaluation.codec.rotation import Rotation
from deltamem_vllm.evaluation.codec.run import measure
from deltamem_vllm.evaluation.codec.schemes import SCHEMES, SERVED, Layout
from deltamem_vllm.evaluation.codec.settings import REFERENCES, Settings
from tests.support.calibration_models import calibration_model
from tests.support.tiny_models import HEAD_DIM, HEADS, KV_HEADS, LAYERS

SMALL = ("--tokens", "96", "--texts", "2", "--continuation", "8", "--fit-texts", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model with a tokenizer, for reading only."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: calibration_model(family, root)


def random_cache(layers: int = 2, heads: int = 3, tokens: int = 150, dim: int = 16, seed: int = 0) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(layers, heads, tokens, dim, generator=generator) for _ in range(2))
    # A few channels of real keys are large throughout.
    keys[..., 3] += 8
    return Cache(keys, values)


def turning(tokens: int, dim: int) -> Rotation:
    angles = torch.arange(tokens).unsqueeze(1) * torch.logspace(0, -3, dim // 2)
    angles = torch.cat([angles, angles], 1)
    return Rotation(angles.cos(), angles.sin())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_command_measures_every_reference(tiny: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    model = str(tiny(family))
    done = CliRunner().invoke(app, ["codec", model, *SMALL, "--bits", "8,2", "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "codec.json").read_text()) == found
    rows = {(row["reference"], row["keys"], row["values"], row["bits"]): row for row in found["rows"]}
    assert len(found["rows"]) == len(rows) == 2 * len(SCHEMES)
    assert {name for name, *_ in rows} == set(REFERENCES)
    # Nothing coded: nothing changes, to the last bit. Drawn codes: everything does.
    assert found["controls"]["exact"] == 0
    assert found["controls"]["random"] > 10 * max(row["kl"] for row in rows.values() if row["bits"] == 8)
    for (*scheme, bits), row in rows.items():
        assert row["written"] == (scheme == ["none", "channel", "token"])
        assert len(row["kl_by_text"]) == 2 and len(row["loss_by_layer"]) == LAYERS
        assert min(row["key_bits"], row["value_bits"]) > bits
        assert row["kl_coded_sinks"] > 0
        if bits == 8:
            coarse = rows[*scheme, 2]
            for figure in ("key_error", "value_error", "loss", "loss_keys", "loss_values", "kl"):
                assert 0 < row[figure] < coarse[figure] / 4, (scheme, figure)
    width = KV_HEADS * 2 * HEAD_DIM
    assert found["cost"] == {
        "map_multiply_adds_per_token_and_layer": width**2,
        "attention_multiply_adds_per_token_and_layer": HEADS * 2 * HEAD_DIM,
    }
    report = (tmp_path / "out" / "codec.md").read_text()
    assert report.count("\n| none \\* | channel | token |") == 2 and "multiply-adds a token" in report
    lines = [line for line in done.stderr.splitlines() if " s left" in line]
    assert len(lines) == len(rows) and " of 18: " in lines[0] and "; 0 s left" in lines[-1]


def test_command_prints_tables(tiny: Callable[[str], Path]) -> None:
    arguments = ["--bits", "4,3", "--references", "none, page", "--page-tokens", "16,32"]
    done = CliRunner().invoke(app, ["codec", str(tiny("llama")), *SMALL, *arguments])
    assert done.exit_code == 0, done.stderr
    for part in ("Pages of 16 uncoded", "Pages of 32 uncoded", "none *", "page", "as they are written", "not coded 0,"):
        assert part in done.stdout
    # Maps between layers are neither fitted nor spoken of where nobody asked for them.
    assert "fit maps" not in done.stderr and "multiply-adds" not in done.stdout


def test_same_seed_same_figures(tiny: Callable[[str], Path]) -> None:
    def made(seed: int) -> list[dict[str, Any]]:
        chosen = Settings(96, 1, 8, (4,), references=("none", "layer"), fit_texts=2, seed=seed)
        found: list[dict[str, Any]] = measure(str(tiny("llama")), chosen).as_json()["rows"]
        return found

    assert made(0) == made(0) != made(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "8,9"], "--bits: got 9, allowed: 2 to 8"),
        (["--bits", "1"], "--bits: got 1, allowed: 2 to 8"),
        (["--bits", ""], "--bits: got an empty list"),
        (["--bits", "4,4"], "--bits: got 4,4; give each once"),
        (["--bits", "four"], "--bits: got 'four', allowed: whole numbers separated by commas"),
        (["--references", "none,token before"], "--references: got token before, allowed: none, page, token, layer"),
        (["--references", " "], "--references: got an empty list"),
        (["--page-tokens", "0"], "--page-tokens: got 0, allowed: 1 or more"),
        (["--page-tokens", "1"], "--page-tokens: got 1, too few"),
        (["--tokens", "10"], "--tokens: got 10, allowed: 64 or more"),
        (["--texts", "0"], "--texts: got 0, allowed: 1 or more"),
        (["--fit-texts", "0"], "--fit-texts: got 0, allowed: 1 or more"),
        (["--seed", "-1"], "--seed: got -1, allowed: 0 or more"),
        (["--tokens", "5000"], "the model has 4096; give fewer"),
    ],
)
def test_bad_settings_are_refused(tiny: Callable[[str], Path], arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["codec", str(tiny("llama")), *arguments])
    assert done.exit_code == 1 and not done.stdout
    assert message in done.stderr


def test_bad_models_and_folders_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["codec", *arguments])
        assert done.exit_code == 1
        return done.stderr

    assert "is no folder with a config.json" in error(str(tmp_path / "nowhere"))
    sliding = Path(shutil.copytree(tiny("mistral"), tmp_path / "mistral"))
    config = json.loads((sliding / "config.json").read_text())
    (sliding / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    assert "sliding-window attention" in error(str(sliding))
    (tmp_path / "file").write_text("")
    assert "is no folder; give one" in error(str(sliding), "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", SERVED_BITS)
def test_bits_are_those_of_cold_pages(bits: int, dim: int) -> None:
    served, layout = ColdFormat(bits, dim, 32 * 2 * dim * 2), Layout(SERVED, bits, dim, 32)
    assert layout.written and layout.page_bytes == served.page_bytes and layout.capacity == served.capacity
    assert (layout.key_bits + layout.value_bits) / 2 == pytest.approx(served.effective_bits, abs=1e-12)
    # Scales and zeros: 32 bits a channel of keys in a page, 32 bits a value; 128 of the header and the rest are shared.
    unused = 8 * served.page_bytes - 128 - served.capacity * 2 * dim * bits - 32 * dim - 32 * served.capacity
    shared = (128 + unused) / 2 / (served.capacity * dim)
    assert layout.key_bits == pytest.approx(bits + 32 / served.capacity + shared)
    assert layout.value_bits == pytest.approx(bits + 32 / dim + shared)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_pages_are_full_but_for_less_than_one_step_of_tokens(scheme: Any, bits: int) -> None:
    layout = Layout(scheme, bits, 64, 16, pairs=90)
    parts = (scheme.keys, scheme.values)
    token = sum(part.token_bits(64, bits) for part in parts)
    used = 128 + sum(part.fixed_bits(64, bits) for part in parts) + layout.capacity * token
    assert 0 <= 8 * layout.page_bytes - used < 4 * (token + 1)
    assert layout.key_bits > bits and layout.value_bits > bits
    base = {"none": 0, "page": 16 * 64, "layer": 0}
    if scheme.reference in base:
        scales = {"channel": 32 * 64, "token": 0}
        assert scheme.keys.fixed_bits(64, bits) == scales[scheme.keys.along] + base[scheme.reference]


def test_written_rows_go_through_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltamem_vllm.evaluation.codec import coding

    seen: list[Tensor] = []

    def noted(layout: ColdFormat, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(raw)
        return decode(layout, raw)

    decode = coding.decode_pages
    monkeypatch.setattr(coding, "decode_pages", noted)
    cache = random_cache()
    for bits in (8, 4, 2):
        layout = Layout(SERVED, bits, 16, 32)
        code(layout, cache)
        pages = -(-150 // layout.capacity)
        assert seen[-1].dtype == torch.uint8 and seen[-1].shape == (2 * 3 * pages, layout.page_bytes)
    code(Layout(SERVED, 3, 16, 32), cache)
    assert len(seen) == 3


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.reference != "layer"])
def test_coding_keeps_shapes_and_nearly_everything_at_8_bits(scheme: Any) -> None:
    cache = random_cache()
    decoded = code(Layout(scheme, 8, 16, 32), cache)
    for exact, other in ((cache.keys, decoded.keys), (cache.values, decoded.values)):
        assert exact.shape == other.shape
        assert 0 < relative_error(exact, other) < 0.02


@pytest.mark.parametrize("pages", [1, 2, 2.5])
def test_pages_hold_tokens_in_their_order(pages: float) -> None:
    count = int(24 * pages)
    tokens = random_cache(tokens=count).keys[0].transpose(0, 1).contiguous().transpose(0, 1)
    cut, there = to_pages(tokens, 24)
    assert cut.shape == (3 * -(-count // 24), 24, 16) and int(there.sum()) == 3 * count
    assert torch.equal(cut[0, :5], tokens[0, :5]) and torch.equal(cut[there], tokens.flatten(0, 1))
    assert torch.equal(from_pages(cut, count), tokens)


def test_reference_layer_knows_positions_and_takes_what_the_layer_before_tells() -> None:
    one, rotation = random_cache(layers=1, tokens=400), turning(404, 16)
    rows = to_rows(one, rotation, 4)
    torch.testing.assert_close(from_rows(rows, 3, 16, rotation, 4).keys, one.keys, atol=1e-4, rtol=0)
    # The next layer is a turn of the one before, before RoPE: nothing is left to code but what its coding lost.
    mix = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(5)))[0]
    cache = from_rows(torch.cat([rows, rows @ mix]), 3, 16, rotation, 4)
    layout = Layout(next(scheme for scheme in SCHEMES if scheme.reference == "layer"), 4, 16, 32, pairs=6)
    assert 400 % layout.capacity
    maps = fit_layer_maps([to_rows(cache, rotation, 4)], layer_coder(layout, 3))
    decoded = code(layout, cache, Between(maps, rotation), 4)
    plain = code(replace(layout, scheme=SERVED), cache)
    assert relative_error(cache.values[1:], decoded.values[1:]) < 0.3 * relative_error(
        cache.values[1:], plain.values[1:]
    )
    # The same tokens at other positions: keys differ from what was fitted on only by their turn.
    elsewhere = from_rows(to_rows(cache, rotation, 4), 3, 16, rotation, 0)
    moved = code(layout, elsewhere, Between(maps, rotation), 0)
    torch.testing.assert_close(rotation.undo(moved.keys, 0), rotation.undo(decoded.keys, 4), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="needs maps"):
        code(layout, cache)


def test_models_that_turn_keys_otherwise_are_refused(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltamem_vllm.evaluation.codec import run

    settings = Settings(96, 1, 8, (4,), references=("layer",), fit_texts=1)
    right = run.rotation_of
    monkeypatch.setattr(run, "rotation_of", lambda *given: Rotation(right(*given).cos, -right(*given).sin))
    with pytest.raises(CodecError, match=r"rotary positions of LlamaForCausalLM.*--references none,page,token"):
        measure(str(tiny("llama")), settings)


def test_change_of_attention_is_that_of_plain_softmax() -> None:
    cache, other = random_cache(), random_cache(seed=1)
    queries = torch.randn(2, 6, 5, 16, generator=torch.Generator().manual_seed(2))

    def plain(cache: Cache) -> Tensor:
        keys, values = (part.repeat_interleave(2, 1).double() for part in (cache.keys, cache.values))
        logits = queries.double() @ keys.mT
        unseen = torch.arange(150) > torch.arange(145, 150).unsqueeze(1)
        return logits.masked_fill(unseen, -torch.inf).softmax(-1) @ values

    torch.testing.assert_close(attention_outputs(queries, cache).double(), plain(cache), atol=1e-5, rtol=1e-4)
    change = output_change(attention_outputs(queries, cache), attention_outputs(queries, other))
    wanted = ((plain(cache) - plain(other)).norm(dim=-1) / plain(cache).norm(dim=-1)).mean((1, 2))
    torch.testing.assert_close(change.double(), wanted, atol=1e-4, rtol=1e-4)


def test_divergence_is_that_of_probabilities() -> None:
    one, other = (torch.tensor([shares]).log() for shares in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert divergence(one, one) == 0
    assert divergence(one, other) == pytest.approx(0.25 * torch.tensor(2.0).log().item(), rel=1e-6)
