"""Builds the CUDA library once on a machine whose installation has none, and finds it again.

Owns the cache folder, its lock and the progress lines. What is compiled how is in ``build``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from step_sglang.scoring import build
from step_sglang.scoring.build import BuildError, Command, Toolkit

LIBRARY = "libstep_cuda.so"
_PACKAGE = Path(__file__).parent.parent


def cuda_library(say: Callable[[str], None]) -> Path:
    """The CUDA library for this machine's GPUs: from the cache, or compiled now.

    Several processes may ask at once; one compiles and the others wait for it.

    Args:
        say: gets a line before something that takes long, and one after.

    Raises:
        BuildError: it cannot be built here, or STEP_BUILD=0 forbids it; the message has the
            command that would do it.
    """
    toolkit = build.find_toolkit()
    if toolkit is None:
        raise BuildError(
            "there is no CUDA toolkit to build STEP's op with: `pip install "
            f"'humming-kernels[cu13]'` brings one into this environment. {_by_hand(None)}"
        )
    archs = choose_archs(toolkit)
    folder = cache_folder() / _key(toolkit, archs)
    library = folder / LIBRARY
    if library.is_file():
        return library
    if os.environ.get("STEP_BUILD", "1") == "0":
        raise BuildError(
            f"STEP's CUDA op is not built, and STEP_BUILD=0 forbids to. {_by_hand(toolkit)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise BuildError(
            f"STEP's CUDA op cannot be built in {folder}: {error}. Set STEP_CACHE to a folder that "
            "can be written"
        ) from error
    try:
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process that holds it
            if not library.is_file():
                _build(folder, library, toolkit, archs, say)
    except OSError as error:  # a full disk, a file system without locks
        raise BuildError(
            f"STEP's CUDA op cannot be built in {folder}: {error}. Free some space, or set "
            "STEP_CACHE to another folder"
        ) from error
    return library


def cache_folder() -> Path:
    """STEP_CACHE, or `step-sglang` in the user's cache folder."""
    if own := os.environ.get("STEP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step-sglang"


def choose_archs(toolkit: Toolkit) -> tuple[str, ...]:
    """STEP_CUDA_ARCHS, else those of this machine's GPUs, else the default ones.

    Raises:
        BuildError: STEP_CUDA_ARCHS, or a GPU, is one that this nvcc does not know.
    """
    wanted = os.environ.get("STEP_CUDA_ARCHS") or ";".join(gpu_archs())
    return build.choose_archs(toolkit, wanted or None)


def gpu_archs() -> list[str]:
    """Compute capabilities of the GPUs, such as "90"; none where the driver does not say.

    Asked of the driver's own tool, because torch would begin to use a GPU in this process.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {line.strip().replace(".", "") for line in done.stdout.splitlines()}
    return sorted((arch for arch in found if arch.isdigit()), key=int)


def sources() -> Path:
    """The folder of the native code: in the installed package, or in the checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def _key(toolkit: Toolkit, archs: Sequence[str]) -> str:
    """Changes with everything that the library depends on."""
    digest = hashlib.sha256(repr((toolkit.version, archs)).encode())
    digest.update((build.torch_dir() / "version.py").read_bytes())
    digest.update(Path(build.__file__).read_bytes())
    for file in sorted(sources().iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return f"op-sm{'-'.join(archs)}-{digest.hexdigest()[:16]}"


def _build(
    folder: Path,
    library: Path,
    toolkit: Toolkit,
    archs: Sequence[str],
    say: Callable[[str], None],
) -> None:
    version = ".".join(map(str, toolkit.version))
    begun = time.monotonic()
    say(
        f"STEP builds its CUDA op for sm_{', sm_'.join(archs)} with nvcc {version}, once for this "
        "environment; it takes about a minute"
    )
    for left in folder.glob("work-*"):  # by a kill: only the holder of the lock has one
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    try:
        files = [sources() / name for name in build.CUDA_SOURCES]
        gencode = build.gencode_flags(toolkit, archs, ptx=False)  # for these very GPUs
        new = work / LIBRARY
        _ninja(work, build.commands(files, work, new, toolkit, gencode), toolkit)
        new.replace(library)  # in one step: whoever finds it finds all of it
    finally:
        with suppress(OSError):
            shutil.rmtree(work)
    say(f"STEP built its CUDA op in {time.monotonic() - begun:.0f} s: {library}")


def _ninja(work: Path, calls: Sequence[Command], toolkit: Toolkit) -> None:
    lines = []
    for i, call in enumerate(calls):
        argv = " ".join(map(_quoted, call.argv)).replace("$", "$$")
        lines += [f"rule call{i}", f"  command = {argv}"]
        inputs = " ".join(map(_escaped, call.inputs))
        lines.append(f"build {_escaped(call.output)}: call{i} {inputs}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = [sys.executable, "-m", "ninja"]
    done = subprocess.run(
        [*ninja, "-C", str(work)], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildError(f"STEP's CUDA op does not build:\n{said}\n{_by_hand(toolkit)}")


def _quoted(word: str) -> str:
    return word if word.replace("-", "").isalnum() else "'" + word.replace("'", "'\\''") + "'"


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _by_hand(toolkit: Toolkit | None) -> str:
    home = "CUDA_HOME=/path/to/cuda" if toolkit is None else f"CUDA_HOME={toolkit.home}"
    where = "step-sglang" if (_PACKAGE / "csrc").is_dir() else f"-e {_PACKAGE.parent}"
    return (
        f"By hand: `{home} STEP_CUDA=1 {sys.executable} -m pip install --no-build-isolation "
        f"--no-deps --force-reinstall --no-binary step-sglang {where}`"
    )
