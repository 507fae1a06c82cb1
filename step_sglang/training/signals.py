"""Trace signals at a moment, and how well they rank the traces of one question then.

A *moment* says how far each trace is. Two kinds matter: a fraction of the trace's own steps (as in
every ranking table; there the length so far is a share of the final one, which no engine knows),
and the same number of tokens for all traces of a question, as when memory gets short and all began
together (there the length so far says nothing, and traces that ended are no candidates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from step_sglang.scoring.certainty import Certainty
from step_sglang.training.metrics import RESAMPLES, Bools, Estimate, interval, running_means
from step_sglang.training.reader import Reader
from step_sglang.training.table import Floats, Ints, TraceTable

SIMILAR = 0.1  # lengths that differ by at most this share of the longer one are similar
_PROBABILITY = 1e-6  # scores are kept so far from 0 and 1 before their logit is taken


@dataclass(frozen=True, eq=False)
class CutPoint:
    """Where each trace is: the row of its last step, and whether it takes part."""

    name: str
    row: Ints  # [T] into the step arrays; any value where `present` is False
    present: Bools  # [T]
    length: Floats  # [T] tokens so far

    def pick(self, steps: Floats) -> Floats:
        """[T] of [S]."""
        return np.where(self.present, steps[np.where(self.present, self.row, 0)], np.nan)


def own_fraction(table: TraceTable, fraction: float) -> CutPoint:
    """Every trace after a fraction of its own steps."""
    present = table.num_steps > 0
    row = table.offsets[:-1] + np.ceil(fraction * table.num_steps).astype(np.int64) - 1
    length = np.where(present, table.positions[np.where(present, row, 0)] + 1.0, np.nan)
    return CutPoint(f"{fraction:.0%}", row, present, length)


def same_tokens(table: TraceTable, fraction: float) -> CutPoint:
    """Every trace that still runs after a fraction of its question's mean length."""
    size = int(table.question.max(initial=-1)) + 1
    count = np.maximum(np.bincount(table.question, minlength=size), 1)
    mean = np.bincount(table.question, table.num_tokens, size) / count
    at = fraction * mean[table.question]
    owner = table.step_trace
    known = np.bincount(owner, table.positions < at[owner], len(at)).astype(np.int64)
    row = table.offsets[:-1] + known - 1
    return CutPoint(
        f"{fraction:.0%} of the mean length", row, (known > 0) & (table.num_tokens > at), at
    )


def running_signals(table: TraceTable, scores: Floats) -> dict[str, Floats]:
    """Closed-form running statistics of step scores, [S] each, higher is better."""
    first = np.repeat(table.offsets[:-1], table.num_steps)
    here = np.arange(len(scores))
    number = here - first + 1
    clipped = np.clip(scores, _PROBABILITY, 1 - _PROBABILITY)
    logits = np.log(clipped / (1 - clipped))
    return {
        "mean": running_means(table, scores),
        "mean of logits": running_means(table, logits),
        "last": scores,
        "exponential mean, half of 2 steps": _exponential(table, scores, 2.0),
        "exponential mean, half of 6 steps": _exponential(table, scores, 6.0),
        "mean of the last 4": _windowed(scores, number, 4),
        "minimum": _accumulated(table, scores, np.minimum),
    }


def _windowed(scores: Floats, number: Ints, size: int) -> Floats:
    total = np.concatenate([[0.0], np.cumsum(scores)])
    here = np.arange(len(scores))
    width = np.minimum(number, size)
    found: Floats = (total[here + 1] - total[here + 1 - width]) / width
    return found


def _exponential(table: TraceTable, scores: Floats, half: float) -> Floats:
    """The weighted mean in which a step weighs half of the one ``half`` steps later."""
    keep = 0.5 ** (1 / half)
    out = np.empty(len(scores))
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        value = weight = 0.0
        for i in range(start, end):
            value, weight = keep * value + scores[i], keep * weight + 1
            out[i] = value / weight
    return out


def _accumulated(table: TraceTable, scores: Floats, function: np.ufunc) -> Floats:
    out = np.empty(len(scores))
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        out[start:end] = function.accumulate(scores[start:end])
    return out


def certainty_scores(reader: Reader, shards: Sequence[int]) -> Floats | None:
    """[S] step scores of a server without a scorer, as :mod:`step_sglang.scoring.certainty` has
    them; None where the store lacks `bench/reasoner_store.py`'s statistics of every token.
    """
    found: list[float] = []
    for shard in shards:
        file = reader.folder / "tokens" / f"{reader.traces(shard)[0].question_id}.npz"
        if not file.exists():
            return None
        with np.load(file) as stored:
            for i, trace in enumerate(reader.traces(shard)):
                certainty, start = Certainty(), 0
                confidences = (-stored[str(i)][:, 1].astype(np.float64)).tolist()
                for end in trace.steps.positions.tolist():
                    for confidence in confidences[start : end + 1]:
                        certainty.add(confidence)
                    found.append(certainty.end_step() or 0.0)
                    start = end + 1
    return np.asarray(found)


def mean_estimate(values: Floats, seed: int = 0) -> Estimate:
    """The mean over questions, [Q] with NaN for those left out, and its bootstrap interval."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"))
    draws = np.random.default_rng(seed).integers(0, len(known), (2 * RESAMPLES, len(known)))
    return interval(float(known.mean()), known[draws].mean(1))


def auc_by_question(
    table: TraceTable, moment: CutPoint, values: Floats, similar: float | None = None
) -> Floats:
    """[Q] AUC within each question at a moment; NaN where no pair is left.

    Args:
        table: the traces.
        moment: where they are.
        values: [T], higher is better.
        similar: count only pairs whose lengths at the moment differ by at most this share of the
            longer one: how well the signal ranks *given* the length.
    """
    size = int(table.question.max(initial=-1)) + 1
    usable = moment.present & ~np.isnan(values)
    out = np.full(size, np.nan)
    order = np.argsort(table.question, kind="stable")
    ends = np.searchsorted(table.question[order], np.arange(size + 1))
    for q in range(size):
        rows = order[ends[q] : ends[q + 1]]
        rows = rows[usable[rows]]
        good, bad = rows[table.correct[rows]], rows[~table.correct[rows]]
        difference = values[good][:, None] - values[bad][None]
        wins = (difference > 0) + 0.5 * (difference == 0)
        allowed: NDArray[np.bool_] = np.ones(wins.shape, bool)
        if similar is not None:
            ours, theirs = moment.length[good][:, None], moment.length[bad][None]
            allowed = np.abs(ours - theirs) <= similar * np.maximum(ours, theirs)
        if allowed.any():
            out[q] = wins[allowed].mean()
    return out
