"""Statistics of methods that answered the same questions. Pure numbers.

The unit is the question: its repeats are averaged first, because answers to the same question are
not independent. Differences are paired by question. Intervals are percentile bootstraps over
questions; the p-value is that of a paired permutation test: the signs of the questions' differences
are flipped, and without a real difference all flips are equally likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import permutation_test

from step_sglang.training.metrics import Estimate, interval
from step_sglang.training.table import Floats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Mean:
    """A mean over questions and its standard error."""

    value: float
    error: float  # NaN for a single question


@dataclass(frozen=True)
class Paired:
    """One method against the reference on the same questions."""

    questions: int
    difference: Estimate  # of the means, method minus reference
    ratio: Estimate  # of the means, method over reference
    p_value: float  # two-sided


def mean_of(by_question: Mapping[str, Sequence[float]]) -> Mean:
    """Mean over questions of the mean over their repeats."""
    values = np.asarray([np.mean(repeats) for repeats in by_question.values()], np.float64)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return Mean(float(values.mean()), error)


def compare(
    method: Mapping[str, Sequence[float]],
    reference: Mapping[str, Sequence[float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Paired | None:
    """Compare values per question and repeat; questions that only one method answered are left out.

    Returns:
        The comparison, or None without a common question.
    """
    names = sorted(set(method) & set(reference))
    if not names:
        return None
    ours = np.asarray([np.mean(method[name]) for name in names], np.float64)
    theirs = np.asarray([np.mean(reference[name]) for name in names], np.float64)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(names), (resamples, len(names)))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = interval(
            float(ours.mean() / theirs.mean()), ours[draws].mean(1) / theirs[draws].mean(1)
        )
    gaps = ours - theirs
    difference = interval(float(gaps.mean()), gaps[draws].mean(1))
    return Paired(len(names), difference, ratio, permutation_p(gaps, rng, resamples))


def permutation_p(gaps: Floats, rng: np.random.Generator, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of a paired sign-flip test on the mean of ``gaps``.

    All flips are tried where they are no more than ``resamples``.
    """
    nonzero = gaps[gaps != 0]  # a zero has no sign to flip
    if len(nonzero) < 2:
        return 1.0  # its two flips are as far from zero
    test = permutation_test(
        (nonzero,), _distance, permutation_type="samples", vectorized=True,
        alternative="greater", n_resamples=resamples, rng=rng,
    )  # fmt: skip
    return float(test.pvalue)


def _distance(values: Floats, axis: int) -> Floats:
    """Of the mean from zero, on either side."""
    distance: Floats = np.abs(np.mean(values, axis=axis))
    return distance
