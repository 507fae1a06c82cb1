"""What a simulation plays: groups of lengths and answers from a file, a generator, or recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace, load_groups
from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.generator import Question
from step_sglang.simulation.played import TAIL, PlayedGroup, PlayedTrace
from step_sglang.simulation.synthetic import Ranking, Sampled, drawn, read_lengths, scored

GENERATED = "generator"


@dataclass(frozen=True)
class Invention:
    """What is made up where it is not recorded."""

    grown: float = 0.5  # of a question's mean length, at which the scores rank as they are said to
    prompt_tokens: int = 150
    max_new_tokens: int = 38_912  # a trace is cut there; what the recorded ones of AIME-25 had
    step_tokens: int = 128
    seed: int = 0


class Source(Protocol):
    """Questions, and drawings of their traces."""

    @property
    def questions(self) -> int:
        """How many."""
        ...

    @property
    def most(self) -> int:
        """Traces of a group at most."""
        ...

    @property
    def room(self) -> int:
        """KV tokens of the longest trace, with its prompt."""
        ...

    @property
    def limit(self) -> int:
        """Tokens that a trace may have."""
        ...

    @property
    def label(self) -> str:
        """What it is, for tables and the folder's settings."""
        ...

    @property
    def invents(self) -> bool:
        """Whether its scores are invented."""
        ...

    def group(self, number: int, draw: int, n: int, auc: float | None) -> PlayedGroup:
        """Draw n traces of a question; ``auc``: of their scores, where these are invented."""
        ...


