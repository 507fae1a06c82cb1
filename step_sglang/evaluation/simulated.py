"""A folder of simulated outcomes, written so that a kill at any moment loses and repeats nothing.

simulation.json    the settings that all outcomes of the folder share
simulated.jsonl    one line per outcome: question, method, n, draw, pool, AUC of the scores
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from step_sglang.files import LockedFolder
from step_sglang.simulation.errors import SimulationError

META, OUTCOMES = "simulation.json", "simulated.jsonl"
# Of the code that an outcome depends on: 2 charges a row of a recorded speed once, and votes by the
# odds of recorded scores.
_VERSION = 2


class OutcomeKey(NamedTuple):
    """Identifies an outcome; no two in a folder share one."""

    question: str
    method: str
    n: int
    draw: int
    pool: int
    auc: float | None


@dataclass(frozen=True)
class SimulatedOutcome:
    """One method on one question. Everything in it is simulated."""

    question: str
    method: str
    n: int
    draw: int  # of traces and scores
    pool: int  # KV tokens
    auc: float | None  # of invented scores, within the question; None: they are recorded ones
    correct: bool
    seconds: float  # until the group's last trace ended
    tokens: int
    wait: float  # seconds of a trace, mean
    pruned: int
    retracted: int
    ended: int  # traces that an early end or a shrinking vote cut short

    @property
    def key(self) -> OutcomeKey:
        """What identifies it."""
        return OutcomeKey(self.question, self.method, self.n, self.draw, self.pool, self.auc)


class OutcomeWriter:
    """Adds outcomes to a folder, one writer at a time. Opening it removes a torn last line."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """Open or create the folder; it takes outcomes of equal settings only.

        Raises:
            SimulationError: it holds others, a damaged line, is in use, or cannot be written.
        """
        self.folder = folder
        self.outcomes: list[SimulatedOutcome] = []
        self._files = LockedFolder(folder, SimulationError)
        with self._files.opening():
            self._files.agree(META, {**meta, "version": _VERSION}, read_meta)
            self._files.open_lines(OUTCOMES)
            self.outcomes = list(_parse(folder / OUTCOMES))
        self.done = {outcome.key for outcome in self.outcomes}

    def __enter__(self) -> OutcomeWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, outcomes: Sequence[SimulatedOutcome]) -> None:
        """Write outcomes that belong together and wait until they are on disk.

        Raises:
            SimulationError: the disk is full or fails.
        """
        new = [outcome for outcome in outcomes if outcome.key not in self.done]
        text = "".join(json.dumps(asdict(outcome), allow_nan=False) + "\n" for outcome in new)
        with self._files.writing(f"{len(self.done)} outcomes are in {self.folder} and stay"):
            self._files.append(text.encode())
        self.outcomes += new
        self.done.update(outcome.key for outcome in new)


def read_meta(folder: Path) -> dict[str, Any]:
    """The settings that all outcomes of a folder share; raises SimulationError."""
    try:
        return dict(json.loads((folder / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SimulationError(f"{folder} holds no simulation: no usable {META}") from error


def read_outcomes(folder: Path) -> tuple[dict[str, Any], list[SimulatedOutcome]]:
    """Settings and outcomes of a folder.

    Raises:
        SimulationError: it holds none, or a damaged line.
    """
    meta = read_meta(folder)
    found = list(_parse(folder / OUTCOMES)) if (folder / OUTCOMES).exists() else []
    if not found:
        raise SimulationError(f"{folder} holds no outcomes yet")
    return meta, found


def _parse(file: Path) -> Iterable[SimulatedOutcome]:
    known = {field.name for field in fields(SimulatedOutcome)}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(line)
            if set(value) != known:
                raise ValueError(f"members {', '.join(sorted(set(value) ^ known))}")
            yield SimulatedOutcome(**value)
        except (ValueError, TypeError) as error:
            raise SimulationError(
                f"{file} line {number} is damaged ({error}): remove the line, and run again"
            ) from error
