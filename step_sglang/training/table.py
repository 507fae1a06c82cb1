"""The traces of some questions as flat arrays, the input of the metrics. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from step_sglang.training.stored import StoredTrace
from step_sglang.voting.classes import numbered
from step_sglang.voting.verifier import AnswerVerifier

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A model wrote the answers: comparing some of them would never end. Starts nothing unless asked.
_verifier = AnswerVerifier()


@dataclass(frozen=True, eq=False)
class TraceTable:
    """T traces with S steps in all, traces of a question next to each other."""

    question: Ints  # [T] 0, 1, 2, ...
    correct: NDArray[np.bool_]  # [T]
    answer: Ints  # [T] class of equivalent answers within the question, -1 = none
    num_tokens: Ints  # [T]
    mean_logprob: Floats  # [T] over the whole trace
    lowest_confidence: Floats  # [T] over the whole trace, NaN = not measured
    offsets: Ints  # [T + 1] steps of trace t are offsets[t] to offsets[t + 1]
    positions: Ints  # [S]
    step_mean_logprob: Floats  # [S]
    step_lowest_confidence: Floats  # [S]

    @property
    def num_steps(self) -> Ints:
        """[T] steps per trace."""
        return np.diff(self.offsets)

    @property
    def voting(self) -> NDArray[np.bool_]:
        """[T] traces with a score and an answer: a vote weighs them by a calibration, no others."""
        found: NDArray[np.bool_] = (self.num_steps > 0) & (self.answer >= 0)
        return found

    @property
    def step_trace(self) -> Ints:
        """[S] the trace of each step."""
        return np.repeat(np.arange(len(self.question)), self.num_steps)


def build_table(questions: Sequence[Sequence[StoredTrace]]) -> TraceTable:
    """Flatten traces, one inner sequence per question, keeping their order."""
    traces = [trace for theirs in questions for trace in theirs]
    sizes = [len(theirs) for theirs in questions]

    def steps(name: str) -> Floats:
        parts = [np.asarray(getattr(r.steps, name), np.float64) for r in traces]
        return np.concatenate([*parts, np.zeros(0)])

    def finals(name: str) -> Floats:
        return np.asarray([_nan(getattr(r, name)) for r in traces], np.float64)

    return TraceTable(
        question=np.repeat(np.arange(len(sizes)), sizes),
        correct=np.asarray([r.correct for r in traces], bool),
        answer=np.concatenate(
            [np.zeros(0, np.int64), *(answer_classes([r.extracted for r in q]) for q in questions)]
        ),
        num_tokens=np.asarray([r.num_tokens for r in traces], np.int64),
        mean_logprob=finals("mean_logprob"),
        lowest_confidence=finals("lowest_confidence"),
        offsets=np.concatenate([[0], np.cumsum([r.num_steps for r in traces])]).astype(np.int64),
        positions=steps("positions").astype(np.int64),
        step_mean_logprob=steps("mean_logprob"),
        step_lowest_confidence=steps("lowest_confidence"),
    )


def answer_classes(answers: Sequence[str | None]) -> Ints:
    """Number equivalent answers alike, in order of first appearance; -1 for none.

    What takes longer than a vote's limits allow compares as text, as it does in a vote.
    """
    return np.asarray(_verifier.comparison().run(numbered(answers)), np.int64)


def _nan(value: float | None) -> float:
    return np.nan if value is None else value
