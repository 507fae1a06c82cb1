"""From a trace score to a probability: the file, the fit, and what votes make of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.errors import ScorerError
from step_sglang.reasoner import scorer_path
from step_sglang.scoring.calibration import (
    TraceCalibration,
    calibration_from_json,
    calibration_of,
    logit,
)
from step_sglang.scoring.scorer import load_scorer, save_scorer
from step_sglang.training.calibrate import fit_calibration
from step_sglang.training.card import card_text
from step_sglang.training.evaluate import Scored, evaluate
from step_sglang.training.table import TraceTable
from step_sglang.voting.session import VoteRules, VoteSession
from step_sglang.voting.tally import weight_of

CALIBRATION = TraceCalibration(2.2, -0.9, 30, 960)


@given(st.floats(0, 50), st.floats(-50, 50), st.lists(st.floats(0, 1), min_size=2))
def test_a_probability_never_falls_with_the_score(
    slope: float, bias: float, scores: list[float]
) -> None:
    found = TraceCalibration(slope, bias)
    for value_of in (found.probability, found.weight):
        values = [value_of(score) for score in sorted(scores)]
        assert all(0 <= value <= 1 for value in values)
        assert all(one <= other for one, other in itertools.pairwise(values))


def test_what_a_trace_weighs() -> None:
    assert CALIBRATION.probability(0.5) == pytest.approx(1 / (1 + np.exp(0.9)))
    plain = TraceCalibration(1.0, 0.0)  # the score is the probability
    odds = [plain.weight(score) for score in (0.5, 0.75, 0.9, 0.99)]
    assert odds == pytest.approx([1 / 9, 3 / 9, 1, 1])
    assert weight_of(0.8, "calibrated", CALIBRATION) == CALIBRATION.weight(0.8)
    assert weight_of(None, "calibrated", CALIBRATION) == CALIBRATION.weight(0.5)
    assert weight_of(0.8, "calibrated") == 0.8  # a file of an earlier version
    assert weight_of(0.8, "weighted", CALIBRATION) == 0.8
    assert weight_of(0.8, "majority", CALIBRATION) == 1.0


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"version": 2, "slope": 1.0, "bias": 0.0}, "version 2"),
        ({"version": 1, "slope": -1.0, "bias": 0.0}, "negative"),
        ({"version": 1, "slope": 1.0}, "bias must be a finite number"),
        ({"version": 1, "slope": float("nan"), "bias": 0.0}, "slope must be a finite number"),
        ({"version": 1, "slope": True, "bias": 0.0}, "slope must be a finite number"),
        ({"version": 1, "slope": 1.0, "bias": 0.0, "traces": -1}, "counts"),
        ([1.0, 0.0], "version"),
    ],
)
def test_a_bad_calibration_is_refused_with_its_file(
    value: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ScorerError, match=problem):
        calibration_from_json(value)
    scorer = load_scorer(scorer_path())
    tensors = {name: getattr(scorer, name) for name in ("w1", "b1", "w2", "b2")}
    metadata = {
        "format": "step-sglang-scorer", "version": "1", "calibration": json.dumps(value),
    }  # fmt: skip
    file = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(ScorerError, match=f"{file.name}.*{problem}"):
        load_scorer(file)


def test_a_file_keeps_its_calibration_and_an_old_one_has_none(tmp_path: Path) -> None:
    scorer = load_scorer(scorer_path())
    file = tmp_path / "scorer.safetensors"
    save_scorer(replace(scorer, info=replace(scorer.info, calibration=CALIBRATION)), file)
    again = load_scorer(file)
    assert again.info.calibration == CALIBRATION
    assert torch.equal(again.w1, scorer.w1)
    assert "sigmoid(2.2 logit(trace score) - 0.9), fitted on 30" in card_text(again)
    save_scorer(replace(scorer, info=replace(scorer.info, calibration=None)), file)
    assert load_scorer(file).info.calibration is None
    assert "votes weigh by trace score" in card_text(load_scorer(file))


def scored(slope: float, bias: float, questions: int = 40, seed: int = 0) -> Scored:
    """Traces of one step, right with the probability that such a calibration gives."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.1, 0.9, 50 * questions)
    chance = 1 / (1 + np.exp(-slope * np.asarray([logit(s) for s in scores]) - bias))
    ones, size = np.ones(len(scores)), len(scores)
    table = TraceTable(
        question=np.repeat(np.arange(questions), 50),
        correct=rng.random(size) < chance,
        answer=np.zeros(size, np.int64),
        num_tokens=np.full(size, 20),
        mean_logprob=ones,
        lowest_confidence=ones,
        offsets=np.arange(size + 1),
        positions=np.full(size, 9),
        step_mean_logprob=ones,
        step_lowest_confidence=ones,
    )
    return Scored(table, scores)


