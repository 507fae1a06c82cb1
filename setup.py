"""Builds the two shared libraries of the op. Package metadata is in pyproject.toml.

Environment: STEP_CUDA=1 requires the CUDA library, 0 never builds it, unset builds it when a
toolkit is found; STEP_CUDA_ARCHS lists compute capabilities ("80;90;100"); STEP_CUDART=shared
links torch's CUDA runtime, for wheels; CUDA_HOME, CXX and MAX_JOBS as usual. How they are compiled
is in step_sglang/scoring/build.py.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_build() -> ModuleType:
    """`step_sglang.scoring.build`, by its file: the package cannot be imported yet."""
    spec = importlib.util.spec_from_file_location(
        "step_sglang_build", ROOT / "step_sglang" / "scoring" / "build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_build()


def want_cuda() -> bool:
    """What STEP_CUDA and the machine say; exits when they contradict each other."""
    setting = os.environ.get("STEP_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"step-sglang: STEP_CUDA must be 0, 1 or unset, found {setting!r}")
    if setting == "0":
        return False
    try:
        if build.find_toolkit() is not None:
            return True
    except build.BuildError as error:
        raise SystemExit(f"step-sglang: {error}") from None
    if setting == "1":
        raise SystemExit(
            "step-sglang: STEP_CUDA=1, but no CUDA toolkit was found. Unset STEP_CUDA, or set"
            " CUDA_HOME to a folder with bin/nvcc, include/cuda_runtime.h and"
            " lib64/libcudart_static.a, not of a later major version than torch's CUDA."
        )
    print(
        "step-sglang: no CUDA toolkit found, building the CPU op only; a GPU server builds the"
        " CUDA op at its first start",
        file=sys.stderr,
    )
    return False


class BuildLibraries(build_ext):
    """Compiles plain shared libraries: they register themselves with torch when loaded."""

    def get_ext_filename(self, fullname: str) -> str:
        """step_sglang.scoring.step_cpu becomes step_sglang/scoring/libstep_cpu.so."""
        package, _, name = fullname.rpartition(".")
        return str(Path(*package.split("."), f"lib{name}.so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library."""
        work = Path(self.build_temp) / ext.name
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        toolkit, gencode = None, []
        try:
            if ext.name.endswith("_cuda"):
                toolkit = build.find_toolkit()
                archs = build.choose_archs(toolkit, os.environ.get("STEP_CUDA_ARCHS"))
                gencode = build.gencode_flags(toolkit, archs)
            sources = [Path(source) for source in ext.sources]
            *compile_, link = build.commands(sources, work, target, toolkit, gencode)
        except build.BuildError as error:
            raise SystemExit(f"step-sglang: {error}") from None
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            list(pool.map(self._run, [command.argv for command in compile_]))
        self._run(link.argv)

    @staticmethod
    def _run(command: tuple[str, ...]) -> None:
        print(" ".join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(f"step-sglang: compiler not found: {command[0]}") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"step-sglang: {command[0]} failed ({error.returncode})") from None


class AnyPythonWheel(bdist_wheel):
    """The libraries depend on the platform and on torch, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3 on this platform."""
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    """The libraries to build: CPU always, CUDA when wanted."""
    names = {"_cpu": build.CPU_SOURCES}
    if want_cuda():
        names["_cuda"] = build.CUDA_SOURCES
    return [
        Extension(f"step_sglang.scoring.step{name}", [f"csrc/{source}" for source in sources])
        for name, sources in names.items()
    ]


# Of an editable installation setuptools warns that a folder of the package's name could be imported
# in its place: that folder is the package.
warnings.filterwarnings("ignore", "Editable installation")

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
)
