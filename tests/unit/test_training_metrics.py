"""Ranking figures against scikit-learn and by hand; planted signals that must and must not show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from step_sglang.training import table as table_module
from step_sglang.training.confidence import token_signals
from step_sglang.training.metrics import (
    CONFIDENCE,
    FRACTIONS,
    LENGTH,
    LOGPROB,
    RUNNING_MEAN,
    auc,
    count_pairs,
    rankings,
    reliability,
    running_means,
    signals_at,
    within_auc,
)
from step_sglang.training.simulate import simulate_votes
from step_sglang.training.table import TraceTable, answer_classes, build_table
from step_sglang.voting.verifier import AnswerVerifier
from tests.training_samples import question


def table(questions: int = 30, **changed: Any) -> TraceTable:
    rng = np.random.default_rng(0)
    return build_table([question(f"q{i}", rng, **changed).traces for i in range(questions)])


def planted(found: TraceTable, within: float, between: float, seed: int = 0) -> Any:
    """Step scores in (0, 1): `within` shows correctness, `between` the share of correct traces."""
    rng = np.random.default_rng(seed)
    share = np.bincount(found.question, found.correct) / np.bincount(found.question)
    trace = within * found.correct + between * share[found.question]
    logits = trace[found.step_trace] + 0.5 * rng.standard_normal(len(found.step_trace))
    return 1 / (1 + np.exp(-logits))


def test_auc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    values, correct = rng.integers(0, 9, 200) / 9, rng.random(200) < 0.3
    assert auc(values, correct) == pytest.approx(roc_auc_score(correct, values))
    assert np.isnan(auc(values, np.ones(200, bool)))


def test_pairs_by_hand() -> None:
    values = np.array([3.0, 1.0, 2.0, 5.0, 5.0, 4.0])
    correct = np.array([True, False, True, True, False, False])
    question = np.array([0, 0, 0, 1, 1, 1])
    pairs = count_pairs(values, correct, question, 2)
    assert pairs.wins.tolist() == [[2, 0], [1, 1]]
    assert pairs.ties.tolist() == [[0, 0], [0, 1]]
    assert pairs.all.tolist() == [[2, 4], [1, 2]]
    assert within_auc(values, correct, question) == pytest.approx((1.0 + 1.5 / 2) / 2)


def test_signals_are_cut_at_the_traces_own_steps() -> None:
    found = table(3, steps=(0, 6))
    scores = planted(found, 1, 0)
    for fraction in FRACTIONS:
        at = signals_at(found, scores, fraction)
        for t in range(len(found.question)):
            first, last = found.offsets[t], found.offsets[t + 1]
            if first == last:
                assert all(np.isnan(values[t]) for values in at.values())
                continue
            end = first + int(np.ceil(fraction * (last - first)))
            assert at[RUNNING_MEAN][t] == pytest.approx(scores[first:end].mean())
            if fraction < 1:
                assert at[LOGPROB][t] == found.step_mean_logprob[end - 1]
                assert at[CONFIDENCE][t] == found.step_lowest_confidence[end - 1]
                assert at[LENGTH][t] == -(found.positions[end - 1] + 1)
            else:
                assert at[LOGPROB][t] == found.mean_logprob[t]
                assert at[LENGTH][t] == -found.num_tokens[t]
    assert running_means(found, scores)[0] == scores[0]


@pytest.mark.parametrize("score", [0.5, 0.3, 0.7123, float(np.float32(0.7123)), 1e-7])
def test_a_constant_scorer_ranks_nothing(score: float) -> None:
    """All of its traces are tied, whatever their number of steps and what was summed before."""
    found = table(40, steps=(1, 40))
    constant = np.full(len(found.positions), score)
    assert (running_means(found, constant) == score).all()
    for ranking in rankings(found, constant)[RUNNING_MEAN].values():
        assert ranking.auc.value == ranking.auc_within.value == 0.5
        assert ranking.pairs.value == ranking.pairs_within.value == 0


def test_recognising_hard_questions_wins_pooled_and_nothing_within() -> None:
    rng = np.random.default_rng(3)
    found = build_table(
        [question(f"q{i}", rng, n=16, share=0.1 + 0.8 * (i % 2)).traces for i in range(40)]
    )
    ranking = rankings(found, planted(found, 0.0, 4.0))[RUNNING_MEAN]
    for fraction in FRACTIONS:
        assert ranking[fraction].auc.value > 0.8
        within = ranking[fraction].auc_within
        assert within.low < 0.5 < within.high and 0.4 < within.value < 0.6
    ranking = rankings(found, planted(found, 1.0, 0.0))[RUNNING_MEAN]
    assert ranking[1.0].auc_within.low > 0.8


def test_intervals_and_leads() -> None:
    found = table(60, steps=(0, 6))
    scores = planted(found, 0.5, 0.0)
    everything = rankings(found, scores)
    has = found.num_steps > 0
    for fraction in FRACTIONS:
        values = signals_at(found, scores, fraction)[RUNNING_MEAN][has]
        ranking = everything[RUNNING_MEAN][fraction]
        correct, of = found.correct[has], found.question[has]
        assert ranking.auc.value == pytest.approx(roc_auc_score(correct, values))
        assert ranking.auc_within.value == pytest.approx(within_auc(values, correct, of))
        for estimate in (ranking.auc, ranking.auc_within, ranking.pairs, ranking.pairs_within):
            assert estimate.low < estimate.value < estimate.high < estimate.low + 0.25
        assert ranking.auc_within_lead is None
        lead = everything[LOGPROB][fraction].auc_within_lead
        other = everything[LOGPROB][fraction].auc_within.value
        assert lead is not None
        assert lead.value == pytest.approx(ranking.auc_within.value - other)
        assert 0.5 - 0.15 < other < 0.5 + 0.15
    # the whole-set interval has about the width of the figure's spread over fresh samples
    assert everything[RUNNING_MEAN][1.0].auc_within.low > 0.6


def test_a_signal_that_was_not_measured_is_left_out() -> None:
    found = table(4)
    found = replace(
        found,
        step_lowest_confidence=np.full(len(found.positions), np.nan),
        lowest_confidence=np.full(len(found.question), np.nan),
    )
    scores = planted(found, 1, 0)
    assert set(rankings(found, scores)) == {RUNNING_MEAN, LOGPROB, LENGTH}
    assert f"half pruned by {CONFIDENCE}" not in simulate_votes(found, scores)


def test_reliability() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(20000)
    good = reliability(scores, rng.random(20000) < scores)
    assert good.ece < 0.02 and good.brier == pytest.approx(1 / 6, abs=0.01)
    assert sum(good.count) == 20000 and len(good.count) == 10
    bad = reliability(np.full(100, 1.0), np.arange(100) < 30)
    assert bad.ece == pytest.approx(0.7) and bad.count == (100,)


def test_votes() -> None:
    found = table(80, n=16, share=0.35)
    good = simulate_votes(found, planted(found, 3.0, 0.0))
    pruned = good[f"half pruned by {RUNNING_MEAN}"]
    assert pruned.lead.low > 0.05 and pruned.kept_accuracy > 0.6
    assert good["self-consistency"].lead.value == 0
    assert good["self-consistency"].kept_accuracy == pytest.approx(found.correct.mean())
    assert abs(good["half pruned at random"].kept_accuracy - found.correct.mean()) < 0.02
    upside_down = simulate_votes(found, 1 - planted(found, 3.0, 0.0))
    assert upside_down[f"half pruned by {RUNNING_MEAN}"].lead.high < 0
    equal = simulate_votes(found, np.full(len(found.step_trace), 0.5))
    assert equal["score-weighted"].accuracy == equal["self-consistency"].accuracy


def test_answers_that_mean_the_same_vote_together() -> None:
    assert answer_classes(["1/2", None, "0.5", " 3", "3", "\\frac{1}{2}"]).tolist() == [
        0, -1, 0, 1, 1, 0,
    ]  # fmt: skip


def test_answers_that_never_compare_do_not_stop_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifier = AnswerVerifier(time_limit=0.5)
    monkeypatch.setattr(table_module, "_verifier", verifier)
    tower, other = "12^{9^{9^9}}", "13^{9^{9^9}}"
    try:
        found = answer_classes([tower, "\\sqrt{12}", other, "2\\sqrt{3}", tower])
    finally:
        verifier.close()
    assert found.tolist() == [0, 1, 2, 1, 0]


def test_token_signals_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    logprobs, confidences = -rng.random(40), rng.random(40) * 10
    for window in (1, 7, 40, 100):
        found = token_signals(list(logprobs), list(confidences), window)
        for t in range(40):
            groups = [
                confidences[end - window : end].mean()
                for end in range(window, t + 2)
            ] or [confidences[: t + 1].mean()]  # fmt: skip
            assert found.lowest_confidence[t] == pytest.approx(min(groups))
            assert found.mean_logprob[t] == pytest.approx(logprobs[: t + 1].mean())
    assert len(token_signals([], [], 5).mean_logprob) == 0
