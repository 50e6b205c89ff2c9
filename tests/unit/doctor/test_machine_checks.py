# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Ports, folders, memory, threads and compilers that are really in the way, and the findings about them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.compiler import check_compiler
from deltamem_vllm.doctor.checks.disk import check_disk
from deltamem_vllm.doctor.checks.gpu import check_gpu
from deltamem_vllm.doctor.checks.memory import check_memory, check_shared_memory
from deltamem_vllm.doctor.checks.ports import check_ports
from deltamem_vllm.doctor.checks.prometheus import VARIABLE, check_prometheus
from deltamem_vllm.doctor.checks.threads import check_huge_pages, check_preloads, check_threads
from deltamem_vllm.doctor.findings import Finding
from deltamem_vllm.ops.huge_pages import huge_pages_setting
from tests.support.doctor import found, only

# Nobody can write there, root included.
UNWRITABLE = "/proc/sys"


def asked(**environment: str) -> Asked:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return Asked(environment=kept | environment)


@pytest.fixture
def busy_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_busy_port(busy_port: int) -> None:
    finding = only(found(check_ports, Asked(port=busy_port, environment={})), "warning")
    assert f"port {busy_port} is in use" in finding.found and "--port" in finding.mend


def test_a_busy_port_is_right_if_it_is_the_servers(busy_port: int) -> None:
    url = f"http://127.0.0.1:{busy_port}"
    findings = found(check_ports, Asked(url=url, port=busy_port, environment={}))
    assert only(findings, "ok").found == f"port {busy_port} is that of the server which was asked about"


def test_a_free_port() -> None:
    (finding,) = found(check_ports, Asked(port=free_port(), environment={}))
    assert finding.level == "ok"


@pytest.mark.parametrize("given", ["tcp://10.0.0.7:8000", "0", "70000"])
def test_vllm_port_as_kubernetes_sets_it(given: str) -> None:
    findings = found(check_ports, Asked(port=free_port(), environment={"VLLM_PORT": given}))
    assert "is no port number" in only(findings, "error").found


def test_vllm_port_in_use(busy_port: int) -> None:
    findings = found(check_ports, Asked(port=free_port(), environment={"VLLM_PORT": str(busy_port)}))
    assert "VLLM_PORT" in only(findings, "warning").mend


def test_prometheus_folder_not_set() -> None:
    (finding,) = found(check_prometheus, asked())
    assert finding.level == "ok"


def test_prometheus_folder_that_is_not_there(tmp_path: Path) -> None:
    (finding,) = found(check_prometheus, asked(**{VARIABLE: str(tmp_path / "none")}))
    assert finding.level == "error" and "is no folder" in finding.found


def test_prometheus_folder_that_cannot_be_written() -> None:
    (finding,) = found(check_prometheus, asked(**{VARIABLE: UNWRITABLE}))
    assert finding.level == "error" and "cannot be written" in finding.found


def test_prometheus_folder_with_files_of_the_dead(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f"counter_{ended.pid}.db").touch()
    (tmp_path / f"gauge_all_{os.getpid()}.db").touch()
    (finding,) = found(check_prometheus, asked(**{VARIABLE: str(tmp_path)}))
    assert finding.level == "warning" and "1 files of processes that are gone" in finding.found


def test_prometheus_folder_in_use_and_empty(tmp_path: Path) -> None:
    (finding,) = found(check_prometheus, asked(**{VARIABLE: str(tmp_path)}))
    assert finding.level == "ok"
    (tmp_path / f"counter_{os.getpid()}.db").touch()
    (finding,) = found(check_prometheus, asked(**{VARIABLE: str(tmp_path)}))
    assert finding.level == "note"


@pytest.mark.parametrize(
    ("given", "level"), [("1", "ok"), ("1000000", "error"), ("4.5", "error"), ("many", "error"), (None, "note")]
)
def test_memory_for_the_cache(given: str | None, level: str) -> None:
    (finding,) = found(check_memory, asked(**({} if given is None else {"VLLM_CPU_KVCACHE_SPACE": given})))
    assert finding.level == level


def test_memory_that_others_hold() -> None:
    total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    (finding,) = found(check_memory, asked(VLLM_CPU_KVCACHE_SPACE=str(total_gib)))
    assert finding.level in ("warning", "error"), "a machine always has something in its memory"


def test_shared_memory(tmp_path: Path) -> None:
    (finding,) = check_shared_memory(asked(), tmp_path / "none")
    assert finding.level == "error"
    # A small one that every machine has: a file system that holds nothing.
    (finding,) = check_shared_memory(asked(), Path("/proc"))
    assert finding.level == "warning" and "--shm-size" in finding.mend


