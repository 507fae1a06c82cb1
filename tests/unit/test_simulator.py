"""The policy under random load, in a model of the scheduler."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.config import StepConfig
from step_sglang.evaluation.simulator import Request, Simulator
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
