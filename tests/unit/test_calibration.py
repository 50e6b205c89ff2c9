# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Calibration: the recorded attention, the profile, the artifact, and which model it belongs to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from deltamem_vllm.calibration import artifact, repeat
from deltamem_vllm.calibration.artifact import CARD, SHIPPED, TENSORS, Calibration, Card, find, load, save
from deltamem_vllm.calibration.attention import NAME, Recorder, attend_and_peak
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import Geometry, fingerprint, model_folder
from deltamem_vllm.calibration.predictor import (
    Entries,
    PredictorFit,
    held_out_metrics,
    learn,
    predict,
    rank_correlation,
)
from deltamem_vllm.calibration.profile import rank_profile, shares
from deltamem_vllm.calibration.run import calibrate, excerpts_of
from deltamem_vllm.cli.main import app
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.features import feature_parts
from deltamem_vllm.scoring.registry import load_scorer
from tests.support.tiny_models import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB, build_tiny_model

GEOMETRY = Geometry(LAYERS, HEADS, KV_HEADS, HEAD_DIM)
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def add_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i + 2 for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model with a tokenizer, for reading only."""
    root = tmp_path_factory.mktemp("models")

    def of(family: str) -> Path:
        folder = build_tiny_model(family, root)
        if not (folder / "tokenizer.json").exists():
            # Both kinds: instruction-tuned and base models.
            add_tokenizer(folder, None if family == "mistral" else TEMPLATE)
        return folder

    return of


@pytest.fixture
def llama(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "llama"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own, except for the test that needs the embedded model."""
    if "smollm2_path" not in request.fixturenames:
        monkeypatch.setenv("DELTAMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def falling(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values


def made_for(own: str = "f" * 64, geometry: Geometry = GEOMETRY) -> Calibration:
    card = Card("some/model", own, geometry, {"shares": {"0.5": {"layers": [0.5, 0.25, 0.75]}}})
    return Calibration(card, {"rank_utility": falling(geometry.layers, geometry.kv_heads, 16)})


# What is recorded.


def test_peaks_are_the_maxima_of_whole_attention_weights() -> None:
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(6, 37, 8, generator=gen)
    key, value = torch.randn(2, 90, 8, generator=gen), torch.randn(2, 90, 8, generator=gen)
    out, peak = attend_and_peak(query, key, value, 0.4, range(5, 60), piece_elements=6 * 90 * 10)
    expected = torch.zeros(2, 90)
    for head in range(6):
        for i in range(37):
            seen = 90 - 37 + i + 1
            weights = (key[head // 3, :seen] @ query[head, i] * 0.4).softmax(0)
            torch.testing.assert_close(out[head, i], weights @ value[head // 3, :seen])
            expected[head // 3, :seen] = torch.maximum(expected[head // 3, :seen], weights)
    torch.testing.assert_close(peak, expected[:, 5:60])
    torch.testing.assert_close(attend_and_peak(query, key, value, 0.4, range(5, 60)), (out, peak))


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_agrees_with_whole_forwards_without_a_cache(
    tiny: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(repeat, "CHUNK", 50)
    folder = tiny(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    recorder = Recorder()
    recorder.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
    prompt = repeat.prompt_of(tokenizer)
    assert prompt.chat == (family != "mistral")
    (excerpt,) = excerpts_of(tokenizer, 1, 120)
    context = excerpt.tokens
    done = repeat.repeat_pass(model, tokenizer, recorder, prompt, context)

    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    whole = [*prompt.before, *context]
    watched = slice(max(repeat.SINKS, len(prompt.before)), len(whole))
    expected = torch.zeros(LAYERS, KV_HEADS, watched.stop - watched.start)
    right = 0
    for start in (0, 50, 100):
        text = "\n\nRepeat the text above word for word."
        if start:
            text += f" Go on after: {tokenizer.decode(context[start - 8 : start])}"
        # After the user's message comes the end of it and the beginning of the answer.
        asked = tokenizer(text + ("<|end|><|assistant|>" if prompt.chat else "\n\n"), add_special_tokens=False)
        chunk = context[start : start + 50]
        ids = torch.tensor([[*whole, *asked.input_ids, *chunk]])
        with torch.inference_mode():
            seen = eager(ids, output_attentions=True)
        for layer, weights in enumerate(seen.attentions):
            rows = weights[0, :, len(whole) :, watched].unflatten(0, (KV_HEADS, -1))
            expected[layer] = torch.maximum(expected[layer], rows.amax((1, 2)))
        right += int((seen.logits[0, -len(chunk) - 1 : -1].argmax(-1) == torch.tensor(chunk)).sum())
    torch.testing.assert_close(done.peaks, expected, atol=1e-5, rtol=1e-4)
    assert done.accuracy == right / len(context)


def test_attention_that_is_not_plain_is_refused() -> None:
    module = torch.nn.Module()
    q = torch.zeros(1, 2, 3, 4)
    for options in ({"softcap": 50.0}, {"sliding_window": 8}):
        with pytest.raises(CalibrationError, match=f"calls attention with {next(iter(options))}; supported: plain"):
            Recorder().attend(module, q, q, q, None, **options)
    with pytest.raises(CalibrationError, match="a mask or batch of its own"):
        Recorder().attend(module, q, q, q, torch.zeros(1))
    recorder = Recorder()
    recorder.start(range(3))
    with pytest.raises(CalibrationError, match=r"seen in layers \[\]"):
        recorder.finish()


def test_chat_template_has_to_give_the_message() -> None:
    class Silent:
        chat_template = "there is one"

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
            return "no message"

    with pytest.raises(CalibrationError, match="chat template"):
        repeat.prompt_of(Silent())


# The profile.


@pytest.mark.parametrize("count", [8, 16, 50, 1000])
def test_profile_is_the_mean_of_ranked_entries_in_equal_bins(count: int) -> None:
    peaks = torch.rand(2, 3, count, generator=torch.Generator().manual_seed(1))
    profile = rank_profile(peaks, 16)
    # Each entry as 16 equal pieces: then bins have whole numbers of them.
    pieces = peaks.sort(-1, descending=True).values.repeat_interleave(16, -1)
    torch.testing.assert_close(profile, pieces.unflatten(-1, (16, count)).mean(-1))
    assert (profile.diff(dim=-1) <= 0).all()


def test_shares_follow_the_best_bins_of_all_pairs() -> None:
    profile = torch.tensor([[[9.0, 8, 7, 6], [5, 1, 0, 0]], [[4, 3, 0, 0], [0, 0, 0, 0]]])
    assert shares(profile, 0.5).tolist() == [[1.0, 0.5], [0.5, 0.0]]
    assert shares(profile, 0.25).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    # Among equals the earlier ones.
    assert shares(torch.zeros(1, 2, 4), 0.5).tolist() == [[1.0, 0.0]]


# The predictor.


def text_of(seed: int, layers: int = 3, heads: int = 2, dim: int = 8, count: int = 200) -> Entries:
    """Entries whose attention follows from key and value in every head differently, but for a little noise."""
    gen = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(layers, heads, count, dim, generator=gen) for _ in range(2))
    maps = torch.randn(layers, heads, 2 * dim, generator=torch.Generator().manual_seed(99))
    logs = (torch.cat([keys, values], -1) @ maps.unsqueeze(3)).squeeze(3) * 0.3 - 4
    logs += 0.1 * torch.randn(logs.shape, generator=gen)
    watched = range(7, count - 3)
    return Entries(list(keys), list(values), logs.exp().clamp(max=1)[..., watched.start : watched.stop], watched)


def by_least_squares(texts: list[Entries], layer: int, head: int) -> Tensor:
    """Ridge regression as least squares with a row for each damped weight."""
    rows, targets = [], []
    for text in texts:
        phi = torch.cat(feature_parts(text.keys[layer], text.values[layer]), -1)[head]
        rows.append(phi[text.watched.start : text.watched.stop].double())
        targets.append((text.peaks[layer, head].double() + 1e-3).log())
    x, y = torch.cat(rows), torch.cat(targets)
    damping = (1e-4 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    bottom = torch.zeros(x.shape[1], 1, dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([y.unsqueeze(1), bottom])).solution.squeeze(1)


def test_fit_is_ridge_regression_over_all_texts() -> None:
    texts = [text_of(0), text_of(1, count=90), text_of(2)]
    fit = PredictorFit()
    for text in texts:
        learn(fit, text)
    weights = fit.solve()
    assert weights.shape == (3, 2, 1 + 8 + 4 + 8 + 4) and weights.dtype == torch.float32
    for layer in range(3):
        for head in range(2):
            expected = by_least_squares(texts, layer, head)
            torch.testing.assert_close(weights[layer, head].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictor_of_a_model_is_fitted_to_what_its_cache_held(tiny: Callable[[str], Path], family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    recorder = Recorder()
    recorder.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
    prompt = repeat.prompt_of(tokenizer)
    fit, texts = PredictorFit(), []
    for excerpt in excerpts_of(tokenizer, 2, 150):
        texts.append(repeat.repeat_pass(model, tokenizer, recorder, prompt, excerpt.tokens).entries)
        learn(fit, texts[-1])
    whole = torch.tensor([[*prompt.before, *excerpt.tokens]])
    assert texts[-1].watched == range(max(repeat.SINKS, len(prompt.before)), whole.shape[1])
    with torch.inference_mode():
        cache = AutoModelForCausalLM.from_pretrained(folder).eval()(whole, use_cache=True).past_key_values
    for layer in range(LAYERS):
        torch.testing.assert_close(texts[-1].keys[layer], cache.layers[layer].keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(texts[-1].values[layer], cache.layers[layer].values[0], atol=1e-4, rtol=1e-4)
    weights = fit.solve()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            expected = by_least_squares(texts, layer, head)
            torch.testing.assert_close(weights[layer, head].double(), expected, atol=1e-3, rtol=1e-3)
    # What the server's scorer makes of them is the fit's own prediction.
    scorer = load_scorer("predictor")
    scorer.bind(weights)
    for layer, row in enumerate(predict(weights, texts[0])):
        view = ScoreView(texts[0].keys[layer], texts[0].values[layer], None, 1.0, layer)
        rated = scorer.score(view)[:, texts[0].watched.start : texts[0].watched.stop]
        torch.testing.assert_close(rated, row.exp(), atol=1e-6, rtol=1e-3)


def test_metrics_of_a_text_not_seen() -> None:
    fit = PredictorFit()
    for seed in range(8):
        learn(fit, text_of(seed))
    text = text_of(100)
    profile = rank_profile(text.peaks)
    found = held_out_metrics(fit.solve(), profile, text)
    assert found["r2"] > 0.9 and found["r2_within_heads"] > 0.9 and found["spearman"] > 0.9
    for ratio, kept in found["kept"].items():
        assert float(ratio) * 0.8 < kept["random"] < kept["predictor"] <= kept["oracle"] <= 1
    learned_nothing = held_out_metrics(torch.zeros_like(fit.solve()), profile, text)
    assert learned_nothing["r2"] < 0 and learned_nothing["spearman"] is None


def test_rank_correlation_is_the_correlation_of_mean_ranks() -> None:
    one = torch.tensor([[1.0, 2, 2, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    other = torch.tensor([[1.0, 3, 2, 9], [8, 4, 2, 1], [1, 2, 3, 4]])
    found = rank_correlation(one, other)
    ranks = torch.tensor([[1.0, 2.5, 2.5, 4], [1, 3, 2, 4]])
    torch.testing.assert_close(found[0].float(), torch.corrcoef(ranks)[0, 1])
    torch.testing.assert_close(found[1].item(), -1.0)
    assert found[2].isnan()


# The fingerprint.


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(name, t) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    kept = {name: value for name, value in config.items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(kept))


def test_copies_in_other_dtypes_and_of_other_writers_agree(llama: Path) -> None:
    def tiny_values(name: str, tensor: Tensor) -> Tensor:
        # Weights of a published model: bfloat16, some of them below float16's normal range.
        return torch.where(torch.arange(tensor.shape[-1]) % 5 == 0, tensor * 1e-6, tensor).bfloat16()

    rewrite(llama, tiny_values)
    own = fingerprint(llama)
    for dtype in (torch.float32, torch.float16):
        copy = Path(shutil.copytree(llama, llama.parent / str(dtype)))
        rewrite(copy, lambda name, tensor, dtype=dtype: tensor.to(dtype))  # type: ignore[misc]
        edit_config(copy, dtype=str(dtype).removeprefix("torch."))
        assert fingerprint(copy) == own
    rope = json.loads((llama / "config.json").read_text())["rope_parameters"]
    edit_config(llama, rope_parameters="drop", rope_theta=int(rope["rope_theta"]), rope_scaling=None)
    assert fingerprint(llama) == own


def test_shards_change_nothing(llama: Path) -> None:
    own = fingerprint(llama)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, llama / file)
    assert fingerprint(llama) == own
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(llama) == own


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj"])
def test_other_weights_differ(llama: Path, layer: int, kind: str) -> None:
    own = fingerprint(llama)
    tuned = f"layers.{layer}.self_attn.{kind}.weight"
    rewrite(llama, lambda name, tensor: tensor * 1.01 if name.endswith(tuned) else tensor)
    assert fingerprint(llama) != own


@pytest.mark.parametrize("fields", [{"vocab_size": VOCAB + 1}, {"rope_parameters": {"rope_theta": 1e6}}])
def test_other_sizes_differ(llama: Path, fields: dict[str, Any]) -> None:
    own = fingerprint(llama)
    edit_config(llama, **fields)
    assert fingerprint(llama) != own


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.qkv_proj.weight", "transformer.h.{}.attn.c_attn.weight"])
def test_fused_projections_are_read(llama: Path, name: str) -> None:
    tensors = {name.format(i): torch.full((8, 8), float(i)) for i in range(12)}
    save_file(tensors, llama / "model.safetensors")
    own = fingerprint(llama)
    tensors[name.format(1)] += 1  # not the last: layer 1 must not be taken for 11
    save_file(tensors, llama / "model.safetensors")
    assert fingerprint(llama) == own
    tensors[name.format(LAYERS - 1)] += 1
    save_file(tensors, llama / "model.safetensors")
    assert fingerprint(llama) != own


def test_a_model_without_weights_cannot_be_recognised(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CalibrationError, match="no safetensors with the attention weights of layer 0"):
        calibrate(str(llama))
    assert find("auto", llama) is None
    save(made_for(), tmp_path / "made")
    with pytest.raises(CalibrationError, match="no safetensors"):
        find(str(tmp_path / "made"), llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "not a JSON object"), ("{", "cannot be read"), ("{}", "states no usable 'num_attention_heads'")],
)
def test_config_that_states_nothing(llama: Path, text: str, message: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        fingerprint(llama)


def test_an_id_is_looked_up_in_the_local_cache(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny("llama"), hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    assert model_folder("org/name", cache_dir=str(tmp_path / "hub")) == hub / "snapshots" / "abc"
    assert model_folder("org/name", "other", str(tmp_path / "hub")) is None
    assert model_folder("/no/such/folder") is None
    assert find("auto", "org/other") is None


# The artifact.


def test_artifact_comes_back_as_it_was(tmp_path: Path) -> None:
    made = made_for()
    save(made, tmp_path / "a" / "b")
    # A server may run as another user.
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "b").iterdir()}) == 1
    back = load(tmp_path / "a" / "b")
    assert back.card == made.card
    assert back.folder == tmp_path / "a" / "b"
    assert torch.equal(back.rank_utility, made.rank_utility)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    # A list of numbers is one line of the card.
    assert '"layers": [ 0.5, 0.25, 0.75 ]' in (back.folder / CARD).read_text()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(LAYERS, KV_HEADS, 85).double(), "dtype torch.float64, expected torch.float32"),
        (torch.zeros(LAYERS, KV_HEADS, 84), r"shape \(3, 2, 84\), expected \(3, 2, 85\)"),
        (torch.full((LAYERS, KV_HEADS, 85), torch.inf), "not finite"),
    ],
)
def test_a_predictor_is_checked_where_there_is_one(tmp_path: Path, weights: Tensor, message: str) -> None:
    made = made_for()
    assert made.predictor is None
    with pytest.raises(CalibrationError, match=f"predictor of the calibration has .*{message}"):
        save(replace(made, tensors={**made.tensors, "predictor": weights}), tmp_path / "never")
    right = torch.ones(LAYERS, KV_HEADS, 1 + HEAD_DIM + HEAD_DIM // 2 + HEAD_DIM + 4)
    save(replace(made, tensors={**made.tensors, "predictor": right}), tmp_path / "made")
    back = load(tmp_path / "made").predictor
    assert back is not None and torch.equal(back, right)


def test_later_tensors_are_no_obstacle(tmp_path: Path) -> None:
    made = made_for()
    save(replace(made, tensors={**made.tensors, "predictor.0": torch.ones(3)}), tmp_path / "new")
    assert load(tmp_path / "new").tensors["predictor.0"].tolist() == [1, 1, 1]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    save(made_for("1"), tmp_path / "made")
    with pytest.raises(CalibrationError, match="holds a calibration already; --force replaces it"):
        save(made_for("2"), tmp_path / "made")
    assert load(tmp_path / "made").card.fingerprint == "1"
    save(made_for("2"), tmp_path / "made", force=True)
    assert load(tmp_path / "made").card.fingerprint == "2"
    (tmp_path / "made" / "notes.txt").write_text("mine")
    with pytest.raises(CalibrationError, match=r"holds other files \(notes.txt\)"):
        save(made_for("3"), tmp_path / "made", force=True)
    with pytest.raises(CalibrationError, match="is a file"):
        save(made_for(), tmp_path / "made" / "notes.txt")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> str:
        raise OSError("disk full")

    save(made_for("1"), tmp_path / "made")
    monkeypatch.setattr(artifact, "_card_text", full)
    with pytest.raises(OSError, match="disk full"):
        save(made_for("2"), tmp_path / "made", force=True)
    assert load(tmp_path / "made").card.fingerprint == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def card_with(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps({**card, **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CARD).unlink(), "has no card.json"),
        (lambda folder: (folder / CARD).write_text("{"), "card.json cannot be read"),
        (lambda folder: (folder / CARD).write_text("[]"), "not a JSON object"),
        (card_with(format_version=2), "has format_version 2, this deltamem reads 1"),
        (card_with(geometry={"layers": 3}), "states no usable model, fingerprint or geometry"),
        (card_with(geometry=None), "states no usable model, fingerprint or geometry"),
        (card_with(tensors_sha256="0"), "its card says 0"),
        (lambda folder: (folder / TENSORS).unlink(), "calibration.safetensors is missing"),
        (lambda folder: (folder / TENSORS).write_bytes(b"x"), "one of the two changed"),
    ],
)
def test_damage_is_said(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    save(made_for(), tmp_path / "made")
    damage(tmp_path / "made")
    with pytest.raises(CalibrationError, match=message) as caught:
        load(tmp_path / "made")
    assert "deltamem calibrate" in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, "has no tensor rank_utility"),
        (falling(LAYERS, KV_HEADS, 16).double(), "dtype torch.float64, expected torch.float32"),
        (falling(LAYERS, KV_HEADS + 1, 16), r"shape \(3, 3, 16\), expected \(3, 2, quantiles\)"),
        (falling(LAYERS, KV_HEADS), "shape"),
        (falling(LAYERS, KV_HEADS, 16) * torch.nan, "not finite"),
        (falling(LAYERS, KV_HEADS, 16) - 1, "below zero"),
        (falling(LAYERS, KV_HEADS, 16).flip(-1), "above the one before"),
    ],
)
def test_tensors_are_checked_both_ways(tmp_path: Path, profile: Tensor | None, message: str) -> None:
    wrong = {"other": torch.ones(1)} if profile is None else {"rank_utility": profile}
    with pytest.raises(CalibrationError, match=message):
        save(replace(made_for(), tensors=wrong), tmp_path / "never")
    assert not (tmp_path / "never").exists()
    save(made_for(), tmp_path / "made")
    save_file(wrong, tmp_path / "made" / TENSORS)
    card_with(tensors_sha256=artifact.sha256_of(tmp_path / "made" / TENSORS))(tmp_path / "made")
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / "made")


# Which one a server takes.


def test_auto_takes_the_first_that_belongs_to_the_model(llama: Path, cache: Path) -> None:
    own = fingerprint(llama)
    assert find("auto", llama) is None
    cached, beside = cache / "calibrations" / own, llama / "deltamem"
    save(made_for(own), cached)
    found = find("auto", llama)
    assert found is not None and found.folder == cached
    # One that came along when the model was fine-tuned is passed over.
    save(made_for("of another"), beside)
    found = find("auto", llama)
    assert found is not None and found.folder == cached
    save(made_for(own), beside, force=True)
    found = find("auto", llama)
    assert found is not None and found.folder == beside
    assert find("none", llama) is None


def test_a_damaged_one_is_not_passed_over(llama: Path, cache: Path) -> None:
    own = fingerprint(llama)
    save(made_for(own), cache / "calibrations" / own)
    save(made_for(own), llama / "deltamem")
    (llama / "deltamem" / TENSORS).write_bytes(b"x")
    with pytest.raises(CalibrationError, match="one of the two changed"):
        find("auto", llama)


def test_a_named_one_must_belong_to_the_model(llama: Path, tmp_path: Path) -> None:
    own = fingerprint(llama)
    save(made_for(own), tmp_path / "right")
    found = find(str(tmp_path / "right"), llama)
    assert found is not None and found.card.fingerprint == own
    save(made_for("other"), tmp_path / "wrong")
    with pytest.raises(CalibrationError, match=rf"some/model \(fingerprint other\).*{own}; .*calibrate {llama}"):
        find(str(tmp_path / "wrong"), llama)
    with pytest.raises(CalibrationError, match="cannot be compared with org/missing"):
        find(str(tmp_path / "right"), "org/missing")
    with pytest.raises(CalibrationError, match=r"has no card\.json"):
        find(str(tmp_path / "nothing"), llama)


def test_finding_imports_neither_transformers_nor_vllm(llama: Path, tmp_path: Path) -> None:
    save(made_for(fingerprint(llama)), llama / "deltamem")
    code = (
        "import sys\n"
        "from deltamem_vllm.calibration.artifact import find\n"
        f"assert find('auto', {str(llama)!r}) is not None\n"
        "print(sorted({'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# The command.


@pytest.mark.parametrize("family", FAMILIES)
def test_command_makes_what_a_server_finds(tiny: Callable[[str], Path], family: str, cache: Path) -> None:
    model = tiny(family)
    arguments = ["calibrate", str(model), "--texts", "2", "--tokens", "150"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "layer" in done.stdout and "best 25%" in done.stdout
    found = find("auto", model)
    assert found is not None and found.folder == cache / "calibrations" / fingerprint(model)
    assert found.card.geometry == GEOMETRY
    assert found.rank_utility.shape == (LAYERS, KV_HEADS, 128)
    assert found.predictor is not None and found.predictor.isfinite().all()
    details = found.card.details
    assert found.card.model == model.name
    assert [text["tokens"] for text in details["texts"]] == [150, 150]
    assert len({text["sha256"] for text in details["texts"]}) == 2
    assert set(details["metrics"]["predictor_held_out"]["kept"]) == {"0.25", "0.1"}
    assert details["pass"]["chat_template"] == (family != "mistral")
    assert set(details["shares"]) == {"0.5", "0.25", "0.1", "0.05"}
    for ratio, share in details["shares"].items():
        heads = torch.tensor(share["heads"])
        assert heads.shape == (LAYERS, KV_HEADS)
        torch.testing.assert_close(heads.mean(-1), torch.tensor(share["layers"]), atol=2e-3, rtol=0)
        assert abs(heads.mean().item() - float(ratio)) < 0.01
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--force replaces it" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


def test_command_writes_where_it_is_told(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "made"
    done = CliRunner().invoke(app, ["calibrate", str(model), "--texts", "1", "--tokens", "64", "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    found = find(str(out), model)
    assert found is not None
    # Nothing is drawn at random.
    made = calibrate(str(model), tmp_path / "again", texts=1, tokens=64)
    assert torch.equal(made.rank_utility, found.rank_utility)
    assert made.predictor is not None and found.predictor is not None
    assert torch.equal(made.predictor, found.predictor)
    # With one text there is none to hold out.
    assert "predictor_held_out" not in made.card.details["metrics"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layers of type sliding_attention"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64"),
        ({"kv_lora_rank": 8}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"num_kv_shared_layers": 1}, "layers that share KV"),
        ({"alibi": True}, "ALiBi"),
    ],
)
def test_what_a_server_refuses_is_not_calibrated(llama: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(llama, **fields)
    with pytest.raises(CalibrationError, match=f"{message}.*full attention in every layer"):
        calibrate(str(llama), texts=1, tokens=64)


def test_sliding_window_is_not_calibrated(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("mistral"), tmp_path / "mistral"))
    edit_config(model, sliding_window=64)
    with pytest.raises(CalibrationError, match=r"sliding-window attention \(sliding_window=64\)"):
        calibrate(str(model), texts=1, tokens=64)


def test_command_says_what_is_missing(llama: Path, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["calibrate", *arguments])
        assert done.exit_code == 1
        return done.stderr

    assert "is no folder with a config.json" in error(str(tmp_path / "nowhere"))
    assert "cannot be downloaded" in error("org/deltamem-test-no-such-model")
    # 4096 positions: the text and a part of it again do not fit.
    assert "needs" in (text := error(str(llama), "--tokens", "4000")) and "the model has 4096" in text
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in error(str(llama))
    edit_config(llama, model_type="unheard-of")
    assert "transformers cannot read the configuration" in error(str(llama))
    with pytest.raises(CalibrationError, match="both must be at least 1"):
        calibrate(str(llama), texts=0)


# What is shipped.


def test_shipped_calibration_belongs_to_the_embedded_model(smollm2_path: str) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 200_000
    place = SHIPPED / "smollm2-135m-instruct"
    shipped = load(place)
    assert shipped.card.fingerprint == fingerprint(Path(smollm2_path))
    assert shipped.rank_utility.shape == (30, 3, 128)
    assert place in artifact.places(Path(smollm2_path), shipped.card.fingerprint)
    # Nothing in it is of the machine it was made on.
    assert "/" not in shipped.card.model
    assert shipped.card.details["metrics"]["repeat_accuracy"] > 0.8
    assert shipped.predictor is not None and shipped.predictor.shape == (30, 3, 165)
    held_out = shipped.card.details["metrics"]["predictor_held_out"]
    for kept in held_out["kept"].values():
        assert kept["predictor"] > 0.95 * kept["oracle"] > kept["random"]
    shares_of_quarter = torch.tensor(shipped.card.details["shares"]["0.25"]["heads"])
    torch.testing.assert_close(shares_of_quarter, shares(shipped.rank_utility, 0.25), atol=1e-3, rtol=0)
