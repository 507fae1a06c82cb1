"""Questions that nobody asked, with traces as long as a language model's, right as often.

A trace's length is a quantile of those published for Qwen3-8B on AIME-25 (in `QUANTILES`). Which
quantile is a normal variable, part of which is the question's: hard questions have longer traces.
Whether the trace is right is another, which falls with both parts, so within a question shorter
traces are right more often. The three figures that say how much are chosen so that single traces,
majorities and lengths are as right, and rank as well, as published (see the constants).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from step_sglang.simulation.played import TAIL
from step_sglang.simulation.synthetic import RIGHT, Sampled

# Tokens of a trace by quantile, of Qwen3-8B on AIME-25.
QUANTILES = {
    0.01: 3_100, 0.10: 4_800, 0.25: 9_000, 0.50: 15_700, 0.75: 25_000, 0.90: 33_600, 0.99: 41_300,
}  # fmt: skip
_SHARED = 0.85  # of the variance of lengths (as normal quantiles), that is between questions
# A trace is right where a standard normal is below _EASE - _HARDER * q - _LONGER * t, with q and t
# the question's and the trace's part of the length. So two in three traces are right, four in five
# majorities, and the shorter of a right and a wrong trace is the right one in 70 of 100 cases.
_EASE, _HARDER, _LONGER = 1.15, 2.5, 0.45
_LEADING = 0.3  # chance of the most frequent wrong answer; of the next of those left, and so on
_FEWEST = TAIL + 1
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Question:
    """A question by its number, the same for every drawing of its traces."""

    seed: int
    number: int

    def traces(self, n: int, source: np.random.Generator) -> tuple[Sampled, ...]:
        """Draw n of its traces."""
        hard = float(np.random.default_rng([self.seed, self.number]).normal())
        own = source.normal(size=n)
        places = math.sqrt(_SHARED) * hard + math.sqrt(1 - _SHARED) * own
        lengths = lengths_at(np.asarray([_NORMAL.cdf(float(place)) for place in places]))
        right = source.normal(size=n) < _EASE - _HARDER * hard - _LONGER * own
        wrong = source.geometric(_LEADING, n)
        return tuple(
            Sampled(int(tokens), RIGHT if good else str(other))
            for tokens, good, other in zip(lengths, right, wrong, strict=True)
        )


def lengths_at(quantiles: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """[N] quantiles between 0 and 1 -> [N] tokens, between two published quantiles by ratio."""
    known = [_NORMAL.inv_cdf(q) for q in QUANTILES]
    logs = np.log(list(QUANTILES.values()))
    at = np.asarray([_NORMAL.inv_cdf(min(1 - 1e-9, max(1e-9, float(q)))) for q in quantiles])
    # Beyond the outermost, along the line through the last two: no more than a hundredth does.
    ends = ((0, 1), (-2, -1))
    slopes = [(logs[b] - logs[a]) / (known[b] - known[a]) for a, b in ends]
    found = np.interp(at, known, logs)
    found = np.where(at < known[0], logs[0] + slopes[0] * (at - known[0]), found)
    found = np.where(at > known[-1], logs[-1] + slopes[1] * (at - known[-1]), found)
    tokens: npt.NDArray[np.int64] = np.maximum(_FEWEST, np.exp(found)).astype(np.int64)
    return tokens
