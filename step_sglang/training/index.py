"""Reads a store's settings, index and shard headers; finds what is damaged.

Writes nothing; :mod:`store` repairs, :mod:`reader` loads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors

from step_sglang.training.errors import StoreError
from step_sglang.training.stored import StoredTrace, StoreMeta

META = "meta.json"
INDEX = "index.jsonl"
SHARDS = "shards"
TENSOR = "hidden"
_SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def shard_path(folder: Path, shard: int) -> Path:
    """Where shard number ``shard`` lies."""
    return folder / SHARDS / f"{shard:06d}.safetensors"


def read_meta(folder: Path) -> StoreMeta:
    """The store's meta data.

    Raises:
        StoreError: there is no store at ``folder``, or its meta file is unreadable.
    """
    file = folder / META
    if not file.is_file():
        raise StoreError(f"{folder} holds no collected traces: {META} is missing")
    try:
        value = json.loads(file.read_text())
        return StoreMeta.from_json(value)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{file} is not a store's meta file: {error}") from error


@dataclass(frozen=True)
class Scan:
    """The complete questions of an index, and a line for each problem."""

    traces: tuple[StoredTrace, ...]  # of complete questions, in file order
    kept_lines: tuple[bytes, ...]  # one per trace, newline included
    problems: tuple[str, ...]
    size: int  # bytes of the file that was scanned


def scan_index(folder: Path, n: int, with_text: bool = False) -> Scan:
    """Read the index and keep the questions that have exactly their n lines.

    A kill leaves at most a torn last line, hence at most one incomplete question at the end.
    """
    file = folder / INDEX
    data = file.read_bytes() if file.is_file() else b""
    problems: list[str] = []
    traces: list[StoredTrace] = []
    lines: list[bytes] = []
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it is cut off")
            trace = StoredTrace.from_json(json.loads(line), with_text)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{file} line {number} is unreadable ({error})")
            continue
        traces.append(trace)
        lines.append(line)
    complete = _complete(traces, n)
    partial = {trace.question_id for trace in traces} - complete
    problems += [f"question {name} has not its {n} traces" for name in sorted(partial)]
    kept = [i for i, trace in enumerate(traces) if trace.question_id in complete]
    return Scan(
        tuple(traces[i] for i in kept), tuple(lines[i] for i in kept), tuple(problems), len(data)
    )


def _complete(traces: Sequence[StoredTrace], n: int) -> set[str]:
    samples: dict[str, list[tuple[int, int]]] = {}
    for trace in traces:
        samples.setdefault(trace.question_id, []).append((trace.sample, trace.shard))
    return {
        name
        for name, found in samples.items()
        if Counter(sample for sample, _ in found) == Counter(range(n))
        and len({shard for _, shard in found}) == 1
    }


def check_shard(
    folder: Path, meta: StoreMeta, shard: int, traces: Sequence[StoredTrace]
) -> str | None:
    """Check a shard's header against its traces; returns the problem, with the file's name.

    Reads the header only, which also reveals a truncated file.
    """
    file = shard_path(folder, shard)
    rows = 0
    for trace in traces:
        if trace.first_row != rows:
            return f"{folder / INDEX}: rows of {file} are not numbered without gaps"
        rows += trace.num_steps
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            if names != [TENSOR]:
                return f"{file} holds tensors {names}, not [{TENSOR!r}]"
            view = opened.get_slice(TENSOR)
            shape, dtype = list(view.get_shape()), view.get_dtype()
    except (OSError, safetensors.SafetensorError) as error:
        return f"{file} is corrupt or truncated: {error}"
    if len(shape) != 2 or shape[1] != meta.hidden_size:
        return f"{file} holds rows of shape {shape[1:]}; {META} says hidden size {meta.hidden_size}"
    if (shape[0], dtype) != (rows, _SAFETENSORS_DTYPES[meta.dtype]):
        return f"{file} holds {shape[0]} rows of {dtype}; expected {rows} of {meta.dtype}"
    return None


def traces_by_shard(traces: Sequence[StoredTrace]) -> dict[int, tuple[StoredTrace, ...]]:
    """The traces of each shard, shards in first-seen order."""
    found: dict[int, list[StoredTrace]] = {}
    for trace in traces:
        found.setdefault(trace.shard, []).append(trace)
    return {shard: tuple(theirs) for shard, theirs in found.items()}