@pytest.mark.parametrize(("slope", "bias"), [(2.0, -1.0), (0.7, 0.5), (1.0, 0.0)])
def test_the_fit_finds_what_was_planted(slope: float, bias: float) -> None:
    found = fit_calibration(scored(slope, bias))
    assert found is not None and (found.questions, found.traces) == (40, 2000)
    assert found.slope == pytest.approx(slope, abs=0.2)
    assert found.bias == pytest.approx(bias, abs=0.2)


def test_a_scorer_that_ranks_wrongly_makes_all_traces_equal() -> None:
    found = fit_calibration(scored(-2.0, 0.0))
    assert found is not None and found.slope == 0
    assert found.probability(0.1) == found.probability(0.9) == pytest.approx(0.5, abs=0.05)


def test_too_few_questions_fit_nothing() -> None:
    assert fit_calibration(scored(2.0, 0.0, questions=9)) is None


def cut_off(found: Scored, share: float) -> Scored:
    """Some of the traces end at the limit: no answer, labelled wrong, whatever they score."""
    table = found.table
    cut = np.random.default_rng(1).random(len(table.answer)) < share
    answer, correct = np.where(cut, -1, table.answer), table.correct & ~cut
    return Scored(replace(table, answer=answer, correct=correct), found.scores)


def test_traces_that_were_cut_off_do_not_change_it() -> None:
    """They never vote, so what they say of a finished trace's chance is wrong."""
    whole = scored(2.0, -0.5)
    found, cut = fit_calibration(whole), fit_calibration(cut_off(whole, 0.5))
    assert found is not None and cut is not None and 900 < cut.traces < 1100
    assert cut.slope == pytest.approx(found.slope, abs=0.2)
    assert cut.bias == pytest.approx(found.bias, abs=0.2)
    for one, other in ((whole, found), (cut_off(whole, 0.5), cut)):
        figures = evaluate(one, calibration=other)
        assert figures.weight_calibration is not None
        assert figures.weight_calibration.ece < 0.05
        assert sum(figures.weight_calibration.count) == other.traces
        assert sum(figures.trace_calibration.count) == other.traces
    nobody = evaluate(cut_off(whole, 1.0), calibration=found)
    assert nobody.weight_calibration is not None and np.isnan(nobody.weight_calibration.ece)
    assert fit_calibration(cut_off(whole, 1.0)) is None


def chunk(index: int, text: str, score: float, pair: list[float] | None) -> dict[str, Any]:
    step = {"group": "q", "score": score, "num_steps": 3, "pruned": False}
    if pair is not None:
        step["calibration"] = pair
    info = {"id": str(index), "finish_reason": {"type": "stop"}, "step": step}
    return {"index": index, "text": text, "output_ids": [], "meta_info": info}


@pytest.mark.parametrize(
    ("vote", "pair", "winner"),
    [
        ("weighted", [2.2, -0.9], "8"),
        ("calibrated", [2.2, -0.9], "7"),
        ("calibrated", None, "8"),  # an earlier server, or a scorer without one
    ],
)
def test_a_session_weighs_by_what_the_server_says(
    vote: str, pair: list[float] | None, winner: str
) -> None:
    """Three doubtful traces outweigh two good ones by score, not by odds."""
    session = VoteSession(5, VoteRules(vote, "off"))
    for index, (answer, score) in enumerate([("8", 0.5)] * 3 + [("7", 0.7)] * 2):
        session.feed(chunk(index, rf"\boxed{{{answer}}}", score, pair))
    session.count()
    assert session.outcome().answer == winner
    assert calibration_of(None) is None
