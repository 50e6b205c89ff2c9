# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Find scorers by name: the built-in ones and those of other packages.

Another package adds a scorer with an entry point in the group ``deltamem.scorers``::

    [project.entry-points."deltamem.scorers"]
    mine = "my_package.scoring:MyScorer"

Nothing here imports torch until a scorer class is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltamem_vllm.scoring.base import Scorer

GROUP = "deltamem.scorers"

# Kept in code as well as in the package metadata, so that a stale installation still finds them.
BUILTIN = {
    "delta": "deltamem_vllm.scoring.delta:DeltaScorer",
    "snapkv": "deltamem_vllm.scoring.snapkv:SnapKVScorer",
    "tova": "deltamem_vllm.scoring.tova:TOVAScorer",
    "predictor": "deltamem_vllm.scoring.predictor:PredictorScorer",
    "predictor-tova": "deltamem_vllm.scoring.predictor_tova:PredictorTOVAScorer",
    "distinct": "deltamem_vllm.scoring.distinct:DistinctScorer",
    "keydiff": "deltamem_vllm.scoring.keydiff:KeyDiffScorer",
    "streaming": "deltamem_vllm.scoring.streaming:StreamingScorer",
    "random": "deltamem_vllm.scoring.random:RandomScorer",
}


@dataclass(frozen=True)
class ScorerInfo:
    """One line of the list of scorers. ``error`` says why a broken one cannot be used, else it is None."""

    name: str
    path: str
    summary: str
    source: str
    needs_queries: bool
    error: str | None = None


def scorer_names() -> tuple[str, ...]:
    """Every known name, built-in ones first, without importing a scorer (or torch)."""
    others = sorted({point.name for point in _entry_points()} - BUILTIN.keys())
    return (*BUILTIN, *others)


def available_scorers() -> dict[str, type[Scorer]]:
    """Every scorer that can be imported, by name.

    Raises
    ------
    ValueError
        If two packages give one name to different classes.
    """
    found = {}
    for name in scorer_names():
        cls = _resolve(name)
        if not isinstance(cls, str):
            found[name] = cls
    return found


def describe_scorers() -> tuple[ScorerInfo, ...]:
    """Every known scorer with its description; broken third-party ones carry their error."""
    infos = []
    for name in scorer_names():
        path, cls = _paths(name)[0], _resolve(name)
        if isinstance(cls, str):
            infos.append(ScorerInfo(name, path, "", "", False, error=cls))
        else:
            infos.append(ScorerInfo(name, path, cls.summary, cls.source, cls.needs_queries))
    return tuple(infos)


def load_scorer(name: str) -> Scorer:
    """An instance of the scorer called ``name``.

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones), taken twice, or its entry point is broken.
    """
    if name not in scorer_names():
        raise ValueError(f"unknown scorer {name!r}; available: {', '.join(scorer_names())}")
    cls = _resolve(name)
    if isinstance(cls, str):
        raise ValueError(f"scorer {name!r} cannot be used: {cls}; fix or remove the package that provides it")
    return cls()


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _paths(name: str) -> list[str]:
    """Distinct ``module:attribute`` paths that claim ``name``, the built-in one first."""
    builtin = [BUILTIN[name]] if name in BUILTIN else []
    claimed = [point.value.replace(" ", "") for point in _entry_points() if point.name == name]
    return list(dict.fromkeys(builtin + claimed))


def _resolve(name: str) -> type[Scorer] | str:
    """The class behind ``name``, or why it cannot be loaded."""
    paths = _paths(name)
    loaded = [_load(name, path) for path in paths]
    if any(other is not loaded[0] for other in loaded[1:]):
        raise ValueError(
            f"scorer name {name!r} is claimed by different entry points of group {GROUP!r}: "
            f"{', '.join(paths)}; uninstall one of the packages or rename its entry point"
        )
    return loaded[0]


def _load(name: str, path: str) -> type[Scorer] | str:
    from deltamem_vllm.scoring.base import Scorer

    module, _, attribute = path.partition(":")
    try:
        target: Any = import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception as error:  # Foreign code: importing it may raise anything, and only its user should suffer.
        if name in BUILTIN and path == BUILTIN[name]:
            raise
        return f"{path} cannot be imported ({type(error).__name__}: {error})"
    if not (isinstance(target, type) and issubclass(target, Scorer)):
        return f"{path} is not a subclass of deltamem_vllm.scoring.base.Scorer"
    missing = [field for field in ("name", "summary", "source") if not isinstance(getattr(target, field, None), str)]
    if missing:
        return f"{path} does not set {', '.join(missing)}"
    if target.name != name:
        return f"{path} calls itself {target.name!r} but is registered as {name!r}"
    if getattr(target, "__abstractmethods__", None):
        return f"{path} does not implement {', '.join(sorted(target.__abstractmethods__))}"
    return target
