# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Writes the PNG files: each picture alone, and all of them on one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from deltamem_vllm.evaluation.profile.comparison import budget_words
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.pictures.kept import draw_kept
from deltamem_vllm.evaluation.profile.pictures.pages import draw_pages
from deltamem_vllm.evaluation.profile.pictures.shares import draw_shares
from deltamem_vllm.evaluation.profile.pictures.style import DPI, WIDTH, Canvas
from deltamem_vllm.evaluation.profile.pictures.timeline import draw_bytes
from deltamem_vllm.evaluation.profile.pictures.utility import draw_utility


def write_pictures(profile: Profile, folder: Path) -> list[Path]:
    """Draw everything; returns the files, the overview first."""
    folder.mkdir(parents=True, exist_ok=True)
    layers, heads = profile.codes.shape[:2]
    tall = min(max(3.5, 1.5 + 0.17 * layers), 18.0)
    drawings: dict[str, tuple[Callable[[Canvas, Profile], None], float]] = {
        "utility": (draw_utility, min(max(5.0, 2.0 + 0.22 * layers), 20.0)),
        "kept": (draw_kept, min(max(4.0, 1.5 + 0.07 * layers * heads), 24.0)),
        "pages": (draw_pages, _pages_height(profile)),
        "bytes": (draw_bytes, 4.5),
        "shares": (draw_shares, tall),
    }
    files = [_write_overview(profile, folder / "overview.png", tall)]
    for name, (draw, height) in drawings.items():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure, profile)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=DPI)
    return files


def _pages_height(profile: Profile) -> float:
    """Inches: a row of numbers needs a quarter."""
    maps, heads = min(len(profile.compactions), 2), int(profile.codes.shape[1])
    return float(min(2.6 + maps * (0.5 + 0.25 * heads), 20.0))


def _write_overview(profile: Profile, path: Path, tall: float) -> Path:
    low = _pages_height(profile)
    figure = Figure(figsize=(1.5 * WIDTH, 2 * tall + low + 0.4), layout="constrained")
    engine = profile.engine
    cold = f"cold_bits {engine['cold']['bits']}, " if profile.tiered else ""
    figure.suptitle(
        f"{profile.conditions['model']}: {profile.prompt['tokens']:,} tokens of {profile.prompt['source']}, "
        f"scorer {profile.scorer}, {budget_words(profile)}, dealing {profile.dealing}, "
        f"{cold}blocks of {engine['block_tokens']}, vLLM {engine['vllm']} on {engine['device']}",
        fontsize=11,
    )
    rows = figure.subfigures(3, 1, squeeze=False, hspace=0.04, height_ratios=[tall, low, tall])[:, 0]
    upper = rows[0].subfigures(1, 2, wspace=0.02)
    lower = rows[2].subfigures(1, 2, wspace=0.02)
    draw_utility(upper[0], profile, ranks=False)
    draw_kept(upper[1], profile)
    draw_pages(rows[1], profile)
    draw_bytes(lower[0], profile)
    draw_shares(lower[1], profile)
    figure.savefig(path, dpi=DPI * 0.8)
    return path
