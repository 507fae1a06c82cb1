"""Votes on collected traces, with and without pruning the worse half halfway.

Selects traces only: no engine, no memory model, no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.training.metrics import RESAMPLES, RUNNING_MEAN, Estimate, interval, signals_at
from step_sglang.training.table import Floats, Ints, TraceTable

HALFWAY = 0.5
_RANDOM_DRAWS = 20


@dataclass(frozen=True)
class VoteSimulation:
    """Accuracy of one way to vote, over questions."""

    accuracy: Estimate
    lead: Estimate  # minus self-consistency (majority of all traces), same questions
    kept_accuracy: float  # share of correct traces among those kept


def simulate_votes(
    table: TraceTable,
    scores: Floats,
    seed: int = 0,
    resamples: int = RESAMPLES,
    calibration: TraceCalibration | None = None,
) -> dict[str, VoteSimulation]:
    """Compare votes: majority, score-weighted, and score-weighted after pruning by each signal.

    With a calibration also the vote by odds, of all and after pruning by the trace score.

    Weights are the running mean at the end of each trace. In every question the half with the
    lower signal after half of its own steps is pruned; a trace without a value ranks as its
    question's mean. The random half is the mean of several draws.
    """
    size = int(table.question.max(initial=-1)) + 1
    members = [np.flatnonzero(table.question == q) for q in range(size)]
    rng = np.random.default_rng(seed)
    weights = _filled(signals_at(table, scores, 1.0)[RUNNING_MEAN], members)
    ones = np.ones(len(weights))
    everyone = np.asarray([_vote(table, rows, ones) for rows in members], np.float64)
    results = {
        "self-consistency": (everyone, [rows for rows in members]),
        "score-weighted": (
            np.asarray([_vote(table, rows, weights) for rows in members], np.float64),
            members,
        ),
    }
    odds = None
    if calibration is not None:
        odds = np.asarray([calibration.weight(score) for score in weights.tolist()])
        right = np.asarray([_vote(table, rows, odds) for rows in members], np.float64)
        results["calibrated"] = (right, members)
    for name, values in signals_at(table, scores, HALFWAY).items():
        if np.isnan(values).all():
            continue
        filled = _filled(values, members)
        kept = [_better_half(rows, filled) for rows in members]
        right = np.asarray([_vote(table, rows, weights) for rows in kept], np.float64)
        results[f"half pruned by {name}"] = (right, kept)
        if name == RUNNING_MEAN and odds is not None:
            right = np.asarray([_vote(table, rows, odds) for rows in kept], np.float64)
            results[f"half pruned by {name}, calibrated"] = (right, kept)
    draws = [[rng.permutation(rows) for rows in members] for _ in range(_RANDOM_DRAWS)]
    halves = [[rows[: -(-len(rows) // 2)] for rows in draw] for draw in draws]
    right = np.mean([[_vote(table, rows, weights) for rows in draw] for draw in halves], axis=0)
    results["half pruned at random"] = (right, [rows for draw in halves for rows in draw])
    samples = rng.integers(0, size, (resamples, size))
    return {
        name: VoteSimulation(
            interval(float(right.mean()), right[samples].mean(1), size),
            interval(float((right - everyone).mean()), (right - everyone)[samples].mean(1), size),
            float(np.mean([table.correct[rows].mean() for rows in kept])),
        )
        for name, (right, kept) in results.items()
    }


def _filled(values: Floats, members: list[Ints]) -> Floats:
    filled = values.copy()
    for rows in members:
        theirs = values[rows]
        known = theirs[~np.isnan(theirs)]
        filled[rows] = np.where(np.isnan(theirs), known.mean() if len(known) else 0.5, theirs)
    return filled


def _better_half(rows: Ints, values: Floats) -> Ints:
    kept: Ints = np.sort(rows[np.argsort(-values[rows], kind="stable")][: -(-len(rows) // 2)])
    return kept


def _vote(table: TraceTable, rows: Ints, weights: Floats) -> bool:
    voters = rows[table.answer[rows] >= 0]
    if not len(voters):
        return False
    totals = np.bincount(table.answer[voters], weights[voters])
    # The first member of the winning class speaks for it: equivalent answers are right alike.
    winner = voters[table.answer[voters] == totals.argmax()][0]
    return bool(table.correct[winner])
