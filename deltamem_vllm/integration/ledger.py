# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The patch ledger: every name of vLLM that deltamem replaces, overrides or relies on, and why.

vLLM promises none of these names. `verify_ledger` compares each one with what was read in the supported
release before anything is applied, so that another vLLM stops with a list instead of evicting wrongly.
Nothing of vLLM may be replaced except through `apply`, which refuses names that are not in the ledger.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from deltamem_vllm.versions import SUPPORTED_VLLM

How = Literal["patched", "subclassed", "wrapped", "used"]

_APPLIED = "__deltamem_applied__"


@dataclass(frozen=True)
class Patch:
    """One name of vLLM and what we do with it.

    Parameters
    ----------
    target
        ``module:Qualname.attr``.
    how
        ``patched``: replaced on the class in this process, by `apply`. ``subclassed``: overridden by a class
        that vLLM is told to use. ``wrapped``: replaced on one instance. ``used``: called or read, though not
        public.
    why
        What it is needed for.
    replaced_by
        What would make this entry unnecessary.
    expected_signature
        Parameter names in order, as read in the supported vLLM; None for something that is not callable.
    requires
        Platform without which the module cannot be imported (``cuda``); the entry is only checked there.
    """

    target: str
    how: How
    why: str
    replaced_by: str
    expected_signature: str | None
    requires: Literal["", "cuda"] = ""


class LedgerMismatch(RuntimeError):
    """vLLM differs from the ledger; the policy cannot be turned on."""


def verify_ledger(entries: Sequence[Patch] | None = None) -> None:
    """Check every entry against the imported vLLM.

    Raises
    ------
    LedgerMismatch
        One error that lists each target with what was expected, what was found and what to do.
    """
    problems = []
    for entry in _ledger() if entries is None else entries:
        if entry.requires and not _platform_is(entry.requires):
            continue
        found = _found(entry)
        if found != entry.expected_signature:
            problems.append(
                f"  {entry.target} ({entry.how}): expected {_shown(entry.expected_signature)}, found {_shown(found)}"
            )
    if problems:
        from vllm import __version__

        raise LedgerMismatch(
            f"deltamem does not fit this vLLM ({__version__}); it supports {SUPPORTED_VLLM}. "
            "These names differ from what it was written for:\n" + "\n".join(problems) + "\n"
            f"Install vLLM {SUPPORTED_VLLM} unmodified, or a deltamem made for this version; another plugin "
            "that replaces these names must be removed. Without --kv-cache-policy deltamem the server starts "
            "as usual."
        )


def apply(target: str, make: Callable[[Any], Any]) -> None:
    """Replace ``target`` by ``make(original)``, once per process; static and class methods stay such.

    Parameters
    ----------
    target
        A ``patched`` entry of the ledger.
    make
        Gets the plain function and returns its replacement, which must carry ``functools.wraps`` so that a
        second look at the signature sees vLLM's.
    """
    if not any(entry.target == target and entry.how == "patched" for entry in _ledger()):
        raise LookupError(f"{target} is not a 'patched' entry of the ledger: add it there, with the reason")
    owner, name = _owner(target)
    # Not getattr: a class method must be replaced as a descriptor, and only where it is defined.
    descriptor = vars(owner)[name]
    wrapper = type(descriptor) if isinstance(descriptor, staticmethod | classmethod) else None
    original = descriptor.__func__ if wrapper else descriptor
    if getattr(original, _APPLIED, False):
        return
    replacement = make(original)
    setattr(replacement, _APPLIED, True)
    setattr(owner, name, wrapper(replacement) if wrapper else replacement)


def render_ledger() -> str:
    """The ledger as the Markdown document ``docs/design/ledger.md``."""
    from deltamem_vllm.integration.ledger_instruments import INSTRUMENTS

    lines = [
        "# Patch ledger",
        "",
        f"Every name of vLLM ({SUPPORTED_VLLM}) that deltamem replaces, overrides or relies on although",
        "it is not public. Checked at start, before the policy is turned on: one mismatch and the server",
        "does not start.",
        "",
        "This file is written by `python -m deltamem_vllm.integration.ledger docs/design/ledger.md`; edit",
        "`deltamem_vllm/integration/ledger_{frontend,engine_core,worker}.py` instead.",
    ]
    lines += _tables(_ledger())
    lines += [
        "",
        "# Instruments",
        "",
        "`deltamem eval`, `profile` and `bench` watch an engine in a process of their own. What they rely on beside",
        "the above is checked when they start one, and is no part of a server",
        "(`deltamem_vllm/integration/ledger_instruments.py`).",
    ]
    lines += _tables(INSTRUMENTS)
    return "\n".join(lines) + "\n"


def _tables(entries: Sequence[Patch]) -> list[str]:
    lines: list[str] = []
    titles: dict[How, str] = {
        "patched": "Patched: replaced on the class",
        "subclassed": "Subclassed: overridden in a class that vLLM is told to use",
        "wrapped": "Wrapped: replaced on one instance",
        "used": "Used: called or read as it is",
    }
    for how, title in titles.items():
        chosen = [entry for entry in entries if entry.how == how]
        if not chosen:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| name | parameters | why | what would replace it |",
            "|---|---|---|---|",
        ]
        for entry in chosen:
            signature = "not callable" if entry.expected_signature is None else entry.expected_signature
            lines.append(f"| `{entry.target}` | {signature} | {entry.why} | {entry.replaced_by} |")
    return lines


def _ledger() -> tuple[Patch, ...]:
    from deltamem_vllm.integration.ledger_entries import LEDGER

    return LEDGER


def _owner(target: str) -> tuple[Any, str]:
    module, _, qualname = target.partition(":")
    *path, name = qualname.split(".")
    owner: Any = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def _found(entry: Patch) -> str | None:
    """Parameter names of the target; None if it exists and is not callable; else a word on what is wrong."""
    try:
        owner, name = _owner(entry.target)
    except (ImportError, AttributeError) as error:
        return f"<missing: {error}>"
    # A dataclass field without a class-level default is no attribute of the class, but it is there.
    is_field = dataclasses.is_dataclass(owner) and name in {field.name for field in dataclasses.fields(owner)}
    if not is_field and not hasattr(owner, name):
        return f"<missing: {owner.__name__} has no {name!r}>"
    value = getattr(owner, name, None)
    if is_field or not callable(value):
        return None
    return ", ".join(inspect.signature(value).parameters)


def _shown(signature: str | None) -> str:
    if signature is None:
        return "an attribute"
    return signature if signature.startswith("<") else f"({signature})"


def _platform_is(requirement: str) -> bool:
    from vllm.platforms import current_platform

    assert requirement == "cuda", f"unknown platform requirement {requirement!r}"
    return bool(current_platform.is_cuda_alike())


def main(path: str) -> None:
    """Write the rendered ledger to ``path``."""
    from pathlib import Path

    from deltamem_vllm.integration import ledger

    Path(path).write_text(ledger.render_ledger())


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
