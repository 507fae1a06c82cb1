"""Every figure of a scorer on a set of questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.training.data import build_labels, score_steps
from step_sglang.training.metrics import (
    RUNNING_MEAN,
    Ranking,
    Reliability,
    auc,
    rankings,
    reliability,
    signals_at,
)
from step_sglang.training.reader import Reader
from step_sglang.training.simulate import VoteSimulation, simulate_votes
from step_sglang.training.table import Floats, TraceTable


@dataclass(frozen=True)
class Evaluation:
    """Figures on one set of questions; ``asdict`` makes JSON of it."""

    questions: int
    mixed_questions: int  # those with both a correct and a wrong trace that has steps
    traces: int
    traces_without_steps: int  # left out of rankings
    steps: int
    accuracy: float  # of a single trace
    step_auc: float
    ranking: Mapping[str, Mapping[float, Ranking]]
    step_calibration: Reliability
    trace_calibration: Reliability  # of the running mean at the end; traces with an answer
    weight_calibration: (
        Reliability | None
    )  # of the probabilities that it is calibrated to; likewise
    votes: Mapping[str, VoteSimulation]


@dataclass(frozen=True, eq=False)
class Scored:
    """Traces with their step scores."""

    table: TraceTable
    scores: Floats  # [S]


def score(reader: Reader, shards: Sequence[int], network: torch.nn.Module) -> Scored:
    """Score the steps of some shards."""
    return Scored(build_labels(reader, shards), score_steps(reader, shards, network))


def evaluate(
    scored: Scored, seed: int = 0, calibration: TraceCalibration | None = None
) -> Evaluation:
    """Every figure of already scored traces; some of them need the scorer's calibration."""
    table, scores = scored.table, scored.scores
    has = table.num_steps > 0
    final = signals_at(table, scores, 1.0)[RUNNING_MEAN][table.voting]
    voted = table.correct[table.voting]
    kinds: dict[int, set[bool]] = {}
    for question, correct in zip(table.question[has], table.correct[has], strict=True):
        kinds.setdefault(int(question), set()).add(bool(correct))
    label = table.correct[table.step_trace]
    return Evaluation(
        questions=len(np.unique(table.question)),
        mixed_questions=sum(len(kind) == 2 for kind in kinds.values()),
        traces=len(table.question),
        traces_without_steps=int((~has).sum()),
        steps=len(scores),
        accuracy=float(table.correct.mean()),
        step_auc=auc(scores, label),
        ranking=rankings(table, scores, seed),
        step_calibration=reliability(scores, label),
        trace_calibration=reliability(final, voted),
        weight_calibration=(
            None
            if calibration is None
            else reliability(
                np.asarray([calibration.probability(score) for score in final.tolist()]),
                voted,
            )
        ),
        votes=simulate_votes(table, scores, seed, calibration=calibration),
    )
