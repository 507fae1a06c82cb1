"""Builds the two shared libraries of the op. Package metadata is in pyproject.toml.

Environment: STEP_CUDA=1 requires the CUDA library, 0 never builds it, unset builds it when a
toolkit is found; STEP_CUDA_ARCHS lists compute capabilities ("80;90;100"); CUDA_HOME, CXX and
MAX_JOBS as usual. No GPU is needed. The libraries use torch's stable ABI and no Python symbols, so
one build serves every Python version.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;90;100"
# The oldest torch whose stable ABI has all the op uses (a stream's native handle): 2.13.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020d000000000000"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# By file: one library holds all variants and picks one at run time; -march=native would bind it to
# the machine that built it.
ISA_FLAGS = {
    "cpu_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "cpu_avx512.cpp": [
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl",
        "-Wno-maybe-uninitialized",  # false alarms inside GCC's own AVX-512 header
    ],
    "cpu_avx512_bf16.cpp": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-Wno-maybe-uninitialized",
    ],
}  # fmt: skip

CPU_SOURCES = [
    "binding.cpp",
    "step_score_cpu.cpp",
    "cpu_plain.cpp",
    "cpu_avx2.cpp",
    "cpu_avx512.cpp",
    "cpu_avx512_bf16.cpp",
]
CUDA_SOURCES = ["binding.cpp", "step_score.cu"]


def torch_dir() -> Path:
    """The installed torch's folder."""
    spec = find_spec("torch")  # found, not imported: importing takes seconds
    if spec is None or spec.origin is None:
        raise SystemExit("step-sglang: torch must be installed to build the op (pip install torch)")
    return Path(spec.origin).parent


def find_toolkit() -> tuple[Path, Path] | None:
    """The CUDA toolkit's folder and its runtime library, from the first place that has both.

    The `nvcc` on PATH can be a script that runs one elsewhere, so a folder counts only with the
    headers in it.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates += ["/usr/local/cuda", str(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13")]
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if not (home / "bin/nvcc").is_file() or not (home / "include/cuda_runtime.h").is_file():
            continue
        # Static first: the library then needs only the driver, whatever runtime torch brought.
        for name in ("libcudart_static.a", "libcudart.so", "libcudart.so.13", "libcudart.so.12"):
            for folder in ("lib64", "lib"):
                if (home / folder / name).is_file():
                    return home, home / folder / name
    return None


def want_cuda() -> bool:
    """What STEP_CUDA and the machine say; exits when they contradict each other."""
    setting = os.environ.get("STEP_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"step-sglang: STEP_CUDA must be 0, 1 or unset, found {setting!r}")
    if setting == "0":
        return False
    if find_toolkit() is not None:
        return True
    if setting == "1":
        raise SystemExit(
            "step-sglang: STEP_CUDA=1, but no CUDA toolkit was found. Unset STEP_CUDA, or set"
            " CUDA_HOME to a folder with bin/nvcc, include/cuda_runtime.h and"
            " lib64/libcudart_static.a."
        )
    print("step-sglang: no CUDA toolkit found, building the CPU op only", file=sys.stderr)
    return False


def gencode_flags() -> list[str]:
    """Machine code for each architecture, and PTX of the highest for later ones."""
    archs = os.environ.get("STEP_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";")
    archs = [arch.strip().replace(".", "") for arch in archs if arch.strip()]
    if not archs or not all(arch.isdigit() for arch in archs):
        raise SystemExit('step-sglang: STEP_CUDA_ARCHS must look like "80;90;100"')
    highest = max(archs, key=int)
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{highest},code=compute_{highest}"]


class BuildLibraries(build_ext):
    """Compiles plain shared libraries: they register themselves with torch when loaded."""

    def get_ext_filename(self, fullname: str) -> str:
        """step_sglang.scoring.step_cpu becomes step_sglang/scoring/libstep_cpu.so."""
        package, _, name = fullname.rpartition(".")
        return str(Path(*package.split("."), f"lib{name}.so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library."""
        torch = torch_dir()
        is_cuda = ext.name.endswith("_cuda")
        work = Path(self.build_temp) / ext.name
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        flags = [f"-isystem{torch / 'include'}", TORCH_ABI]
        flags += ["-DSTEP_CUDA_LIBRARY"] if is_cuda else []
        objects = [work / (Path(source).name + ".o") for source in ext.sources]
        commands = [
            self._compile(Path(source), obj, flags)
            for source, obj in zip(ext.sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            list(pool.map(self._run, commands))

        link = [self._cxx(), "-shared", "-o", target, *objects]
        # Undefined symbols come from the torch that is loaded, found by name and not by path.
        link += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        if is_cuda:
            toolkit = find_toolkit()
            assert toolkit is not None
            link += [toolkit[1], "-lpthread", "-ldl", "-lrt"]
        self._run(list(map(str, link)))

    def _compile(self, source: Path, obj: Path, torch_flags: list[str]) -> list[str]:
        if source.suffix == ".cu":
            toolkit = find_toolkit()
            assert toolkit is not None
            head = [str(toolkit[0] / "bin/nvcc"), f"-ccbin={self._cxx()}", *gencode_flags()]
            # Device code knows nothing of torch.
            flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        else:
            isa = ISA_FLAGS.get(source.name, []) if platform.machine() == "x86_64" else []
            head, flags = [self._cxx()], [*CXX_FLAGS, *isa, *torch_flags]
        return [*head, *flags, f"-I{CSRC}", "-c", str(source), "-o", str(obj)]

    @staticmethod
    def _cxx() -> str:
        return os.environ.get("CXX", "g++")

    @staticmethod
    def _run(command: list[str]) -> None:
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
    names = {"_cpu": CPU_SOURCES}
    if want_cuda():
        names["_cuda"] = CUDA_SOURCES
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
