"""Groups for a simulation: recorded lengths and answers, with invented step scores.

The scores are as good as they are said to be, no better: how often the trace score ranks a right
trace above a wrong one of its question is stated, and so is how soon it gets there.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.played import TAIL, PlayedGroup, PlayedTrace

RIGHT = "0"  # the right answer of a question whose answers are numbered
_NORMAL = NormalDist()
_LEAST = 1e-3  # a step score's distance from 0 and 1


@dataclass(frozen=True)
class Ranking:
    """How well the trace score ranks the traces of a question.

    ``auc``: the probability that a right trace stands above a wrong one, once the score is grown.
    ``grown``: tokens at which it is, as a share of the question's mean length; until then it grows
    from chance. 0: it is grown from the first step on.
    """

    auc: float = 0.7
    grown: float = 0.5

    def __post_init__(self) -> None:
        if not 0.5 <= self.auc < 1:
            raise SimulationError(
                f"--auc is at least 0.5, which is chance, and below 1, not {self.auc}"
            )
        if not 0 <= self.grown <= 10:
            raise SimulationError(f"--grown is a share of the mean length, not {self.grown}")

    @property
    def gap(self) -> float:
        """Distance of the means of right and wrong traces, in standard deviations."""
        return math.sqrt(2) * _NORMAL.inv_cdf(self.auc)


@dataclass(frozen=True)
class Sampled:
    """Length and answer of a trace; None: it ended without one."""

    tokens: int
    answer: str | None


def step_scores(
    places: npt.NDArray[np.int64], right: bool, grown: float, gap: float, draw: np.random.Generator
) -> npt.NDArray[np.float32]:
    """[S] scores of the steps that end at ``places``, so that their running mean ranks as stated.

    The trace score at a place is the log-odds, as a probability, that the trace is right, to
    someone who sees ``w`` of a signal and noise for the rest: ``w`` grows from 0 to 1 at ``grown``
    tokens, and the signals of right and wrong traces are ``gap`` apart. Every step score is what
    the running mean needs to come to the next value, kept within 0 and 1.
    """
    signal, noise = draw.normal(gap if right else 0.0), draw.normal()
    w = np.ones(len(places)) if grown <= 0 else np.minimum(1.0, (places + 1) / grown)
    seen = w * signal + np.sqrt(1 - w**2) * noise
    apart = w * gap
    means = 1 / (1 + np.exp(-apart * (seen - apart / 2)))
    scores = np.empty(len(places), np.float64)
    total = 0.0
    for i, mean in enumerate(means):
        scores[i] = min(1 - _LEAST, max(_LEAST, mean * (i + 1) - total))
        total += scores[i]
    return scores.astype(np.float32)


def scored(
    question: str,
    draw: int,
    traces: Sequence[Sampled],
    ranking: Ranking,
    prompt_tokens: int,
    limit: int,
    step: int,
    source: np.random.Generator,
) -> PlayedGroup:
    """A group with invented scores.

    Args:
        question: its id.
        draw: the number of the drawing.
        traces: lengths and answers; the right answer is :data:`RIGHT`.
        ranking: of the scores.
        prompt_tokens: of the question.
        limit: tokens at which a trace is cut, and then has no answer.
        step: tokens of a step.
        source: of all that is random.
    """
    mean = sum(trace.tokens for trace in traces) / len(traces)

    def played(trace: Sampled) -> PlayedTrace:
        # From the end of the first step to the end of the thinking, before the answer.
        places = np.arange(step - 1, min(trace.tokens, limit) - TAIL, step, dtype=np.int64)
        right = trace.answer == RIGHT
        scores = step_scores(places, right, ranking.grown * mean, ranking.gap, source)
        ends = trace.tokens <= limit
        return PlayedTrace(
            min(trace.tokens, limit), trace.answer if ends else None, places, scores, ends
        )

    return PlayedGroup(question, draw, RIGHT, prompt_tokens, tuple(map(played, traces)))


def read_lengths(file: Path) -> tuple[tuple[str, tuple[Sampled, ...]], ...]:
    """Questions with the lengths and answers of their traces, from a gzipped JSON file.

    Its member ``questions`` is a list of objects with a list ``traces``; a trace is a list that
    begins with its number of tokens and its answer, a number: 0 is the right one, -1 none.

    Raises:
        SimulationError: the file is missing, damaged, or holds something else.
    """
    try:
        data = json.loads(gzip.decompress(file.read_bytes()))
        return tuple(
            (str(number), tuple(_sampled(trace) for trace in question["traces"]))
            for number, question in enumerate(data["questions"])
        )
    except FileNotFoundError as error:
        raise SimulationError(f"{file} does not exist") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SimulationError(f"{file} cannot be read as lengths and answers: {error}") from error


def _sampled(trace: Any) -> Sampled:
    tokens, answer = trace[0], trace[1]
    if type(tokens) is not int or type(answer) is not int or tokens < 1:
        raise ValueError(f"a trace begins with tokens and answer, not with {str(trace)[:40]}")
    return Sampled(tokens, None if answer < 0 else str(answer))


def drawn(traces: Sequence[Sampled], n: int, source: np.random.Generator) -> tuple[Sampled, ...]:
    """n of a question's traces; where it has fewer, some occur more than once."""
    chosen = source.choice(len(traces), n, replace=n > len(traces))
    return tuple(traces[i] for i in chosen)
