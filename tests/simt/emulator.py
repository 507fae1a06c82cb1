"""Builds the device code against the emulation headers and runs calls of the op on it."""

import functools
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from tests.op_samples import Sample, make_slots

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# With the environment, so that a new checkout finds what an earlier one compiled.
BUILD = Path(sys.prefix) / "step-simt"
COMPILER = os.environ.get("CXX", "g++")
ASCENDING, DESCENDING, RANDOM = range(3)

# name: (flags of the device code, flags of the engine)
VARIANTS = {
    "plain": (["-O1"], []),
    "tsan": (["-O1", "-fsanitize=thread"], ["-DSIMT_TSAN"]),
    "asan": (
        ["-O1", "-fsanitize=address,alignment,bounds,shift", "-fno-sanitize-recover=all"],
        ["-DSIMT_ASAN"],
    ),
}
SANITIZER_OPTIONS = {
    # A small history per thread: an emulated grid has thousands of them.
    "TSAN_OPTIONS": "halt_on_error=1 history_size=0 report_thread_leaks=0 exitcode=66",
    "ASAN_OPTIONS": "detect_leaks=0 detect_stack_use_after_return=0 exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1 exitcode=66",
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Schedule:
    """`block_order` None = every block on its own OS thread, all at once."""

    block_order: Sequence[int] | None
    thread_order: int = ASCENDING
    seed: int = 0


class EmulationError(AssertionError):
    """The emulation or a sanitizer found something; the message is its report."""


def build(variant: str, kernel_source: str | None = None) -> Path:
    """The driver's path; `kernel_source` replaces the text of step_score.cu."""
    kernel = kernel_source or (CSRC / "step_score.cu").read_text()
    device_flags, engine_flags = VARIANTS[variant]
    rest = [*sorted(CSRC.glob("*.h")), *sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("include/*"))]
    text = kernel + variant + repr(VARIANTS[variant]) + "".join(p.read_text() for p in rest)

    def make(work: Path) -> Path:
        (work / "step_score.cu").write_text(kernel)
        common = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        common += [f"-I{HERE / 'include'}", f"-I{CSRC}"]

        def compiled(source: Path, flags: list[str]) -> Path:
            obj = work / f"{source.stem}.o"
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            run([COMPILER, *common, *flags, *language, "-c", str(source), "-o", str(obj)])
            return obj

        objects = [
            compiled(work / "step_score.cu", device_flags),
            compiled(HERE / "driver.cpp", device_flags),
            compiled(HERE / "simt.cpp", ["-O2", *engine_flags]),
        ]
        program = work / "driver"
        run([COMPILER, *device_flags, *map(str, objects), "-o", str(program), "-lpthread"])
        return program

    return built(variant, text, make)


@functools.cache
def _compiler() -> str:
    """Which one it is: its sanitizers are those of its version."""
    command = [COMPILER, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def built(name: str, text: str, make: Callable[[Path], Path]) -> Path:
    """The program of these sources, made once: another test process may want it too.

    Args:
        name: what its name begins with.
        text: all that decides what it is.
        make: compiles it in a folder and returns its path there.
    """
    digest = hashlib.sha256((_compiler() + text).encode()).hexdigest()[:16]
    target = BUILD / f"{name}-{digest}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                make(Path(folder)).replace(target)
    return target


def run(command: list[str]) -> None:
    """Run a compiler; its messages are the error's."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def _hidden_bytes(hidden: Tensor) -> bytes:
    """From the first element of the tensor to its last, the gaps between rows included."""
    rows, dim = hidden.shape
    extent = (rows - 1) * hidden.stride(0) + dim if rows else 0
    return _bytes(hidden.as_strided((extent,), (1,)))


def emulate(
    program: Path,
    sample: Sample,
    schedules: Sequence[Schedule],
    launches: int = 1,
    timeout: float = 300,
) -> list[Sample]:
    """State, out and workspace after `launches` calls in a row, for each schedule."""
    s = sample
    fields = [
        *(s.slot_ids.numel(), s.hidden.shape[1], s.units, s.hidden.stride(0)),
        *(s.hidden.shape[0], s.boundary.numel(), s.score_from.numel(), s.think_end_id),
        *(_DTYPES[s.hidden.dtype], _DTYPES[s.w1.dtype]),
        s.hidden.storage_offset() * s.hidden.itemsize % 16,
        *(launches, len(schedules)),
    ]
    mutable = (s.thinking, s.score_sum, s.num_steps, s.out, s.workspace)
    with _files() as (case, result):
        with case.open("wb") as f:
            f.write(struct.pack(f"{len(fields)}q", *fields))
            rows = torch.empty(0) if s.row_index is None else s.row_index
            inputs = (rows, s.slot_ids, s.input_ids, s.positions, s.boundary, s.score_from)
            weights = (s.w1, *s.head.split((s.units, s.units, 1)))
            for data in (_hidden_bytes(s.hidden), *map(_bytes, (*inputs, *weights, *mutable))):
                f.write(struct.pack("q", len(data)) + data)
            for schedule in schedules:
                order = schedule.block_order
                f.write(struct.pack("2q", schedule.thread_order, schedule.seed))
                f.write(struct.pack("q", 4 * len(order or ())))
                f.write(struct.pack(f"{len(order or ())}i", *(order or ())))
        done = subprocess.run(
            [str(program), str(case), str(result)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **SANITIZER_OPTIONS},
            check=False,
        )
        if done.returncode != 0:
            raise EmulationError(f"exit status {done.returncode}\n{done.stderr[:6000]}")
        return list(_read_results(result.read_bytes(), sample, mutable, len(schedules)))


@contextmanager
def _files() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "case", Path(folder) / "result"


def _read_results(
    data: bytes, sample: Sample, like: tuple[Tensor, ...], count: int
) -> Iterator[Sample]:
    names = ("thinking", "score_sum", "num_steps", "out", "workspace")
    at = 0
    for _ in range(count):
        values = {}
        for name, tensor in zip(names, like, strict=True):
            size = tensor.numel() * tensor.itemsize
            part = (
                torch.frombuffer(bytearray(data[at : at + size]), dtype=tensor.dtype)
                if size
                else tensor
            )
            values[name] = part.clone().reshape(tensor.shape)
            at += size
        state = [values.pop(name) for name in names[:3]]
        yield replace(sample, slots=make_slots(sample.score_from, *state), **values)
