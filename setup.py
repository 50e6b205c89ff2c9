# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The part of the packaging that pyproject.toml cannot say: which folder becomes which package.

`server/` and `triton_kernels/` stand beside the package in the repository but are installed inside it. They
must never be importable by their bare names: vLLM looks for a top-level `triton_kernels` (another project's
package) and would call into ours.

That holds for an editable install too. A plain one would put the repository root on sys.path. Because the
mapping below is not that simple layout, setuptools installs an import finder instead, which knows
exactly the three packages' own folders and nothing else. `tests/unit/test_packaging.py` proves it.

The native library (csrc/) is a shared library without anything of Python in it, so one wheel serves every Python. It
is optional: without a compiler the install goes on, and the package says at run time what is missing.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

MAPPED = {"deltamem_vllm.server": "server", "deltamem_vllm.triton_kernels": "triton_kernels"}

packages = find_packages(include=["deltamem_vllm", "deltamem_vllm.*"])
for package, folder in MAPPED.items():
    packages += [package, *(f"{package}.{inner}" for inner in find_packages(folder))]

# YAML files, no code: `evaluation/configs.py` finds them in a checkout and in a wheel.
CONFIGS = {f"deltamem_vllm.configs.{folder}": f"configs/{folder}" for folder in ("bench", "eval")}


class BuildNative(build_ext):
    """Builds the library with csrc/build.py and gives it a plain name, for it is loaded by path."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        spec = importlib.util.spec_from_file_location("deltamem_csrc_build", ROOT / "csrc" / "build.py")
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            builder.build(output, Path(self.build_temp).absolute() / "native")
        except (OSError, builder.subprocess.CalledProcessError) as error:
            # An old library would be taken for a new one. pip shows this with -v only; the package warns again.
            output.unlink(missing_ok=True)
            (ROOT / "deltamem_vllm" / "_native.so").unlink(missing_ok=True)
            print(
                f"deltamem: NO NATIVE LIBRARY, operations on a CPU will be several times slower: {error}",
                file=sys.stderr,
            )


class NativeWheel(bdist_wheel):
    """A wheel for this platform and any Python 3: nothing in it is compiled against Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


native = Extension(
    "deltamem_vllm._native",
    sources=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
    optional=True,
)

setup(
    packages=[*packages, *CONFIGS],
    package_dir={"deltamem_vllm": "deltamem_vllm", **MAPPED, **CONFIGS},
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
