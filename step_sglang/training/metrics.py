"""How well a signal ranks correct traces above wrong ones. Pure numbers: no files, no torch.

Every ranking figure comes in two forms. *Pooled* compares traces of all questions; a signal can do
well there just by recognising hard questions. *Within* compares a correct with a wrong trace of the
same question, the only comparison that pruning makes.

The bootstrap is our own: it resamples questions, and a pooled pair belongs to two of them, which
scipy's bootstrap of independent observations cannot say.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from step_sglang.training.table import Floats, Ints, TraceTable

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of a trace's own steps
RUNNING_MEAN = "running mean"
LOGPROB = "mean log-probability"
CONFIDENCE = "lowest group confidence"
LENGTH = "minus length"
SIGNALS = (RUNNING_MEAN, LOGPROB, CONFIDENCE, LENGTH)
RESAMPLES = 1000
FEW_QUESTIONS = 10  # below it no interval is worth its name
Bools = NDArray[np.bool_]


def few_questions(count: int, kind: str = "") -> str:
    """The warning that figures of so few questions, perhaps of a kind, come with."""
    return (
        f"measured on {count} question{'s' if count != 1 else ''}{kind}: far too few for a "
        f"percentage or an interval to mean anything; {FEW_QUESTIONS} are the least, 100 are good"
    )


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over questions; NaN where they are too few."""

    value: float
    low: float
    high: float

    def shown(self, form: str) -> str:
        """The figure, with its interval where it has one."""
        value = f"{self.value:{form}}"
        return value if np.isnan(self.low) else f"{value} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Ranking:
    """One signal at one fraction of the traces."""

    auc: Estimate  # pooled; ties count half
    auc_within: Estimate  # mean over the questions that have both kinds of traces
    pairs: Estimate  # share of all pairs strictly in the right order
    pairs_within: Estimate  # the same over the pairs of one question, all pairs alike
    auc_within_lead: Estimate | None  # the running mean's auc_within minus this signal's


def running_means(table: TraceTable, scores: Floats) -> Floats:
    """[S] mean of a trace's step scores up to and including each step.

    Equal scores have equal means, to the last bit: rounding must not decide who of two ranks first.
    So every trace is summed by itself, and wide enough that a sum of scores is exact.
    """
    means = np.empty(len(scores))
    for first, last in itertools.pairwise(table.offsets.tolist()):
        total = np.cumsum(scores[first:last], dtype=np.longdouble)
        means[first:last] = total / np.arange(1, last - first + 1)
    return means


def signals_at(table: TraceTable, scores: Floats, fraction: float) -> dict[str, Floats]:
    """Every signal at a fraction of each trace's own steps, [T]; NaN for a trace without steps.

    At 1.0 the log-probability, the confidence and the length are those of the whole trace, the
    answer included, while the running mean ends with the last step.
    """
    steps = table.num_steps
    has = steps > 0
    last = table.offsets[:-1] + np.ceil(fraction * steps).astype(np.int64) - 1

    def pick(values: NDArray[np.generic]) -> Floats:
        out = np.full(len(steps), np.nan)
        out[has] = values[last[has]]
        return out

    found = {RUNNING_MEAN: pick(running_means(table, scores))}
    if fraction < 1.0:
        found[LOGPROB] = pick(table.step_mean_logprob)
        found[CONFIDENCE] = pick(table.step_lowest_confidence)
        found[LENGTH] = -(pick(table.positions) + 1)
    else:
        found[LOGPROB] = np.where(has, table.mean_logprob, np.nan)
        found[CONFIDENCE] = np.where(has, table.lowest_confidence, np.nan)
        found[LENGTH] = np.where(has, -table.num_tokens, np.nan)
    return found


