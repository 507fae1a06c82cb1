"""Fits the probability that a trace is right to its trace score (Platt scaling)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from step_sglang.scoring.calibration import TraceCalibration, logit
from step_sglang.scoring.scorer import Scorer
from step_sglang.training.errors import TrainError
from step_sglang.training.evaluate import Scored, score
from step_sglang.training.fit import ScorerNetwork
from step_sglang.training.metrics import FEW_QUESTIONS, RUNNING_MEAN, signals_at
from step_sglang.training.reader import Reader

_RIDGE = 10.0  # inverse strength: all but none, so that separable traces have a finite slope


def fit_calibration(scored: Scored) -> TraceCalibration | None:
    """The logistic regression of the traces' labels on the logit of their scores.

    By traces that vote: one that was cut off has no answer that a probability could be of, and its
    label says nothing of those that have.

    Args:
        scored: traces of questions that the scorer was not trained on.

    Returns:
        None where they are of fewer than :data:`~step_sglang.training.metrics.FEW_QUESTIONS`
        questions: a calibration by so few is worse than none. A scorer whose scores rank wrongly
        gets slope 0, by which all traces weigh the same.
    """
    table = scored.table
    usable = table.voting
    correct = table.correct[usable]
    questions = len(np.unique(table.question[usable]))
    if questions < FEW_QUESTIONS or correct.all() or not correct.any():
        return None
    final = signals_at(table, scored.scores, 1.0)[RUNNING_MEAN][usable]
    logits = np.asarray([logit(score) for score in final.tolist()])
    model = LogisticRegression(C=_RIDGE)
    model.fit(logits[:, None], correct)
    slope, bias = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < 0:
        slope, bias = 0.0, logit(float(correct.mean()))
    return TraceCalibration(round(slope, 6), round(bias, 6), questions, len(correct))


def calibration_on(scorer: Scorer, store: Path) -> TraceCalibration:
    """Of an existing scorer, by all questions of a store.

    Raises:
        StoreError: the store is missing or damaged.
        TrainError: the traces are of another model, or can calibrate nothing.
    """
    reader = Reader(store)
    check_model(scorer, reader, "the scorer")
    found = fit_calibration(score(reader, reader.shards, ScorerNetwork.from_scorer(scorer)))
    if found is None:
        raise TrainError(
            f"{store} cannot calibrate a scorer: it takes {FEW_QUESTIONS} questions with steps, "
            "right traces and wrong ones"
        )
    return found


def check_model(scorer: Scorer, reader: Reader, name: object) -> None:
    """Raise TrainError unless the stored traces are of the model that the scorer is for."""
    meta = reader.meta
    if scorer.hidden_size != meta.hidden_size:
        raise TrainError(
            f"{name} reads hidden states of size {scorer.hidden_size} "
            f"(model {scorer.info.model}), but {reader.folder} holds {meta.hidden_size} "
            f"({meta.model})"
        )
    if scorer.info.model not in (None, meta.model):
        raise TrainError(
            f"{name} was trained for {scorer.info.model}, but the traces in "
            f"{reader.folder} are of {meta.model}: its scores would mean nothing there"
        )
