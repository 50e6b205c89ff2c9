# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The outcome of a check as JSON and as a page of documentation."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltamem_vllm.evaluation.gpu_check.exact import Agreement
from deltamem_vllm.evaluation.gpu_check.speed import Timed

_TIMES = (
    "A plain copy reads and writes {:.0f} GB/s. Medians of rounds in which the alternatives take turns, from cold "
    "caches. The baselines of attention read all tokens in the model's dtype, side by side. GB/s: bytes that have to "
    "be read and written at least once."
)


@dataclass(frozen=True)
class Report:
    """Everything that one check found.

    Attributes
    ----------
    device: the GPU's name. machine: versions and the like.
    copy_gb_per_s: 10^9 bytes a second, read and written, of a plain copy.
    agreements, timed: what was compared and measured; the latter is empty if something was wrong.
    """

    device: str
    machine: dict[str, Any]
    copy_gb_per_s: float
    agreements: list[Agreement]
    timed: list[Timed]

    @property
    def wrong(self) -> list[Agreement]:
        """What differs from its definition by more than is allowed; NaN does."""
        return [agreement for agreement in self.agreements if not agreement.deviation <= 1.0]

    def write(self, folder: Path) -> Path:
        """Write both files, named after the device; returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        page = folder / f"{name}.md"
        page.write_text(self.as_markdown())
        return page

    def as_markdown(self) -> str:
        """The page: what was checked, then what was timed."""
        lines = [
            f"# GPU kernels on {self.device}",
            "",
            "Written by `make gpu-check`; the JSON file beside this page has every figure and the versions.",
            "",
            "## Against the definitions in float64",
            "",
            "| operation | calls | largest deviation, in units of what is allowed | verdict |",
            "| --- | --- | --- | --- |",
        ]
        for operation in dict.fromkeys(agreement.operation for agreement in self.agreements):
            own = [agreement for agreement in self.agreements if agreement.operation == operation]
            wrong = sum(not agreement.deviation <= 1.0 for agreement in own)
            worst = max(agreement.deviation for agreement in own)
            verdict = "right" if not wrong else f"**{wrong} wrong**"
            lines.append(f"| {operation} | {len(own)} | {worst:.3g} | {verdict} |")
        lines += [f"\nWrong: {agreement.operation}, {agreement.case}" for agreement in self.wrong]
        if self.timed:
            lines += [
                "",
                "## Times",
                "",
                _TIMES.format(self.copy_gb_per_s),
                "",
                "| operation | case | ours, ms | others, ms | GB/s | of the copy |",
                "| --- | --- | --- | --- | --- | --- |",
                *(self._line(timed) for timed in self.timed),
            ]
        return "\n".join(lines) + "\n"

    def _line(self, timed: Timed) -> str:
        others = [f"{name} {took * 1e3:.3f}" for name, took in timed.seconds.items() if name != "deltamem"]
        speed = share = "-"
        if timed.useful_bytes:
            speed, share = f"{timed.gb_per_s:.0f}", f"{timed.gb_per_s / self.copy_gb_per_s:.0%}"
        ours = f"{timed.seconds['deltamem'] * 1e3:.3f}"
        return f"| {timed.operation} | {timed.case} | {ours} | {', '.join(others) or '-'} | {speed} | {share} |"
