"""Fits the probability that a trace is right to its trace score (Platt scaling)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from step_sglang.scoring.calibration import ANSWERS, VOTE, TraceCalibration, logit
from step_sglang.scoring.locate import model_name, same_model
from step_sglang.scoring.scorer import Scorer
from step_sglang.training.errors import TrainError
from step_sglang.training.evaluate import Scored, score
from step_sglang.training.fit import ScorerNetwork
from step_sglang.training.metrics import FEW_QUESTIONS, RUNNING_MEAN, signals_at
from step_sglang.training.reader import Reader
from step_sglang.training.split import check_answers
from step_sglang.training.stored import StoreMeta
from step_sglang.training.trained_on import trained_on
from step_sglang.training.voted import labels_of

BY_VOTE = "the calibration is to the traces' own vote, not to true answers"
_RIDGE = 10.0  # inverse strength: all but none, so that separable traces have a finite slope


def fit_calibration(
    scored: Scored, labels: str = ANSWERS, held_out: bool = False
) -> TraceCalibration | None:
    """The logistic regression of the traces' labels on the logit of their scores.

    By traces that vote: one that was cut off has no answer that a probability could be of, and its
    label says nothing of those that have.

    Args:
        scored: traces of questions that the scorer was not trained on.
        labels: where theirs come from, for the file.
        held_out: that it was not is known, for the file.

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
    return TraceCalibration(
        round(slope, 6), round(bias, 6), questions, len(correct), labels, held_out
    )


def calibration_on(scorer: Scorer, store: Path) -> TraceCalibration:
    """Of an existing scorer, by all questions of a store.

    Raises:
        StoreError: the store is missing or damaged.
        TrainError: the traces are of another model, end their steps elsewhere, trained the scorer,
            or can calibrate nothing.
    """
    reader = Reader(store)
    check_model(scorer, reader, "the scorer")
    check_answers(reader, reader.shards, f"the questions in {store}")
    shared = trained_on(scorer.info.training, reader)
    if shared:
        raise TrainError(
            f"the scorer was trained on {shared} of the {len(reader.shards)} questions in {store}, "
            "on which it scores better than on others: calibrate on new questions"
        )
    found = fit_calibration(
        score(reader, reader.shards, ScorerNetwork.from_scorer(scorer)),
        labels_of(reader.meta).source,
        held_out=shared is not None,
    )
    if found is None:
        raise TrainError(
            f"{store} cannot calibrate a scorer: it takes {FEW_QUESTIONS} questions with traces "
            "that have steps and an answer, right ones and wrong ones"
        )
    return found


def doubts(scorer: Scorer, calibration: TraceCalibration, meta: StoreMeta) -> tuple[str, ...]:
    """What a reader must be warned of, in words, of a calibration by a store."""
    found = []
    if calibration.labels == VOTE:
        found.append(BY_VOTE)
    source = scorer.info.training.get("source")
    if not calibration.held_out and source is not None and source == meta.source:
        found.append(
            f"the scorer was trained on {source}, where these traces are from too, and its file "
            "does not say on which questions: if these are among them, the calibration trusts "
            "scores too much"
        )
    return tuple(found)


def check_model(scorer: Scorer, reader: Reader, name: object) -> None:
    """Raise TrainError unless the stored traces are what the scorer is for: its model, its steps.

    What a file does not state is not compared.
    """
    meta, info = reader.meta, scorer.info
    if scorer.hidden_size != meta.hidden_size:
        raise TrainError(
            f"{name} reads hidden states of size {scorer.hidden_size} "
            f"(model {info.model}), but {reader.folder} holds {meta.hidden_size} "
            f"({meta.model})"
        )
    if info.model is not None and not same_model(model_name(info.model), model_name(meta.model)):
        raise TrainError(
            f"{name} was trained for {info.model}, but the traces in "
            f"{reader.folder} are of {meta.model}: its scores would mean nothing there"
        )
    # A file of `train` without a think-end was trained on all steps; another does not say.
    think_end = info.think_end if info.think_end or info.training else meta.think_end
    check_steps(info.delimiters or meta.delimiters, think_end, str(name), reader)


def check_steps(
    delimiters: Sequence[str], think_end: str | None, name: str, reader: Reader
) -> None:
    """Raise TrainError unless a store's steps end where those of ``name`` do."""
    theirs = reader.meta
    if set(delimiters) != set(theirs.delimiters):
        raise TrainError(
            f"a step of {name} ends with {_texts(delimiters)}, one in {reader.folder} with "
            f"{_texts(theirs.delimiters)}: scores of one mean nothing for the other; collect with "
            + " ".join(f"--delimiter {text!r}" for text in delimiters)
        )
    if think_end != theirs.think_end:
        scope = "all" if think_end is None else "thinking"
        raise TrainError(
            f"the steps of {name} {_until(think_end)}, those in {reader.folder} "
            f"{_until(theirs.think_end)}: trace scores of one mean nothing for the other; "
            f"collect with --scope {scope}"
        )


def _texts(delimiters: Sequence[str]) -> str:
    return " or ".join(map(repr, delimiters))


def _until(think_end: str | None) -> str:
    return "go on to the trace's end" if think_end is None else f"stop at {think_end}"
