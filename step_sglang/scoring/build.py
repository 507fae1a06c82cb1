"""How the op's libraries are compiled: which toolkit, architectures and flags. Only the standard
library, because ``setup.py`` runs it before anything is installed; it starts no compiler but to
ask for its version.

The libraries use torch's stable ABI and no Python symbols, so one build serves every Python. No
GPU is needed to compile.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

# Machine code for one architecture runs on later ones of the same major number. These are all
# majors of data-centre and desktop GPUs since Ampere.
DEFAULT_ARCHS = ("80", "90", "100", "120")
# The oldest torch that the op was run with: 2.11.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# By file: one library holds all variants and picks one at run time; -march=native would bind it to
# the machine that built it.
ISA_FLAGS = {
    "cpu_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "cpu_avx512.cpp": (
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl",
        "-Wno-maybe-uninitialized",  # false alarms inside GCC's own AVX-512 header
    ),
    "cpu_avx512_bf16.cpp": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-Wno-maybe-uninitialized",
    ),
}  # fmt: skip
CPU_SOURCES = (
    "binding.cpp",
    "compat.cpp",
    "step_score_cpu.cpp",
    "cpu_plain.cpp",
    "cpu_avx2.cpp",
    "cpu_avx512.cpp",
    "cpu_avx512_bf16.cpp",
)
STATIC_CUDART = "libcudart_static.a"
CUDA_SOURCES = ("binding.cpp", "compat.cpp", "step_score.cu")


class BuildError(RuntimeError):
    """The op cannot be compiled here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Command:
    """One compiler call."""

    argv: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that has a compiler, headers and a runtime library."""

    home: Path
    cudart: Path
    version: tuple[int, int]  # of nvcc
    archs: tuple[str, ...]  # that it compiles for

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"


def torch_dir() -> Path:
    """The installed torch's folder.

    Raises:
        BuildError: there is no torch.
    """
    spec = find_spec("torch")  # found, not imported: importing takes seconds
    if spec is None or spec.origin is None:
        raise BuildError("torch must be installed to build the op (pip install torch)")
    return Path(spec.origin).parent


def torch_cuda() -> tuple[int, int] | None:
    """CUDA version of the installed torch; None for a build without CUDA."""
    text = (torch_dir() / "version.py").read_text()
    found = re.search(r"^cuda\b.*?=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return None if found is None else (int(found[1]), int(found[2]))


def find_toolkit() -> Toolkit | None:
    """CUDA_HOME if it is set and whole, else the toolkit that suits the installed torch best.

    One of torch's own major version comes first, and among those one that is not newer, because
    only its PTX can be read by every driver that torch runs on. One of a later major version is
    never taken.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name) and (chosen := read_toolkit(Path(os.environ[name]))):
            return chosen
    wanted = torch_cuda() or (99, 0)
    usable = [t for t in map(read_toolkit, _homes()) if t is not None and t.version[0] <= wanted[0]]
    return max(
        usable,
        key=lambda t: (t.version[0] == wanted[0], t.version <= wanted),
        default=None,
    )


def _homes() -> list[Path]:
    """Where toolkits are, the preferred ones first.

    The `nvcc` on PATH can be a script that runs one elsewhere, so a folder counts only with the
    headers in it. SGLang's dependencies bring one into the environment.
    """
    homes = [Path(nvcc).resolve().parent.parent] if (nvcc := shutil.which("nvcc")) else []
    homes.append(Path("/usr/local/cuda"))
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for entry in dict.fromkeys([str(torch_dir().parent), *sys.path]):
        homes += sorted(Path(entry or ".").glob("nvidia/cu[0-9]*"), reverse=True)
    return homes


