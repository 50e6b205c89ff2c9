# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Hold every Markdown file of the repository to what is really there.

python scripts/check_links.py [FOLDER]

Checked are relative links with their anchors, pictures, files named in backticks, every `deltamem` command with its
options (against the real command line), every configuration field where one is written (`--deltamem-config.FIELD`,
JSON and YAML of the policy, a table headed "field | default"), and every metric and request key that starts with
`deltamem_`. Links to other sites are checked for their form only: nothing is fetched. Status 1 if anything is wrong.

Commands are read from inline code and code blocks; in a block marked `console` only after a `$`, in one marked `text`
never, for both may hold output.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SKIPPED = {"build", "dist", "node_modules", "__pycache__"}
"""Folders that hold what was built; so do those whose names start with a dot."""

CODE_ENDINGS = (".py", ".sh", ".cpp", ".h")
"""Bare names in backticks that end so must exist somewhere; others, such as bench.md, may be output."""

ELSEWHERE = {
    ("docs/guides/gpu-check.md", "docs/results/gpu"): "a run on a GPU writes it",
    ("docs/results/needle.md", "benchmarks/needle.py"): "of the commit that is named there",
}
"""Paths in backticks, by page, that are right although they are not there, and why."""

_LINK = re.compile(
    r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+\"[^\"]*\")?\s*\)"
)
_BARE = re.compile(r"(?<![(\w\"'`=])https?://[^\s<>)\]\"'`|]+")
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*(\S*)")
_INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_PATH = re.compile(r"[\w.\-*]+(?:/[\w.\-*]+)*/?")
_COMMAND = re.compile(r"^(?:[A-Z_]+=\S+\s+)*(?:\w+=)?(?:[\"']?\$\()?(?:time\s+)?(?:\S*\.venv/bin/)?deltamem\s+([^)]*)")
_FIELD_FLAG = re.compile(r"--deltamem-config\.([A-Za-z_]+)")
_JSON_CONFIG = re.compile(r"(?:--deltamem-config[ =]|\"deltamem\":\s*|deltamem-config:\s*)['\"]?\{([^{}]*)\}")
_JSON_KEY = re.compile(r"[\"']?([A-Za-z_]+)[\"']?\s*:")
_OUR_NAME = re.compile(r"(?<![\w.\-/])deltamem_[a-z][a-z_]*\b(?![./:(])")


@dataclass(frozen=True)
class Line:
    """A line of a page: its number, its text, and whether it is prose or of a code block (with the block's mark)."""

    number: int
    text: str
    block: str | None