@dataclass(frozen=True)
class LengthFile:
    """Recorded lengths and answers, see :func:`read_lengths`, with invented scores."""

    path: Path
    invention: Invention

    @cached_property
    def _read(self) -> tuple[tuple[str, tuple[Sampled, ...]], ...]:
        return read_lengths(self.path)

    @property
    def questions(self) -> int:
        """How many."""
        return len(self._read)

    @property
    def most(self) -> int:
        """A file's traces may be drawn more than once."""
        return 1 << 20

    @property
    def limit(self) -> int:
        """Tokens at which traces are cut."""
        return self.invention.max_new_tokens

    @property
    def room(self) -> int:
        """KV tokens of the longest trace, with its prompt."""
        longest = max(trace.tokens for _, traces in self._read for trace in traces)
        return min(longest, self.limit) + self.invention.prompt_tokens

    @property
    def label(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def invents(self) -> bool:
        """It has no scores."""
        return True

    def group(self, number: int, draw: int, n: int, auc: float | None) -> PlayedGroup:
        """Draw n traces of a question, and their scores."""
        source = np.random.default_rng([self.invention.seed, number, draw])
        name, traces = self._read[number]
        return _scored(name, draw, drawn(traces, n, source), self.invention, auc, source)


@dataclass(frozen=True)
class Generated:
    """Questions of the generator, with invented scores."""

    count: int
    invention: Invention

    @property
    def questions(self) -> int:
        """How many."""
        return self.count

    @property
    def most(self) -> int:
        """As many as one likes."""
        return 1 << 20

    @property
    def limit(self) -> int:
        """Tokens at which traces are cut."""
        return self.invention.max_new_tokens

    @property
    def room(self) -> int:
        """KV tokens of a trace as long as one may be, with its prompt."""
        return self.limit + self.invention.prompt_tokens

    @property
    def label(self) -> str:
        """What the lengths are of."""
        return GENERATED

    @property
    def invents(self) -> bool:
        """It has no scores."""
        return True

    def group(self, number: int, draw: int, n: int, auc: float | None) -> PlayedGroup:
        """Draw n traces of a question, and their scores."""
        source = np.random.default_rng([self.invention.seed, number, draw])
        traces = Question(self.invention.seed, number).traces(n, source)
        return _scored(str(number), draw, traces, self.invention, auc, source)


@dataclass(frozen=True)
class Recorded:
    """Groups of `bench --record`, with their own scores."""

    folders: tuple[Path, ...]
    seed: int = 0

    @cached_property
    def _read(self) -> tuple[RecordedGroup, ...]:
        whole = tuple(group for group in load_groups(self.folders) if group.whole)
        if not whole:
            raise SimulationError(
                f"{self.folders[0]} has no group whose traces all ended by themselves: record with "
                "a larger pool"
            )
        return whole

    @property
    def groups(self) -> tuple[RecordedGroup, ...]:
        """Those whose traces all ended by themselves."""
        return self._read

    @property
    def questions(self) -> int:
        """How many groups."""
        return len(self._read)

    @property
    def most(self) -> int:
        """Traces that the smallest group has."""
        return min(len(group.traces) for group in self._read)

    @property
    def limit(self) -> int:
        """Tokens that each trace could have had."""
        return max(group.max_new_tokens for group in self._read)

    @property
    def room(self) -> int:
        """KV tokens of the longest trace, with its prompt."""
        return max(g.prompt_tokens + t.tokens for g in self._read for t in g.traces)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the groups, each its own: also of groups of a question that differ in size alone."""
        times = Counter((group.question, group.repeat) for group in self._read)
        return tuple(
            group.question
            + (f"/{group.repeat}" if group.repeat else "")
            + (f" of {len(group.traces)}" if times[group.question, group.repeat] > 1 else "")
            for group in self._read
        )

    @property
    def label(self) -> str:
        """Where they were recorded."""
        return ", ".join(folder.name for folder in self.folders)

    @property
    def invents(self) -> bool:
        """They are recorded."""
        return False

    def group(self, number: int, draw: int, n: int, auc: float | None) -> PlayedGroup:
        """Draw n traces of a group; all of them are in their order."""
        group = self._read[number]
        source = np.random.default_rng([self.seed, number, draw])
        chosen = sorted(source.choice(len(group.traces), n, replace=False))
        traces = tuple(_played(group.traces[i], group.gold, group.max_new_tokens) for i in chosen)
        return PlayedGroup(
            self.names[number], draw, group.gold, group.prompt_tokens, traces, group.calibration
        )


def _scored(
    name: str,
    draw: int,
    traces: Sequence[Sampled],
    invention: Invention,
    auc: float | None,
    source: np.random.Generator,
) -> PlayedGroup:
    assert auc is not None, "invented scores are as good as they are said to be"
    ranking = Ranking(auc, invention.grown)
    return scored(
        name, draw, traces, ranking, invention.prompt_tokens, invention.max_new_tokens,
        invention.step_tokens, source,
    )  # fmt: skip


def _played(trace: RecordedTrace, gold: str, limit: int) -> PlayedTrace:
    """A recorded trace. Right answers are spelled alike, as the gold one is."""
    positions = np.asarray(trace.positions, np.int64)
    scores = np.asarray(trace.step_scores, np.float32)
    ends = trace.tokens < limit
    kept = positions < (trace.tokens - TAIL if ends else trace.tokens)
    answer = gold if trace.correct else trace.answer
    return PlayedTrace(trace.tokens, answer, positions[kept], scores[kept], ends)


def as_recorded(group: PlayedGroup, limit: int) -> RecordedGroup:
    """The group as the model of the scheduler takes it; ``limit``: tokens that a trace may have."""
    traces = tuple(
        RecordedTrace(
            fate="finished",
            answer=trace.answer,
            correct=trace.answer == group.gold,
            score=float(trace.scores.mean()) if len(trace.scores) else None,
            times=range(trace.tokens),
            confidences=(),
            positions=tuple(trace.positions.tolist()),
            step_scores=tuple(trace.scores.tolist()),
            text="",
        )
        for trace in group.traces
    )
    return RecordedGroup(
        group.question, group.draw, group.gold, group.prompt_tokens, limit, 0.0, traces,
        group.calibration,
    )  # fmt: skip
