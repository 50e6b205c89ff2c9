# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A cache of prepared models on disk: either whole and verified, or not there at all.

An entry is one folder with a manifest of every file's size and SHA-256. It is written under another
name and renamed when it is complete, so a reader never sees half a model and a killed process leaves
nothing but a scratch folder, which the next one removes. A file lock keeps two processes from doing the
same work. This module knows nothing of models or tensors; `catalog` says what to put in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltamem_vllm.models.errors import CacheBusy, CacheDamaged, NoSpace

logger = logging.getLogger(__name__)

MANIFEST = "deltamem-model.json"
_CHUNK = 1 << 22

Report = Callable[[str], None]
"""Receives one line per stage, for a progress display."""


def cache_root() -> Path:
    """Folder of all that deltamem caches: `$DELTAMEM_CACHE`, else `~/.cache/deltamem`."""
    chosen = os.environ.get("DELTAMEM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "deltamem"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """One model's place in the cache.

    Parameters
    ----------
    path
        The folder of the finished model.
    identity
        What the content was made from. An entry whose manifest says otherwise is stale.
    """

    path: Path
    identity: dict[str, str | int]

    def exists(self) -> bool:
        """Whether a finished entry is there; says nothing about whether it is intact."""
        return (self.path / MANIFEST).is_file()

    def verify(self) -> None:
        """Compare every file with the manifest; raise `CacheDamaged` at the first difference."""
        manifest_path = self.path / MANIFEST
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            identity, files = dict(manifest["identity"]), dict(manifest["files"])
            expected = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheDamaged(f"{manifest_path} cannot be read: {error}") from error
        if identity != self.identity:
            raise CacheDamaged(f"{self.path} was made from {identity}, now wanted: {self.identity}")
        for name, (size, digest) in expected.items():
            file = self.path / name
            if not file.is_file():
                raise CacheDamaged(f"{file} is missing")
            if file.stat().st_size != size:
                raise CacheDamaged(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
            if (found := sha256_of(file)) != digest:
                raise CacheDamaged(f"{file} has sha256 {found}, the manifest says {digest}")

    def build(self, make: Callable[[Path], None], *, needs_bytes: int) -> None:
        """Replace the entry by what `make(folder)` writes. Hold `lock()` while calling this."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_scratch()
        free = shutil.disk_usage(self.path.parent).free
        if free < needs_bytes:
            raise NoSpace(self._no_space(f"{free / 1e6:.0f} MB are free, {needs_bytes / 1e6:.0f} MB are needed"))
        scratch = self._scratch("partial")
        scratch.mkdir()
        try:
            make(scratch)
            _write_manifest(scratch, self.identity)
            if self.path.exists():
                # A folder cannot be renamed over a non-empty one: move the damaged entry aside first.
                self.path.rename(self._scratch("replaced"))
            scratch.rename(self.path)
        except Exception as error:
            if _means_disk_full(error):
                raise NoSpace(self._no_space(str(error))) from error
            raise
        finally:
            self._remove_scratch()

    @contextmanager
    def lock(self, report: Report, timeout_s: float = 900.0) -> Iterator[None]:
        """Let one process at a time prepare this entry; others wait, and say so."""
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock_path = self.path.parent / f".{self.path.name}.lock"
        lock = FileLock(str(lock_path))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting for another process that prepares {self.path.name}")
            try:
                lock.acquire(timeout=timeout_s)
            except Timeout as error:
                raise CacheBusy(
                    f"another process has held {lock_path} for {timeout_s:.0f} s; wait for it or end it, "
                    "then try again (the lock is released when its process ends)"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def _scratch(self, kind: str) -> Path:
        return self.path.parent / f".{self.path.name}.{kind}"

    def _remove_scratch(self) -> None:
        for kind in ("partial", "replaced"):
            if (folder := self._scratch(kind)).exists():
                logger.debug("removing %s", folder)
                shutil.rmtree(folder)

    def _no_space(self, detail: str) -> str:
        return (
            f"not enough disk space for the model under {self.path.parent}: {detail}. "
            "Free some, or set DELTAMEM_CACHE to a folder on a larger disk"
        )


def _write_manifest(folder: Path, identity: dict[str, str | int]) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ValueError(f"nothing was written to {folder}")
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    }
    text = json.dumps({"identity": identity, "files": entries}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _means_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors writes from Rust and hands over the system's words only.
    return "No space left on device" in str(error)
