"""Groups for a simulation: real or invented lengths and answers, with invented step scores.

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

# Qwen3-8B on AIME-25, as published with the replay store of AutoTTS (arXiv 2605.08083): tokens of a
# trace, by the share of all traces that are shorter. Ends are ours.
QUANTILES = (
    (0.0, 1_500), (0.01, 3_100), (0.10, 4_800), (0.25, 9_000), (0.50, 15_700), (0.75, 25_000),
    (0.90, 33_600), (0.99, 38_900), (1.0, 38_912),
)  # fmt: skip
# Of the same traces: how often one is right, and how often length alone ranks a right one first.
RIGHT_SHARE, LENGTH_AUC = 0.67, 0.71


@dataclass(frozen=True)
class Ranking:
    """How well the trace score ranks the traces of a question.

    ``auc``: the probability that a right trace stands above a wrong one, once the score is grown.
    ``grown``: tokens at which it is, as a share of the question's mean length; it grows from chance.
    0: it is from the first step on.
    """

    auc: float = 0.7
    grown: float = 0.5

    def __post_init__(self) -> None:
        if not 0.5 <= self.auc < 1:
            raise SimulationError(f"--auc is at least 0.5, which is chance, and below 1, not {self.auc}")
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
        limit: tokens at which a trace is cut.
        step: tokens of a step.
        source: of all that is random.
    """
    mean = sum(trace.tokens for trace in traces) / len(traces)

    def played(trace: Sampled) -> PlayedTrace:
        # From the end of the first step to the end of the thinking, before the answer.
        places = np.arange(step - 1, trace.tokens - TAIL, step, dtype=np.int64)
        right = trace.answer == RIGHT
        scores = step_scores(places, right, ranking.grown * mean, ranking.gap, source)
        return PlayedTrace(trace.tokens, trace.answer, places, scores, trace.tokens < limit)

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


def invented(questions: int, n: int, seed: int = 0) -> tuple[tuple[str, tuple[Sampled, ...]], ...]:
    """Questions with invented traces, whose lengths follow :data:`QUANTILES`.

    A question's traces are right with a probability from a beta distribution of mean
    :data:`RIGHT_SHARE`; wrong ones are longer, as :data:`LENGTH_AUC` says, and share few answers:
    the k-th wrong answer is as probable as 1 / k. Questions differ in length as much as the traces
    of one.
    """
    source = np.random.default_rng([seed, 7])
    shares, tokens = np.array(QUANTILES).T
    apart = math.sqrt(2) * _NORMAL.inv_cdf(LENGTH_AUC)
    found = []
    for number in range(questions):
        right = source.random(n) < source.beta(1.3, 1.3 * (1 - RIGHT_SHARE) / RIGHT_SHARE)
        difficulty = source.normal()
        within = source.normal(size=n) + apart * (~right - (1 - RIGHT_SHARE))
        spread = math.sqrt(2 + apart**2 * RIGHT_SHARE * (1 - RIGHT_SHARE))
        places = [_NORMAL.cdf(value) for value in (difficulty + within) / spread]
        lengths = np.interp(places, shares, tokens).astype(int)
        weights = 1 / np.arange(1, 21)
        wrong = source.choice(20, n, p=weights / weights.sum()) + 1
        traces = tuple(
            Sampled(int(length), RIGHT if is_right else str(other))
            for length, is_right, other in zip(lengths, right, wrong, strict=True)
        )
        found.append((str(number), traces))
    return tuple(found)


def drawn(
    traces: Sequence[Sampled], n: int, source: np.random.Generator
) -> tuple[Sampled, ...]:
    """n of a question's traces; where it has fewer, some occur more than once."""
    chosen = source.choice(len(traces), n, replace=n > len(traces))
    return tuple(traces[i] for i in chosen)
