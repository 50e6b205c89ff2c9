# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the kernels' benchmarks print, on the screen and as a part of a markdown file."""

from __future__ import annotations

from pathlib import Path

from deltamem_vllm.evaluation.machine import Moment, command_line, describe_code, describe_machine


class Report:
    """Lines of markdown, shown as they come and written to a file at the end.

    Parameters
    ----------
    title: of the report.
    about: what its figures are.
    file: to write it to; None: only shown.
    """

    def __init__(self, title: str, about: str, file: Path | None) -> None:
        self._file = file
        self._lines: list[str] = []
        self._began = Moment.now()
        machine, code = describe_machine(), describe_code(())
        versions = ", ".join(f"{name} {number}" for name, number in code["versions"].items())
        settings = ", ".join(f"{name}={value}" for name, value in machine["environment"].items())
        self.add(
            f"# {title}\n\n{about}\n\n"
            f"- Command: `{command_line()}`{f' ({settings})' if settings else ''}\n"
            f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}\n"
            f"- Versions: {versions}; commit {code['commit']}\n"
            f"- Load of the machine at the start: {self._began.load:.1f}\n"
        )

    def add(self, text: str) -> None:
        """Show a line, or several, and keep it."""
        print(text, flush=True)
        self._lines.append(text)

    def close(self) -> None:
        """Say how busy the machine was and write the file."""
        now = Moment.now()
        self.add(f"\nTook {now.at - self._began.at:.0f} s; load of the machine at the end: {now.load:.1f}.")
        if self._file is not None:
            self._file.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
