"""The dial: its points, what lies between them, who wins over it, and what it refuses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.config import StepConfig
from step_sglang.errors import ConfigError, RequestError, VoteError
from step_sglang.protocol import EFFORTS
from step_sglang.voting.effort import effort_point
from step_sglang.voting.request import parse, parse_vote, trace_params
from step_sglang.voting.session import VoteRules

CONFIG = StepConfig("s")


def voted(config: StepConfig = CONFIG, **step: object) -> dict:
    return {"custom_params": {"step": {"traces": 8, **step}}}


def test_words_are_numbers() -> None:
    for word, number in zip(EFFORTS, (0, 0.5, 1), strict=True):
        assert effort_point(word) == effort_point(number) == effort_point(float(number))
    thorough = effort_point("thorough")
    assert (thorough.early, thorough.shrink, thorough.prune_at) == ("exact", 0.0, 1.0)


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_effort_risks_and_saves_less(one: float, other: float) -> None:
    low, high = effort_point(min(one, other)), effort_point(max(one, other))
    assert low.prune_at <= high.prune_at
    if high.early == low.early == "posterior":
        assert low.threshold >= high.threshold - 1e-12 and low.shrink >= high.shrink - 1e-12
    VoteRules("weighted", low.early, low.threshold, low.shrink)  # all of it is allowed
    assert 0 < low.prune_at <= 1


@pytest.mark.parametrize(
    "effort", ["fats", "", -0.1, 1.01, True, None, [], {}, math.nan, math.inf, "0.5", "x" * 10**6]
)
def test_a_wrong_effort_is_one_clear_error(effort: object) -> None:
    with pytest.raises(VoteError, match="effort must be fast, balanced, thorough or a number"):
        effort_point(effort)
    with pytest.raises(RequestError, match="effort must be") as refused:
        parse(voted(effort=effort), CONFIG)
    assert len(str(refused.value)) < 500


def test_a_request_gets_the_point_and_its_own_options_win() -> None:
    for word in EFFORTS:
        point = effort_point(word)
        wish = parse_vote(voted(effort=word), CONFIG)
        assert wish is not None
        rules = wish.rules
        assert (rules.early, rules.threshold, rules.shrink) == (
            point.early, point.threshold, point.shrink,
        )  # fmt: skip
        step = trace_params(voted(effort=word), wish, CONFIG)["custom_params"]["step"]
        assert step == ({} if point.prune_at == 1 else {"prune_at": point.prune_at})
    said = voted(effort="fast", early="exact", threshold=0.2, shrink=0, prune_at=0.9)
    wish = parse_vote(said, CONFIG)
    assert wish is not None
    assert wish.rules == VoteRules("calibrated", "exact", 0.2, 0)
    assert trace_params(said, wish, CONFIG)["custom_params"]["step"] == {"prune_at": 0.9}
    unsaid = parse_vote(voted(), CONFIG)
    assert unsaid is not None and unsaid.rules == VoteRules() and unsaid.prune_at == 1
    with pytest.raises(RequestError, match="needs traces"):
        parse({"n": 8, "custom_params": {"step": {"effort": "fast"}}}, CONFIG)


def test_the_server_s_own_effort() -> None:
    server = StepConfig("s", traces=4, effort="fast")
    wish = parse_vote({}, server)
    assert wish is not None and wish.rules.shrink == effort_point("fast").shrink
    assert StepConfig("s", effort="0.25").effort == 0.25  # as a flag gives it
    paper = StepConfig("s", policy="paper", effort="fast")
    wish = parse_vote(voted(), paper)
    assert wish is not None and wish.prune_at == 1  # which it could not have
    for wrong in ("quick", "2", -1, True, math.nan, None):
        with pytest.raises(ConfigError, match="--step-effort must be"):
            StepConfig("s", effort=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0, -1, 1.5, True, "half", math.nan, math.inf, []])
def test_a_wrong_share_is_refused(share: object) -> None:
    with pytest.raises(RequestError, match=r"step\.prune_at must be a share"):
        parse({"custom_params": {"step": {"prune_at": share}}}, CONFIG)
