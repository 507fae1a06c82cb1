"""One block of text about STEP on this machine's GPU, to paste into an issue.

    make gpu-report        (or: python bench/gpu_report.py [--device cpu] [--quick])

It says what ran it, whether the op is right (self check, tests, NVIDIA's compute-sanitizer where it
is installed), what a call costs inside a graph, and what a decode step of a server costs with STEP
and without. A part that fails says so, and the others go on. With `--device cpu` the same parts run
as far as a CPU goes: the emulated kernel's tests in the place of the GPU's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.op import graph_table  # noqa: E402
from step_sglang import protocol  # noqa: E402
from step_sglang.reasoner import scorer_path  # noqa: E402
from step_sglang.scoring import build, op  # noqa: E402
from step_sglang.scoring.boundary import bitmap  # noqa: E402
from step_sglang.scoring.first_build import cuda_library  # noqa: E402
from step_sglang.scoring.scorer import load_scorer  # noqa: E402
from step_sglang.scoring.self_check import check_op, describe_op  # noqa: E402
from step_sglang.scoring.slots import SlotState  # noqa: E402

SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck")
# Every tile size, both ends of a batch, odd strides, and a graph: small, as each access is checked.
SANITIZED = ("test_random_strides", "test_graph_capture_and_replay")
NVIDIA_SMI = "name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def said(*command: str | Path) -> str:
    """The output of a command on one line, or why there is none."""
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT
        )
    except OSError as error:
        return f"({error.strerror})"
    text = " / ".join((done.stdout or done.stderr).strip().splitlines())
    return text if done.returncode == 0 else f"(exit {done.returncode}: {text[-200:]})"


def version(package: str) -> str:
    """Of an installed package; the op alone can be tried in a checkout, without SGLang."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(options: argparse.Namespace) -> Iterator[str]:
    """What this is about."""
    dirty = "" if not said("git", "status", "--porcelain", "-uno") else ", with changes"
    yield f"date        {time.strftime('%Y-%m-%d %H:%M %Z')}"
    yield f"commit      {said('git', 'rev-parse', 'HEAD')}{dirty}"
    for name in ("step-sglang", "sglang", "torch"):
        yield f"{name:11} {version(name)}"
    yield f"machine     {platform.machine()}, Python {platform.python_version()}"
    toolkit = build.find_toolkit()
    yield f"nvcc        {'none' if toolkit is None else said(toolkit.nvcc, '--version')[-80:]}"
    yield f"nvidia-smi  {said('nvidia-smi', f'--query-gpu={NVIDIA_SMI}', '--format=csv,noheader')}"
    path, digest = op.library(options.device)
    yield f"library     {path.name}, sha256 {digest}, {path.stat().st_size} bytes"


def self_check(options: argparse.Namespace) -> Iterator[str]:
    """What every server does at its start."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scorer = load_scorer(scorer_path())
        slots = SlotState(8, scorer, bitmap([31, 77]), 9, torch.device(options.device))
        check_op(slots, dtype)
        yield f"{dtype}: right, {describe_op(slots)}"


def tests(options: argparse.Namespace) -> Iterator[str]:
    """The tests of the device."""
    where = ["-m", "gpu", "--require-all", "tests/gpu"]
    if options.device == "cpu":
        where = ["tests/simt/test_op_simt.py"]
    if options.quick:
        where += ["-k", "launches or same_bits"]
    yield from pytest(where)


def pytest(arguments: list[str], *before: str) -> Iterator[str]:
    """Totals of a run, and the names of what failed or was skipped."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    wanted = re.compile(r"^(FAILED|ERROR|SKIPPED)|\d+ (passed|failed|skipped|deselected|error)")
    found = [line[:160] for line in lines if wanted.search(line)]
    yield f"$ {' '.join(['pytest', *arguments])}"
    yield from found[-20:] or [line[:160] for line in (done.stdout + done.stderr).splitlines()[-5:]]
    yield f"exit status {done.returncode}"


def sanitizer(options: argparse.Namespace) -> Iterator[str]:
    """NVIDIA's own checks of memory, initialisation, barriers and races."""
    toolkit = build.find_toolkit()
    beside = None if toolkit is None else toolkit.home / "bin" / "compute-sanitizer"
    program = str(beside) if beside and beside.is_file() else shutil.which("compute-sanitizer")
    if program is None:
        yield "compute-sanitizer is not installed"
        return
    if options.device == "cpu":
        yield f"{program}: needs a GPU"
        return
    for tool in SANITIZERS:
        before = [program, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        yield f"-- {tool}"
        yield from pytest(["-m", "gpu", "tests/gpu", "-k", " or ".join(SANITIZED)], *before)


def costs(options: argparse.Namespace) -> Iterator[str]:
    """What a call adds to a graph."""
    dims, rounds = ([256], 3) if options.quick else ([2560, 4096, 5120], 31)
    yield from graph_table(dims, ["fp32", "bf16"], "bf16", options.device, rounds)


def overhead(options: argparse.Namespace) -> Iterator[str]:
    """What a decode step of a server costs with STEP, and without."""
    command = [sys.executable, "-W", "ignore", "bench/step_overhead.py"]
    command += ["--device", options.device]
    if options.quick:
        command += ["--hidden", "64", "--layers", "1", "--rounds", "2", "--tokens", "20"]
    elif options.device == "cuda":
        command += ["--hidden", "2048", "--layers", "16", "--batch", "64", "--tokens", "400"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--json", f"{folder}/rows.json"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
    yield from (done.stdout if done.returncode == 0 else done.stderr[-1500:]).strip().splitlines()
    yield f"exit status {done.returncode}"


PARTS: tuple[tuple[str, Callable[[argparse.Namespace], Iterator[str]]], ...] = (
    ("machine", machine),
    ("self check", self_check),
    ("tests", tests),
    ("compute-sanitizer", sanitizer),
    ("cost of a call in a graph, microseconds", costs),
    ("a server's decode step", overhead),
)


def main() -> int:
    """Print the block; exit status 1 if a part could not run."""
    parser = argparse.ArgumentParser(description="A report to paste into an issue.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a minute: to try the script")
    parser.add_argument("--skip", nargs="*", default=[], help="parts to leave out, by first word")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit(
                "bench/gpu_report.py: torch finds no CUDA device (--device cpu tries the script)"
            )
        if not op.has_cuda():
            library = cuda_library(print)
            op.load_cuda(library)
            os.environ[protocol.CUDA_LIBRARY_ENV] = str(library)  # for the tests and the servers
    failed = 0
    print("```text", flush=True)
    for title, part in PARTS:
        if title.split()[0] in options.skip:
            continue
        print(f"== {title}", flush=True)
        try:
            for line in part(options):
                print(line, flush=True)
        except Exception:
            failed += 1
            print(f"this part failed:\n{traceback.format_exc(limit=-3)}", flush=True)
    print("```")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
