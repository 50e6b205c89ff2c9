# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What every kernel takes of a GPU, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deltamem_vllm.evaluation.gpu_check.compiled import Resources, compile_launch
from deltamem_vllm.evaluation.gpu_check.settings_to_compile import Setting

ARCHES = (89, 90)


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    setting: Setting
    kernel: str
    resources: Resources


def compile_all(settings: Sequence[Setting], arches: Sequence[int] = ARCHES) -> Iterator[Row]:
    """Compile every kernel of these settings for every architecture, one after the other.

    Raises
    ------
    triton.CompilationError: a kernel does not compile.
    """
    for setting in settings:
        for launch in setting.launches():
            for arch in arches:
                yield Row(setting, launch.kernel.__name__, compile_launch(launch, arch))


HEADER = """| call | kernel | GPU | registers | spilled bytes | shared KiB | threads | tensor cores |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def as_markdown(row: Row) -> str:
    """One line of the table; spills are stores plus loads of a thread."""
    has = row.resources
    cells = (
        row.setting,
        f"`{row.kernel}`",
        f"sm_{has.arch}",
        has.registers,
        has.spill_stores + has.spill_loads,
        f"{has.shared / 1024:.1f}",
        has.threads,
        "yes" if has.tensor_cores else "no",
    )
    return f"| {' | '.join(map(str, cells))} |"