@lru_cache(maxsize=32)
def read_toolkit(home: Path) -> Toolkit | None:
    """The toolkit in a folder, or None where a part of it is missing or its compiler fails."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file() or not (home / "include/cuda_runtime.h").is_file():
        return None
    # Static first: the library then needs only the driver, whatever runtime torch brought. A wheel
    # for other machines uses torch's: the static one binds to this machine's glibc.
    shared = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")
    names = shared if os.environ.get("STEP_CUDART") == "shared" else (STATIC_CUDART, *shared)
    places = [home / folder / name for name in names for folder in ("lib64", "lib")]
    cudart = next((path for path in places if path.is_file()), None)
    version = re.search(r"release (\d+)\.(\d+)", _said_by(nvcc, "--version"))
    archs = re.findall(r"compute_(\d+)", _said_by(nvcc, "--list-gpu-arch"))
    if cudart is None or version is None or not archs:
        return None
    return Toolkit(home, cudart, (int(version[1]), int(version[2])), tuple(archs))


def _said_by(program: Path, flag: str) -> str:
    try:
        done = subprocess.run(
            [str(program), flag], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def choose_archs(toolkit: Toolkit, wanted: str | None = None) -> tuple[str, ...]:
    """Architectures to compile for: those of ``wanted``, else the default ones that nvcc has.

    Args:
        toolkit: what compiles.
        wanted: the value of STEP_CUDA_ARCHS, such as "80;90;100".

    Raises:
        BuildError: ``wanted`` is malformed, or names one that this nvcc does not know.
    """
    if wanted is None:
        chosen = tuple(arch for arch in DEFAULT_ARCHS if arch in toolkit.archs)
        return chosen or toolkit.archs[-1:]
    archs = tuple(a.strip().replace(".", "") for a in re.split("[;,]", wanted) if a.strip())
    if not archs or not all(arch.isdigit() for arch in archs):
        raise BuildError(f'STEP_CUDA_ARCHS must look like "80;90;100", found {wanted!r}')
    unknown = [arch for arch in archs if arch not in toolkit.archs]
    if unknown:
        major, minor = toolkit.version
        raise BuildError(
            f"{toolkit.nvcc} ({major}.{minor}) does not compile for {', '.join(unknown)}; it has "
            f"{', '.join(toolkit.archs)}: change STEP_CUDA_ARCHS or set CUDA_HOME to a newer one"
        )
    return archs


def gencode_flags(toolkit: Toolkit, archs: Sequence[str], *, ptx: bool = True) -> list[str]:
    """Machine code for each architecture, and PTX of the highest for later ones.

    A driver reads no PTX that is newer than itself, and the oldest driver that torch runs on is
    of torch's own CUDA version; so a newer toolkit writes none.
    """
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if ptx and toolkit.version <= (torch_cuda() or toolkit.version):
        highest = max(archs, key=int)
        flags.append(f"-gencode=arch=compute_{highest},code=compute_{highest}")
    return flags


def commands(
    sources: Sequence[Path],
    work: Path,
    target: Path,
    toolkit: Toolkit | None = None,
    gencode: Sequence[str] = (),
) -> list[Command]:
    """The compiler calls that make one library; the last one links.

    Args:
        sources: of one folder, which is also searched for headers.
        work: where objects go.
        target: the library.
        toolkit: compiles ``.cu`` files; None for the CPU library.
        gencode: nvcc's architecture flags.
    """
    torch, cxx = torch_dir(), os.environ.get("CXX", "g++")
    host = [f"-isystem{torch / 'include'}", TORCH_ABI]
    host += ["-DSTEP_CUDA_LIBRARY", "-DUSE_CUDA"] if toolkit is not None else []
    calls = []
    for source in sources:
        obj = work / f"{source.name}.o"
        if source.suffix == ".cu":
            assert toolkit is not None
            head = [str(toolkit.nvcc), f"-ccbin={cxx}", *gencode]
            # Device code knows nothing of torch.
            head += ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        else:
            isa = ISA_FLAGS.get(source.name, ()) if platform.machine() == "x86_64" else ()
            head = [cxx, *CXX_FLAGS, *isa, *host]
        argv = [*head, f"-I{source.parent}", "-c", str(source), "-o", str(obj)]
        calls.append(Command(tuple(argv), (str(source),), str(obj)))
    objects = tuple(call.output for call in calls)
    link = [cxx, "-shared", "-o", str(target), *objects]
    # Undefined symbols come from the torch that is loaded, found by name and not by path.
    link += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if toolkit is not None:
        link += ["-ltorch_cuda", str(toolkit.cudart), "-lpthread", "-ldl", "-lrt"]
    return [*calls, Command(tuple(link), objects, str(target))]