class Page:
    """One Markdown file, split into prose and code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = list(_split(path.read_text(encoding="utf-8").splitlines()))

    @property
    def prose(self) -> Iterator[Line]:
        """Lines outside of code blocks."""
        return (line for line in self.lines if line.block is None)

    @cached_property
    def anchors(self) -> set[str]:
        """What a link to this page may name after `#`: slugs of the headings as GitHub makes them, and explicit ids."""
        found: set[str] = set()
        for line in self.prose:
            found.update(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", line.text))
            heading = _HEADING.match(line.text)
            if heading:
                base = slug = _slug(heading[1])
                again = 0
                while slug in found:
                    again += 1
                    slug = f"{base}-{again}"
                found.add(slug)
        return found


@dataclass(frozen=True)
class Names:
    """What exists: the command line, names of fields, metrics and request keys, and the text of the sources."""

    command: Any
    fields: frozenset[str]
    ours: frozenset[str]
    source: str

    @classmethod
    def real(cls) -> Names:
        """Those of the installed deltamem."""
        import typer

        import deltamem_vllm
        from deltamem_vllm.cli.main import app
        from deltamem_vllm.config import DeltaMemConfig
        from deltamem_vllm.request_options import KEYS
        from deltamem_vllm.telemetry import METRICS

        metrics = {f"{row.public_name}{end}" for row in METRICS for end in ("", "_bucket", "_sum", "_count")}
        # Not in the metrics' table, the package, and a method of the engine.
        others = {"deltamem_policy_info", "deltamem_vllm", "deltamem_stats"}
        ours = frozenset({*metrics, *KEYS, *others})
        sources = Path(deltamem_vllm.__file__).parent.rglob("*.py")
        text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
        return cls(typer.main.get_command(app), frozenset(DeltaMemConfig.model_fields), ours, text)


def check(root: Path, names: Names) -> list[str]:
    """Everything that is wrong in the Markdown files under `root`, each as `file:line: what`."""
    pages = {path: Page(path) for path in markdown_files(root)}
    problems = []
    for path, page in pages.items():
        found = [*_links(page, pages, root), *_paths(page, root), *_commands(page, names), *_names(page, names)]
        problems += [f"{path.relative_to(root).as_posix()}:{line}: {what}" for line, what in sorted(found)]
    return problems


def markdown_files(root: Path) -> list[Path]:
    """All `*.md` under `root` but those in folders that were built or are hidden."""
    return sorted(path for path in root.rglob("*.md") if not _built(path.relative_to(root)))


def _built(path: Path) -> bool:
    return any(part in SKIPPED or part.startswith(".") for part in path.parts[:-1])


def _split(lines: list[str]) -> Iterator[Line]:
    fence = mark = None
    indented = False
    for number, text in enumerate(lines, 1):
        opening = _FENCE.match(text)
        if fence is not None:
            if opening and opening[1].startswith(fence) and not opening[2]:
                fence = None
            else:
                yield Line(number, text, mark)
            continue
        if opening:
            fence, mark = opening[1], opening[2]
            continue
        # Four spaces after an empty line; what goes on a list item is indented, too, but no deeper than three here.
        blank = number == 1 or not lines[number - 2].strip()
        indented = text.startswith("    ") and (indented or blank) if text.strip() else indented
        yield Line(number, text, "" if indented and text.strip() else None)


def _slug(heading: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def _links(page: Page, pages: Mapping[Path, Page], root: Path) -> Iterator[tuple[int, str]]:
    for line in page.prose:
        text = _INLINE.sub(lambda code: " " * len(code[0]), line.text)
        for target in dict.fromkeys([*_LINK.findall(text), *_BARE.findall(text)]):
            wrong = _wrong_target(target, page, pages, root)
            if wrong:
                yield line.number, wrong


def _wrong_target(target: str, page: Page, pages: Mapping[Path, Page], root: Path) -> str | None:
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        fine = parts.hostname and ("." in parts.hostname or parts.hostname == "localhost") and " " not in target
        return None if fine else f"link {target!r} is no usable address; write https://host/path"
    if parts.scheme or target.startswith("/"):
        return f"link {target!r} is neither relative nor http; name the file relative to this page"
    file = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    if not file.is_relative_to(root):
        return f"link {target!r} leaves the repository"
    if not file.exists():
        return f"link {target!r}: there is no {file.relative_to(root)}"
    if parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
        near = ", ".join(sorted(pages[file].anchors))
        return f"link {target!r}: {file.relative_to(root)} has no heading for it; it has: {near}"
    return None


def _paths(page: Page, root: Path) -> Iterator[tuple[int, str]]:
    """Files named in backticks: relative to the repository, to the package, or to the page."""
    bases = (root, root / "deltamem_vllm", page.path.parent)
    for line in page.prose:
        for _, code in _INLINE.findall(line.text):
            name = code.strip()
            known = (page.path.relative_to(root).as_posix(), name) in ELSEWHERE
            if known or not _PATH.fullmatch(name) or name.startswith(("build/", ".venv/", "*")):
                continue
            first = name.split("/")[0]
            if "/" not in name:
                if name.endswith(CODE_ENDINGS) and not any(not _built(p.relative_to(root)) for p in root.rglob(name)):
                    yield line.number, f"`{name}`: no file of the repository is called so"
            elif any((base / first).exists() for base in bases[:2]) and not any(_there(base, name) for base in bases):
                yield line.number, f"`{name}` is not there, neither in the repository nor in deltamem_vllm"


def _there(base: Path, name: str) -> bool:
    return any(base.glob(name)) if "*" in name else (base / name).exists()


def _commands(page: Page, names: Names) -> Iterator[tuple[int, str]]:
    for number, text in _command_texts(page):
        match = _COMMAND.match(text)
        wrong = match and _wrong_command(match[1], names)
        # Messages begin with the same word: what stands so in a source is one.
        if wrong and " ".join(text.split()[:3]) not in names.source:
            yield number, f"`{text[:60]}`: {wrong}"


def _command_texts(page: Page) -> Iterator[tuple[int, str]]:
    joined, first = "", 0
    for line in page.lines:
        if line.block is None:
            for _, code in _INLINE.findall(line.text):
                yield line.number, code.strip()
            continue
        text = line.text.strip()
        if joined:
            text = f"{joined} {text}"
        elif line.block == "text" or (line.block == "console" and not text.startswith("$ ")):
            continue
        else:
            first, text = line.number, text.removeprefix("$ ")
        joined = text.removesuffix("\\").strip() if text.endswith("\\") else ""
        if not joined:
            yield first, text


def _wrong_command(arguments: str, names: Names) -> str | None:
    # Usage lines put what may be left out in brackets.
    plain = arguments.replace("[", " ").replace("]", " ")
    words = shlex.split(plain, comments=True) if plain.count("'") % 2 == plain.count('"') % 2 == 0 else plain.split()
    command, path = names.command, "deltamem"
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0].isupper() or words[0] == "...":
            return None
        if words[0] not in command.commands:
            return f"{path} has no command {words[0]!r}; it has: {', '.join(sorted(command.commands))}"
        path = f"{path} {words[0]}"
        command = command.commands[words.pop(0)]
    known = {"--help", "-h"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word in ("|", "||", "&&", ";", ">", "<", "&"):
            return None
        name = word.split("=")[0].rstrip(",;.")
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", name) and name not in known:
            return f"{path} has no option {name}; it has: {', '.join(sorted(known))}"
    return None


def _names(page: Page, names: Names) -> Iterator[tuple[int, str]]:
    """Fields of the configuration, metrics and request keys, in prose and code alike."""
    in_yaml = in_table = False
    for line in page.lines:
        text = line.text
        fields = _FIELD_FLAG.findall(text)
        for inner in _JSON_CONFIG.findall(text):
            fields += _JSON_KEY.findall(re.sub(r":\s*\"[^\"]*\"", ":", inner))
        in_yaml = in_yaml and line.block is not None and (not text.strip() or text.startswith((" ", "#")))
        if in_yaml and (key := re.match(r"\s+([A-Za-z_]+):", text)):
            fields.append(key[1])
        in_yaml = in_yaml or (line.block is not None and text.strip() == "deltamem-config:")
        cells = [cell.strip() for cell in text.strip().strip("|").split("|")]
        in_table = text.startswith("|") and (in_table or cells[:2] == ["field", "default"])
        if in_table:
            fields += re.findall(r"`([A-Za-z_]+)`", cells[0])
        for field in fields:
            if field.replace("_", "").islower() and field not in names.fields:
                known = ", ".join(sorted(names.fields))
                yield line.number, f"{field!r} is no field of the configuration; there are: {known}"
        for name in _OUR_NAME.findall(text):
            if name not in names.ours and not name.endswith("_"):
                yield line.number, f"`{name}` is neither a metric nor a key of a request"


def main(arguments: list[str]) -> int:
    """Print what is wrong; the exit status."""
    root = Path(arguments[0]).resolve() if arguments else Path(__file__).resolve().parents[1]
    problems = check(root, Names.real())
    print(*problems, f"{len(markdown_files(root))} pages, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
