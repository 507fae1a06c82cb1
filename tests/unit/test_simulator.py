"""The policy under random load, in a model of the scheduler."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.config import StepConfig
from step_sglang.evaluation.simulator import Request, Reserve, ScoreEvent, Simulator
from step_sglang.pruning.admission import GroupLimit
from step_sglang.pruning.groups import Group

FAIR, QUEUE = StepConfig("s"), StepConfig("s", admit="queue")


def scenario(seed: int, groups: int, ordinary: int, pool: int) -> list[Request]:
    """Random arrivals, sizes and lengths; every request alone fits the pool."""
    draw = random.Random(seed)
    requests = []
    for g in range(groups):
        size = draw.randint(1, 24)
        group = Group(f"g{g}", draw.choice([0.5, 1, 1, 2]), draw.randint(1, min(3, size)))
        arrival, prompt = draw.randint(0, 150), draw.randint(1, pool // 40)
        requests += [
            Request(arrival, prompt, draw.randint(5, pool // 10), group) for _ in range(size)
        ]
    requests += [
        Request(draw.randint(0, 150), draw.randint(1, pool // 20), draw.randint(5, pool // 10))
        for _ in range(ordinary)
    ]
    return requests


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 8),
    st.integers(0, 8),
    st.sampled_from([1, 16]),
    st.sampled_from([FAIR, QUEUE]),
    st.sampled_from([None, GroupLimit(), GroupLimit(1), GroupLimit(3)]),
)
def test_everybody_ends_well(seed, groups, ordinary, page, config, limit) -> None:
    requests = scenario(seed, groups, ordinary, pool=1600)
    simulator = Simulator(1600, page, config, seed, limit=limit)
    simulator.run(requests)  # asserts memory, minima, and that it ends
    assert len(simulator.ended) == len(requests)
    for request in requests:
        assert request.fate in ("pruned", "finished")
        assert request.group is not None or request.fate == "finished"
        if request.group is not None:
            assert request.group.finished >= request.group.min_survivors
    if config is QUEUE:
        assert simulator.pruned["admission"] == 0


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_the_same_load_ends_the_same(seed: int) -> None:
    fates = []
    for _ in range(2):
        requests = copy.deepcopy(scenario(seed, 5, 3, pool=1600))
        Simulator(1600, 1, FAIR, seed).run(requests)
        fates.append([(r.fate, r.generated, r.started) for r in requests])
    assert fates[0] == fates[1]


class OneByOne(Simulator):
    """Passes no steps at once."""

    def _quiet(self, arrival: int | None) -> int:
        return 0


def scored_load(seed: int, groups: int, ordinary: int) -> list[Request]:
    """Few requests, long ones, whose scores are known beforehand."""
    draw = random.Random(seed)
    requests = []
    for number in range(groups):
        group = Group(f"g{number}", min_survivors=draw.randint(1, 3))
        arrival = draw.choice([0, 0, 300])
        requests += [Request(arrival, 5, draw.randint(50, 700), group) for _ in range(12)]
    requests += [
        Request(draw.choice([0, 0, 200]), 5, draw.randint(50, 700)) for _ in range(ordinary)
    ]
    for request in requests:
        ends = range(draw.randint(5, 30), request.length, 25)
        request.steps = [ScoreEvent(end, draw.random()) for end in ends]
    return requests


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(3, 0), (0, 24), (2, 8)]),
    st.sampled_from([1, 16]),
    st.sampled_from([1.0, 0.4]),
    st.booleans(),
    st.booleans(),
)
def test_quiet_steps_at_once_are_those_one_by_one(
    seed, kinds, page, prune_at, reserving, ending
) -> None:
    found = []
    for kind in (OneByOne, Simulator):
        requests = scored_load(seed, *kinds)
        simulator = kind(2400, page, StepConfig("s", prune_at=prune_at), seed)
        if reserving:
            simulator.reserve = Reserve(800)
        if ending:

            def ended_by(finished, simulator=simulator):
                return simulator.running[::4] if finished[0].length % 3 == 0 else ()

            simulator.ended_by = ended_by
        simulator.run(requests)
        fates = [
            (r.fate, r.generated, r.started, r.ended, r.waited, r.retractions, r.score_sum)
            for r in requests
        ]
        steps = sum(moment.steps for moment in simulator.history)
        found.append((fates, steps, sum(moment.attended for moment in simulator.history)))
        number = len(simulator.history)
    assert found[0] == found[1]
    assert number < found[1][1]  # some were quiet


def test_a_refused_request_is_not_tried_again_before_one_leaves() -> None:
    """SGLang's `batch_is_full`, though reservations fall and would soon let it in."""
    first, second, third = [Request(0, 0, length) for length in (400, 100, 400)]
    Simulator(2100, 1, FAIR, reserve=Reserve(900)).run([first, second, third])
    assert first.started == second.started == 0
    assert third.started == second.ended == third.waited
    reserve = Reserve(900)
    reserve.decay(99)
    later = [Request(0, 0, 400, generated=99), Request(0, 0, 100, generated=99)]
    left = sum(reserve.future(request) for request in later)
    assert 900 + 2 * 99 + reserve.ratio * left < 2100  # it would have been let in before that


def in_turn() -> list[Request]:
    """Eight equal groups, one after the other; two of them alone would fill the pool."""
    groups = [Group(f"g{i}") for i in range(8)]
    return [Request(40 * i, 15, 200, group) for i, group in enumerate(groups) for _ in range(6)]


@pytest.mark.parametrize("seed", range(5))
def test_groups_within_their_share_start_at_once(seed: int) -> None:
    waited = {}
    for config in (FAIR, QUEUE):
        requests = in_turn()
        Simulator(1600, 1, config, seed).run(requests)
        waited[config.admit] = max(r.started - r.arrival for r in requests if r.started is not None)
        assert all(r.started is not None for r in requests)
        assert all(r.group.finished >= 1 for r in requests if r.group is not None)
    assert waited[None] == 0
    assert waited["queue"] > 0


@pytest.mark.parametrize("config", [FAIR, QUEUE])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_only_so_many_groups_run_by_arrival(config: StepConfig, most: int) -> None:
    groups = [Group(f"g{i}") for i in range(8)]
    requests = [Request(i, 15, 100, group) for i, group in enumerate(groups) for _ in range(6)]
    simulator = Simulator(1600, 1, config, limit=GroupLimit(most))
    spans = {}
    for group in groups:
        spans[group] = [r for r in requests if r.group is group]
    ended: dict[int, int] = {}
    original = simulator._end

    def end(request: Request, fate: str) -> None:
        original(request, fate)
        ended[id(request)] = simulator.now

    simulator._end = end  # type: ignore[method-assign]
    simulator.run(requests)
    began = [min(r.started for r in spans[g] if r.started is not None) for g in groups]
    last = [max(ended[id(r)] for r in spans[g]) for g in groups]
    assert began == sorted(began)
    for moment in range(simulator.now):
        assert sum(b <= moment < e for b, e in zip(began, last, strict=True)) <= most


def test_a_limit_leaves_each_group_a_vote() -> None:
    """In a burst; the groups know how long their traces become."""
    finished = {}
    for limit in (None, GroupLimit(keep=4)):
        groups = [Group(f"g{i}", samples=8) for i in range(16)]
        requests = [Request(0, 0, 100, group) for group in groups for _ in range(8)]
        Simulator(1600, 1, FAIR, limit=limit).run(requests)
        finished[limit] = min(group.finished for group in groups)
    assert finished[None] == 1
    assert finished[GroupLimit(keep=4)] >= 4
