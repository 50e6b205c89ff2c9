# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The native library: built, found, refused when stale, one OpenMP runtime, instructions chosen at run time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deltamem_vllm.ops import native

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cpu"


def builder():
    spec = importlib.util.spec_from_file_location("deltamem_csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DELTAMEM_")}
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )


def library(folder: Path, source: str) -> str:
    """A library of our own making, for what native.py does with it."""
    (folder / "own.cpp").write_text(source)
    path = folder / "_native.so"
    subprocess.run([*builder().compiler(), "-shared", "-fPIC", "-o", path, folder / "own.cpp"], check=True)
    return str(path)


def test_the_library_is_there_and_its_number_is_that_of_the_sources():
    assert native.available()
    (number,) = re.findall(r"#define DELTAMEM_ABI (\d+)", (CSRC / "isa.h").read_text())
    assert int(number) == native._ABI == native.library().deltamem_abi()


def test_a_missing_library_is_said_once_and_loudly(tmp_path):
    code = "from deltamem_vllm.ops import native; assert native.library() is None and not native.available()"
    done = run(f"import logging; logging.basicConfig(); {code}", DELTAMEM_NATIVE_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert all(word in warnings[0] for word in ("none.so is missing", "slower", "make native", "g++"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ('extern "C" int deltamem_abi() { return 0; }', "cannot be used: .*deltamem_isa"),
        ("int other;", "cannot be used: .*deltamem_abi"),
        (
            "\n".join(
                f'extern "C" int deltamem_{name}() {{ return -7; }}'
                for name in ("abi", "isa", "isa_supported", "use_isa", "threads")
            ),
            "built from other sources .interface -7",
        ),
    ],
)
def test_a_stale_library_is_refused_with_what_mends_it(tmp_path, source, says):
    path = library(tmp_path, source)
    done = run("from deltamem_vllm.ops import native; native.library()", DELTAMEM_NATIVE_LIBRARY=path)
    assert done.returncode == 1
    assert re.search(rf"RuntimeError: .*{re.escape(path)} .*{says}", done.stderr), done.stderr
    assert "make native" in done.stderr


def test_there_is_one_openmp_runtime_and_torch_sets_its_threads():
    code = (
        "import torch\n"
        "from deltamem_vllm.ops import native\n"
        "library = native.library()\n"
        "print(len(native.openmp_runtimes()), 'torch' in native.openmp_runtimes()[0])\n"
        "for count in (1, 2, 3, 1):\n"
        "    torch.set_num_threads(count)\n"
        "    print(library.deltamem_threads())\n"
    )
    done = run(code, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True", "1", "2", "3", "1"]


def test_the_library_brings_no_runtime_of_its_own():
    listed = subprocess.run(["readelf", "-d", native._path()], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert needed and not [name for name in needed if "omp" in name or "torch" in name or "python" in name]


def test_only_what_python_calls_is_visible():
    listed = subprocess.run(["nm", "-D", "--defined-only", native._path()], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names and [name for name in names if not name.startswith(("deltamem_", "_Z"))] == []
    # C++ templates of the standard library may be visible; nothing of ours.
    assert [name for name in names if "deltamem" in name and name.startswith("_Z")] == []


class TestInstructions:
    def test_the_best_is_used_and_less_can_be_chosen(self):
        has = native.supported_isas()
        assert has[0] == "scalar" and has == native.ISAS[: len(has)]
        for name in has:
            with native.using_isa(name):
                assert native.isa() == name
        assert run("from deltamem_vllm.ops import native; print(native.isa())").stdout.strip() == has[-1]

    def test_the_environment_forces_less(self):
        for name in native.supported_isas():
            done = run("from deltamem_vllm.ops import native; print(native.isa())", DELTAMEM_ISA=name)
            assert done.stdout.strip() == name, done.stderr

    def test_more_than_the_machine_has_is_refused(self, monkeypatch):
        class Old:
            @staticmethod
            def deltamem_isa_supported() -> int:
                return 1

        monkeypatch.setenv("DELTAMEM_ISA", "avx512")
        with pytest.raises(ValueError, match="DELTAMEM_ISA is 'avx512', but this machine has scalar, avx2;"):
            native._check_isa(Old)
        monkeypatch.setenv("DELTAMEM_ISA", "sse9")
        with pytest.raises(ValueError, match="DELTAMEM_ISA is 'sse9'"):
            native._check_isa(native.library())
        with pytest.raises(ValueError, match="not 'sse9'"), native.using_isa("sse9"):
            pass

    def test_a_file_uses_what_its_name_says(self):
        flags = builder().machine_flags
        for source in CSRC.glob("*.cpp"):
            here, elsewhere = flags(source, "x86_64"), flags(source, "aarch64")
            if not re.search(r"_avx\w+$", source.stem):
                assert here == elsewhere == [], "the portable part runs anywhere"
            else:
                assert elsewhere is None and ("-mavx512bf16" in here) == source.stem.endswith("bf16")


class TestBuilding:
    def test_without_a_compiler_the_message_says_so(self, monkeypatch, tmp_path):
        build = builder()
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
        with pytest.raises(FileNotFoundError, match="install g"):
            build.build(tmp_path / "_native.so", tmp_path / "work")
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="no C.. compiler found"):
            build.compiler()

    def test_only_what_changed_is_compiled(self, monkeypatch, tmp_path):
        build = builder()
        sources = tmp_path / "cpu"
        sources.mkdir()
        for name in ("isa.h", "isa.cpp"):
            (sources / name).write_text((CSRC / name).read_text())
        (sources / "between.h").write_text('#include "isa.h"\n')
        (sources / "other.cpp").write_text("int other = 1;\n")
        monkeypatch.setattr(build, "SOURCES", sources)
        compiled: list[str] = []
        call = build._call

        def counted(command):
            compiled.extend(Path(word).name for word in command if word.endswith(".cpp"))
            call(command)

        monkeypatch.setattr(build, "_call", counted)

        def again() -> list[str]:
            compiled.clear()
            build.build(tmp_path / "out" / "_native.so", tmp_path / "work")
            return sorted(compiled)

        assert again() == ["isa.cpp", "other.cpp"]
        assert again() == []
        (sources / "other.cpp").write_text("int other = 2;\n")
        assert again() == ["other.cpp"]
        (sources / "isa.h").write_text((CSRC / "isa.h").read_text() + "\n")
        assert again() == ["isa.cpp"], "the other includes no header"
        (sources / "other.cpp").write_text('#include "between.h"\nint other = 2;\n')
        assert again() == ["other.cpp"]
        (sources / "isa.h").write_text((CSRC / "isa.h").read_text() + "\n\n")
        assert again() == ["isa.cpp", "other.cpp"], "one includes it through another header"
        assert len(list((tmp_path / "work").iterdir())) == 2

    def test_a_wheel_holds_the_library_and_an_install_without_a_compiler_goes_on(self, tmp_path):
        """setup.py's own command, for a copy of the checkout with one small source."""
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            (tmp_path / name).write_text((ROOT / name).read_text())
        for folder in ("deltamem_vllm", "server", "triton_kernels", "configs/bench", "configs/eval", "csrc/cpu"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "deltamem_vllm" / "__init__.py").write_text('__version__ = "0"\n')
        (tmp_path / "csrc" / "build.py").write_text((ROOT / "csrc" / "build.py").read_text())
        for name in ("isa.h", "isa.cpp"):
            (tmp_path / "csrc" / "cpu" / name).write_text((CSRC / name).read_text())

        def setup(*arguments: str, **environment: str) -> str:
            command = [sys.executable, "setup.py", *arguments]
            kept = os.environ | environment
            done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stderr

        setup("bdist_wheel")
        (wheel,) = (tmp_path / "dist").iterdir()
        assert wheel.name.startswith("deltamem_vllm-0-py3-none-linux_")
        listed = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
        assert "deltamem_vllm/_native.so" in listed
        setup("build_ext", "--inplace")
        installed = tmp_path / "deltamem_vllm" / "_native.so"
        assert installed.exists()
        said = setup("build_ext", "--inplace", "--force", CXX=str(tmp_path / "none"))
        assert "NO NATIVE LIBRARY" in said and not installed.exists(), "an old library must not stay behind"


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path):
    """`make sanitize`, and a kernel that does read too far is found: otherwise the clean run says nothing."""
    built = tmp_path / "_native.so"
    build = [sys.executable, ROOT / "csrc" / "build.py", "--sanitize", "--strict", "--output", built]
    subprocess.run([*build, "--work", ROOT / "build" / "sanitized"], check=True)
    command = [sys.executable, ROOT / "scripts" / "sanitize.py", built]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    control = tmp_path / "test_control.py"
    control.write_text(
        "import ctypes, torch\n"
        "from deltamem_vllm.ops import native\n"
        "from deltamem_vllm.ops.inputs_cold import make_cold_tokens\n"
        "def test_one_page_too_many():\n"
        "    c = make_cold_tokens('normal', 4, 64, 16, 1, torch.float32, 0)\n"
        "    raw = torch.zeros(1, c.cold.page_bytes, dtype=torch.uint8)\n"
        "    n, p = native.int64, native.pointer\n"
        "    native.library().deltamem_decode_delta(4, n(64), n(c.cold.page_bytes), 0, n(2), p(raw),\n"
        "        n(c.cold.page_bytes), None, p(c.keys), p(c.values), p(c.counts), None)\n"
    )
    done = subprocess.run([*command, control], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stdout + done.stderr