@pytest.mark.parametrize(
    ("variables", "level", "says"),
    [
        ({"OMP_NUM_THREADS": "100000"}, "warning", "wait for each other"),
        ({"OMP_NUM_THREADS": "two"}, "error", "no number of threads"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0-1|900-901"}, "error", "900, 901"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "all"}, "error", "names no cores"),
    ],
)
def test_threads_that_cannot_be(variables: dict[str, str], level, says: str) -> None:
    assert says in only(found(check_threads, asked(**variables)), level).found


def test_threads_that_can_be() -> None:
    core = min(os.sched_getaffinity(0))
    (finding,) = found(check_threads, asked(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND=str(core)))
    assert finding.level == "ok"


def test_a_preloaded_library_that_is_not_there(tmp_path: Path) -> None:
    findings = found(check_preloads, asked(LD_PRELOAD=f"{tmp_path}/libgone.so:libc.so.6"))
    assert "libgone.so" in only(findings, "warning").found


def test_tcmalloc_is_seen(tmp_path: Path) -> None:
    library = tmp_path / "libtcmalloc_minimal.so.4"
    library.touch()
    findings = found(check_preloads, asked(LD_PRELOAD=str(library)))
    assert [finding.level for finding in findings] == ["ok"]


@pytest.mark.parametrize(
    ("setting", "level", "says"),
    [
        ("always madvise [never]", "note", "attention over a pool of gigabytes is slower"),
        ("always [madvise] never", "ok", "transparent huge pages: madvise"),
    ],
)
def test_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, level, says: str) -> None:
    path = tmp_path / "enabled"
    path.write_text(setting)
    monkeypatch.setattr("deltamem_vllm.doctor.checks.threads.huge_pages_setting", lambda: huge_pages_setting(path))
    assert says in only(found(check_huge_pages, asked()), level).found


def test_a_cache_that_cannot_be_written() -> None:
    findings = found(check_disk, asked(DELTAMEM_CACHE=f"{UNWRITABLE}/deltamem"))
    finding = only(findings, "error")
    assert "deltamem's cache" in finding.found and "DELTAMEM_CACHE" in finding.mend


def test_a_cache_that_would_be_made(tmp_path: Path) -> None:
    place = tmp_path / "not" / "yet"
    findings = found(check_disk, asked(HF_HOME=str(place)))
    assert [one for one in findings if str(place) in one.found]
    assert not place.exists(), "looking must not make it"


def test_a_compiler_that_works() -> None:
    (finding,) = found(check_compiler, asked())
    assert finding.level == "ok"


def test_no_compiler(tmp_path: Path) -> None:
    (finding,) = found(check_compiler, asked(PATH=str(tmp_path)))
    assert (
        finding.level == "warning" and "is not on the PATH" in finding.found and "apt-get install g++" in finding.mend
    )


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    fake.chmod(0o755)
    (finding,) = found(check_compiler, asked(CXX=str(fake)))
    assert finding.level == "warning" and "Python.h: No such file" in finding.found


def gpu(tmp_path: Path, script: str) -> list[Finding]:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return found(check_gpu, asked(PATH=f"{tmp_path}:/bin:/usr/bin"))


def test_no_gpu_and_none_needed(tmp_path: Path) -> None:
    (finding,) = found(check_gpu, asked(PATH=str(tmp_path)))
    assert finding.level == "ok"


def test_gpus_are_described(tmp_path: Path) -> None:
    findings = gpu(tmp_path, "echo 'NVIDIA H100 80GB HBM3, 81559, 1, 9.0, 570.86.15'")
    assert only(findings, "ok").found == "NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0, driver 570.86.15"
    assert "runs on the CPU" in only(findings, "note").found, "the tests' vLLM is a CPU build"


def test_an_old_gpu_that_others_use(tmp_path: Path) -> None:
    warnings = [
        one.found for one in gpu(tmp_path, "echo 'Tesla T4, 15360, 9000, 7.5, 535.1'") if one.level == "warning"
    ]
    assert len(warnings) == 2 and "7.5" in warnings[0] and "9000 of 15360 MiB" in warnings[1]


def test_a_gpu_that_does_not_tell(tmp_path: Path) -> None:
    findings = gpu(tmp_path, "echo 'NVIDIA A100-SXM4-80GB MIG 1g.10gb, [N/A], [N/A], 8.0, 570.1'")
    assert {finding.level for finding in findings} == {"ok", "note"}


def test_a_driver_that_fails(tmp_path: Path) -> None:
    findings = gpu(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert "status 18" in only(findings, "note").found and "version mismatch" in only(findings, "note").found
