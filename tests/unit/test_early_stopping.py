from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.errors import VoteError
from step_sglang.protocol import VOTES
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.voting.early_stopping import (
    cannot_change,
    change_probability,
    check_rule,
    highest_weight,
)
from step_sglang.voting.tally import Ballot, tally, weight_of

WEIGHT = st.floats(0.0, 1.0, allow_nan=False).map(lambda w: round(w, 2))
FINISHED = st.lists(st.tuples(st.sampled_from("abc"), WEIGHT), max_size=7)
OPEN = st.lists(WEIGHT, max_size=4)


def text(one: str, other: str) -> bool:
    return one == other


def winners_of_every_outcome(
    finished: list[Ballot], open_weights: list[float], vote: str
) -> set[str]:
    """Every answer that can win, by brute force; of a tie every answer, whatever its place."""
    found: set[str] = set()
    # No answer, a known one, a new one; with the highest weight or (almost) none.
    choices = [[None, *itertools.product("abcn", {w, w / 2, 0.0})] for w in open_weights]
    for outcome in itertools.product(*choices):
        more = [Ballot(*choice) for choice in outcome if choice is not None]
        tallies = tally([*finished, *more], text, vote)
        found |= {t.answer for t in tallies if t.weight >= tallies[0].weight - 1e-9}
    return found


@settings(max_examples=150, deadline=None)
@given(FINISHED, OPEN, st.sampled_from(VOTES))
def test_exact_rule_against_brute_force(
    finished: list[tuple[str, float]], open_weights: list[float], vote: str
) -> None:
    if vote == "majority":
        finished = [(answer, 1.0) for answer, _ in finished]
        open_weights = [1.0] * len(open_weights)
    cast = [Ballot(answer, weight) for answer, weight in finished]
    tallies = tally(cast, text, vote)
    winners = winners_of_every_outcome(cast, open_weights, vote)
    if cannot_change(tallies, open_weights, vote):
        if open_weights:
            assert winners == {tallies[0].answer}
    else:
        # Nothing is held back: some outcome changes the winner, or equals it.
        assert len(winners) != 1 or not tallies


@settings(max_examples=300, deadline=None)
@given(
    st.lists(WEIGHT, max_size=8),
    st.lists(WEIGHT, max_size=8),
    st.integers(0, 4),
)
def test_highest_weight_bounds_every_continuation(
    past: list[float], future: list[float], spare: int
) -> None:
    bound = highest_weight(sum(past), len(past), len(future) + spare)
    steps = past + future
    if steps:
        assert sum(steps) / len(steps) <= bound + 1e-9
    assert bound <= 1.0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(WEIGHT, max_size=8),
    st.lists(WEIGHT, max_size=8),
    st.integers(0, 4),
    st.floats(0.0, 20.0),
    st.floats(-10.0, 10.0),
)
def test_highest_weight_bounds_every_continuation_by_odds(
    past: list[float], future: list[float], spare: int, slope: float, bias: float
) -> None:
    calibration = TraceCalibration(slope, bias)
    left = len(future) + spare
    bound = highest_weight(sum(past), len(past), left, "calibrated", calibration)
    steps = past + future
    # A running mean in single precision, as the engine's is.
    score = float(np.float32(sum(steps) / len(steps))) if steps else None
    assert weight_of(score, "calibrated", calibration) <= bound <= 1.0
    raw = highest_weight(sum(past), len(past), left, "calibrated")  # without: by trace score
    assert raw == highest_weight(sum(past), len(past), left)


def test_a_bound_by_odds_is_tight() -> None:
    """A trace that has shown its weakness cannot weigh much any more, and the rule knows."""
    calibration = TraceCalibration(2.2, -0.9)
    bound = highest_weight(2.0, 20, 1, "calibrated", calibration)
    assert calibration.weight(4 / 22) < bound < 0.002
    assert highest_weight(2.0, 20, 1) == pytest.approx(4 / 22)


def test_highest_weight_without_knowledge() -> None:
    assert highest_weight(0.2, 2, None) == 1.0
    assert highest_weight(0.0, 0, 5) == 1.0
    assert highest_weight(0.2, 2, 5, "majority") == 1.0
    assert highest_weight(0.4, 4, 0) == pytest.approx(1.4 / 5)


def test_edges_of_the_exact_rule() -> None:
    one = tally([Ballot("a", 0.9)], text)
    assert cannot_change(one, [], "weighted")
    assert cannot_change([], [], "weighted") and not cannot_change([], [1.0], "weighted")
    assert not cannot_change(one, [0.9], "weighted")  # could be equalled
    assert cannot_change(one, [0.8], "weighted")
    assert cannot_change(one, [0.8] * 50, "best") and not cannot_change(one, [0.95], "best")


def test_change_probability_against_simulation() -> None:
    rng = random.Random(7)
    for ahead, behind, left in ((6, 2, 4), (9, 8, 10), (12, 3, 20)):
        tallies = tally([Ballot("a", 1.0)] * ahead + [Ballot("b", 1.0)] * behind, text)
        changed = new = 0
        for _ in range(20000):
            p = rng.betavariate(behind + 1, ahead + 1)
            votes = sum(rng.random() < p for _ in range(left))
            changed += behind + votes >= ahead + left - votes
            p = rng.betavariate(1, ahead + 1)
            votes = sum(rng.random() < p for _ in range(left))
            new += votes >= ahead + left - votes
        expected = (changed + new) / 20000
        assert change_probability(tallies, left, "majority") == pytest.approx(expected, abs=0.02)


def test_change_probability_behaves() -> None:
    def probability(ahead: int, behind: int, left: int) -> float:
        cast = [Ballot("a", 0.7)] * ahead + [Ballot("b", 0.7)] * behind
        return change_probability(tally(cast, text), left, "weighted")

    assert probability(20, 2, 10) < probability(10, 2, 10) < probability(10, 8, 10)
    assert probability(5, 0, 0) == 0.0
    assert probability(30, 0, 20) == pytest.approx(0.0, abs=1e-12)  # cannot catch up
    assert change_probability([], 5, "weighted") == 1.0
    assert change_probability(tally([Ballot("a", 0.0)], text), 5, "weighted") == 1.0
    assert change_probability(tally([Ballot("a", 0.9)], text), 1, "best") == 0.5
    assert all(math.isfinite(probability(200, 199, n)) for n in (1, 10, 400))


def test_bad_rules() -> None:
    check_rule("posterior", 0.05)
    with pytest.raises(VoteError, match="exact, posterior, off"):
        check_rule("never")
    for threshold in (0, 1, 0.5, "x", True, math.nan):
        with pytest.raises(VoteError, match="a probability above 0"):
            check_rule("posterior", threshold)
