"""The mix repeats itself, and its oracle can tell right from wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mix.actor import Actor
from tests.mix.oracle import OVERTAKEN, MixTally, Wait
from tests.mix.plan import KINDS, SETTINGS, plan
from tests.soak.tally import Ask


@pytest.mark.parametrize("name", SETTINGS)
def test_a_seed_repeats_its_actions(name: str) -> None:
    setting = SETTINGS[name]
    actions = plan(3, 80, setting)
    assert [*map(str, actions)] == [*map(str, plan(3, 80, setting))]
    assert [*map(str, actions)] != [*map(str, plan(4, 80, setting))]
    assert [action.number for action in actions] == [*range(80)]
    possible = {"update": setting.updates, "tower": setting.towers}
    kinds = {kind for kind in KINDS if possible.get(kind, True)}
    assert {action.kind for action in actions} == kinds
    assert all(hasattr(Actor, f"do_{kind}") for kind in kinds)
    assert any("priority" in action.args for action in actions) == setting.priorities


def info(number: int, kind: str = "length", pruned: bool = False, tokens: int = 8) -> dict:
    reason: dict[str, Any] = {"type": kind}
    step = {"group": "g", "pruned": pruned}
    return {
        "id": f"r{number}",
        "finish_reason": reason,
        "completion_tokens": tokens,
        "queue_time": 0.0,
        "step": step,
    }


def tallied(ask: Ask, infos: list[dict], *, aborted: bool = False) -> MixTally:
    tally = MixTally(step=True)
    if aborted:
        with tally.everything_aborted(), tally.asking(ask):
            tally.answers(ask, infos)
    else:
        with tally.asking(ask):
            tally.answers(ask, infos)
    return tally


def group(minimum: int = 1) -> Ask:
    return Ask("group", 2, 4, 8, "g", joins=True, step={"min_survivors": minimum})


def test_a_group_that_keeps_its_minimum_is_fine() -> None:
    infos = [info(0), info(1, "abort", pruned=True)]
    tally = tallied(group(), infos)
    assert tally.problems == tally.judged() == []


def test_a_group_below_its_minimum_is_a_problem() -> None:
    infos = [info(0), info(1, "abort", pruned=True)]
    (problem,) = tallied(group(minimum=2), infos).judged()
    assert "below its minimum" in problem


def test_an_abort_of_all_excuses_a_group_but_no_second_answer() -> None:
    infos = [info(0, "abort", tokens=1), info(1, "abort", tokens=1)]
    assert len(tallied(group(), infos).problems) == 2  # nobody aborted it
    tally = tallied(group(), infos, aborted=True)
    assert tally.problems == tally.judged() == []
    with tally.asking(again := group()):
        tally.answers(again, [info(0), info(2)])
    assert ["doubled: r0" in problem for problem in tally.problems] == [True]


def test_a_request_that_all_others_overtake_is_starved() -> None:
    tally = MixTally(step=True)
    ask = Ask("ordinary", 1, 4, 8)
    tally.waits = [Wait(ask, 0.0, 99.0), *(Wait(ask, i, i) for i in range(1, OVERTAKEN + 1))]
    assert tally.judged() == []
    tally.waits.append(Wait(ask, 98.0, 98.0))
    (problem,) = tally.judged()
    assert "waited 99.0 s" in problem