def rankings(
    table: TraceTable, scores: Floats, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[float, Ranking]]:
    """Rank with every signal at every fraction.

    Args:
        table: the traces.
        scores: [S] step scores.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        Per signal and fraction its ranking. Only traces that have steps take part; a signal that
        was not measured for all of them is left out. A figure of fewer than
        :data:`FEW_QUESTIONS` questions has no interval; within the question, of fewer that have
        both kinds of traces.
    """
    size = int(table.question.max(initial=-1)) + 1
    draws = np.random.default_rng(seed).integers(0, size, (resamples, size))
    counts = np.stack([np.bincount(draw, minlength=size) for draw in draws]).astype(np.float64)
    usable = table.num_steps > 0
    question, correct = table.question[usable], table.correct[usable]
    result: dict[str, dict[float, Ranking]] = {}
    for fraction in FRACTIONS:
        found = signals_at(table, scores, fraction)
        reference: Floats | None = None
        for name in SIGNALS:
            values = found[name][usable]
            if np.isnan(values).any() or not len(values):
                continue
            pairs = count_pairs(values, correct, question, size)
            half = pairs.wins + pairs.ties / 2
            per_question = _ratio(half.diagonal(), pairs.all.diagonal())  # [Q], NaN without a pair
            lead = None if reference is None else _mean_estimate(reference - per_question, counts)
            if name == RUNNING_MEAN:
                reference = per_question
            result.setdefault(name, {})[fraction] = Ranking(
                auc=_share_estimate(half, pairs.all, counts),
                auc_within=_mean_estimate(per_question, counts),
                pairs=_share_estimate(pairs.wins, pairs.all, counts),
                pairs_within=_share_estimate(
                    np.diag(pairs.wins.diagonal()), np.diag(pairs.all.diagonal()), counts
                ),
                auc_within_lead=lead,
            )
    return result


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a correct trace of question q and a wrong one of question p, counted [Q, Q]."""

    wins: Floats  # in the right order
    ties: Floats
    all: Floats


def count_pairs(values: Floats, correct: Bools, question: Ints, size: int) -> Pairs:
    """Count all pairs by the two questions they come from; the diagonal is within the question."""
    good, of = values[correct], question[correct]
    wins, ties = np.zeros((size, size)), np.zeros((size, size))
    for p in range(size):
        bad = np.sort(values[~correct & (question == p)])
        below, upto = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
        wins[:, p] = np.bincount(of, below, size)
        ties[:, p] = np.bincount(of, upto - below, size)
    bads = np.bincount(question[~correct], minlength=size)
    return Pairs(wins, ties, np.outer(np.bincount(of, minlength=size), bads).astype(np.float64))


def pair_counts(
    values: Floats, correct: Bools, question: Ints, size: int
) -> tuple[Floats, Floats, Floats]:
    """Pairs of a correct and a wrong trace of one question, counted per question, [Q] each.

    Returns:
        How many are in the right order, how many are tied, and how many there are.
    """
    wins, ties, pairs = np.zeros(size), np.zeros(size), np.zeros(size)
    order = np.argsort(question, kind="stable")
    ends = np.searchsorted(question[order], np.arange(size + 1))
    for q in range(size):
        rows = order[ends[q] : ends[q + 1]]
        good, bad = values[rows[correct[rows]]], np.sort(values[rows[~correct[rows]]])
        below = np.searchsorted(bad, good, "left").sum()
        wins[q], pairs[q] = below, len(good) * len(bad)
        ties[q] = np.searchsorted(bad, good, "right").sum() - below
    return wins, ties, pairs


def within_auc(values: Floats, correct: Bools, question: Ints) -> float:
    """Mean AUC over the questions that have both kinds; NaN without one."""
    size = int(question.max(initial=-1)) + 1
    wins, ties, pairs = pair_counts(values, correct, question, size)
    has = pairs > 0
    return float(((wins + ties / 2)[has] / pairs[has]).mean()) if has.any() else float("nan")


def auc(values: Floats, correct: Bools) -> float:
    """Area under the ROC curve, ties half; NaN with one class only."""
    return within_auc(values, correct, np.zeros(len(values), np.int64))


def _ratio(part: Floats, whole: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Floats = part / whole
    return ratio


def _share_estimate(part: Floats, whole: Floats, counts: Floats) -> Estimate:
    """Share of pairs under question weights [R, Q]: both questions of a pair are resampled."""
    shares = _ratio(((counts @ part) * counts).sum(1), ((counts @ whole) * counts).sum(1))
    taking_part = int((whole.any(0) | whole.any(1)).sum())
    return interval(float(_ratio(part.sum(), whole.sum())), shares, taking_part)


def _mean_estimate(per_question: Floats, counts: Floats) -> Estimate:
    has = ~np.isnan(per_question)
    values, weights = per_question[has], counts[:, has]
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"))
    with np.errstate(invalid="ignore"):
        resampled = weights @ values / weights.sum(1)
    return interval(float(values.mean()), resampled, len(values))


def interval(value: float, resampled: Floats, questions: int = FEW_QUESTIONS) -> Estimate:
    """A figure with the central 95 % of its resampled values, if it is one of enough questions."""
    finite = resampled[np.isfinite(resampled)]
    if not len(finite) or questions < FEW_QUESTIONS:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.percentile(finite, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Reliability:
    """How far scores are from frequencies. Bins of equal width; empty bins are left out."""

    predicted: tuple[float, ...]  # mean score per bin
    observed: tuple[float, ...]  # share of correct per bin
    count: tuple[int, ...]
    ece: float  # expected calibration error
    brier: float


def reliability(scores: Floats, correct: Bools, bins: int = 10) -> Reliability:
    """Reliability of scores in [0, 1] as probabilities of being correct."""
    index = np.minimum((scores * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    used = count > 0
    predicted = np.bincount(index, scores, bins)[used] / count[used]
    observed = np.bincount(index, correct, bins)[used] / count[used]
    gap = np.abs(predicted - observed) * count[used]
    return Reliability(
        tuple(predicted.tolist()),
        tuple(observed.tolist()),
        tuple(count[used].tolist()),
        float(gap.sum() / len(scores)) if len(scores) else float("nan"),
        float(np.mean((scores - correct) ** 2)) if len(scores) else float("nan"),
    )


def means_by_signal(
    found: Mapping[str, Mapping[float, Ranking]], fraction: float
) -> dict[str, float]:
    """The within-question AUC of every signal at one fraction."""
    return {name: at[fraction].auc_within.value for name, at in found.items()}
