"""A folder of results, written so that a kill at any moment loses and repeats nothing.

meta.json        the settings that all results of the folder share
results.jsonl    one line per trial: question, method, n, repeat, memory
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.trial_result import TrialKey, TrialResult
from step_sglang.files import LockedFolder

META = "meta.json"
RESULTS = "results.jsonl"
_VERSION = 1
_POOL_TOLERANCE = 0.01


@dataclass(frozen=True)
class Loaded:
    """Results of one or several folders, and the settings they share."""

    meta: Mapping[str, Any]
    results: tuple[TrialResult, ...]
    problems: tuple[str, ...]


class ResultWriter:
    """Adds results to a folder, one writer at a time. Opening it removes a torn last line."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """Open or create the folder.

        Args:
            folder: of the results.
            meta: settings, as JSON values. A folder takes results of equal settings only; a setting
                that an earlier version did not write counts as equal.

        Raises:
            BenchError: the folder holds other results, is in use, or cannot be written.
        """
        self.folder = folder
        self.repairs: tuple[str, ...] = ()
        self._done: set[TrialKey] = set()
        self._pools: dict[str, int] = {}
        self._files = LockedFolder(folder, BenchError)
        with self._files.opening():
            self._files.agree(META, {**meta, "version": _VERSION}, read_meta)
            torn = self._files.open_lines(RESULTS)
            if torn:
                self.repairs = (f"removed a torn line of {torn} bytes",)
            results, problems = _parse((folder / RESULTS).read_bytes(), folder)
            if problems:
                raise BenchError(f"{problems[0]}: {folder / RESULTS} is damaged")
            for result in results:
                self._remember(result)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def done(self) -> frozenset[TrialKey]:
        """Trials that are in the folder."""
        return frozenset(self._done)

    def check_pool(self, memory: str, pool: int) -> None:
        """Refuse a server whose KV pool differs from that of earlier results of this memory.

        The size of a pool given as a share of memory is known only once the server runs, and
        differs by a few tokens from start to start.

        Raises:
            BenchError: they differ by more than 1 %.
        """
        known = self._pools.get(memory)
        if known is not None and abs(pool - known) > _POOL_TOLERANCE * known:
            raise BenchError(
                f"the server's KV pool has {pool} tokens, but the results of {memory!r} in "
                f"{self.folder} were measured with {known}: serve as before, or use another folder"
            )

    def add(self, result: TrialResult) -> None:
        """Write one result and wait until it is on disk.

        Raises:
            BenchError: it is there already, or the disk is full or fails.
        """
        if result.key in self._done:
            raise BenchError(f"{result.key} is in {self.folder} already")
        line = json.dumps(result.as_json(), ensure_ascii=False, allow_nan=False) + "\n"
        with self._files.writing(f"{len(self._done)} results are in {self.folder} and stay"):
            self._files.append(line.encode())
        self._remember(result)

    def _remember(self, result: TrialResult) -> None:
        self._done.add(result.key)
        self._pools.setdefault(result.memory, result.pool)


def load_results(folders: Sequence[Path]) -> Loaded:
    """Read the results of several folders, such as two shards, as one.

    Raises:
        BenchError: a folder holds no results, or they were measured in different ways.
    """
    metas: list[dict[str, Any]] = []
    results: dict[TrialKey, TrialResult] = {}
    problems: list[str] = []
    for folder in folders:
        metas.append(read_meta(folder))
        file = folder / RESULTS  # a kill may have come before it
        found, bad = _parse(file.read_bytes() if file.exists() else b"", folder)
        problems += bad
        for result in found:
            if result.key in results:
                problems.append(f"{folder} repeats {tuple(result.key)}; the first counts")
            results.setdefault(result.key, result)
    known = {key: value for meta in reversed(metas) for key, value in meta.items()}
    different = [k for k in known if any(m.get(k, known[k]) != known[k] for m in metas)]
    if different:
        raise BenchError(
            f"the folders were measured in different ways ({', '.join(different)}): report them "
            "one by one"
        )
    if not results:
        raise BenchError(f"{folders[0]} holds no results yet")
    return Loaded(metas[0], tuple(results.values()), tuple(problems))


def _parse(data: bytes, folder: Path) -> tuple[list[TrialResult], list[str]]:
    found: dict[TrialKey, TrialResult] = {}
    problems = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line:
            continue
        try:
            result = TrialResult.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{folder} line {number} is unusable ({error})")
            continue
        if result.key in found:
            problems.append(f"{folder} line {number} repeats {tuple(result.key)}")
        found.setdefault(result.key, result)
    return list(found.values()), problems


def read_meta(folder: Path) -> dict[str, Any]:
    """The settings that all results of a folder share; raises BenchError."""
    try:
        return dict(json.loads((folder / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BenchError(f"{folder} holds no results of `bench`: no usable {META}") from error
