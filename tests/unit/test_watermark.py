"""The share of the pool that groups may fill: what is pruned at it, and that 1 changes nothing."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.config import StepConfig
from step_sglang.errors import ConfigError
from step_sglang.evaluation.simulator import Request, Simulator
from step_sglang.pruning.groups import Group
from step_sglang.pruning.policy import above_watermark, watermark
from tests.unit.test_simulator import scenario

POOL = 1600


class Watched(Simulator):
    """Looks at what groups hold after every decode round."""

    def _decode(self) -> None:
        super()._decode()
        traces = [r for r in self.running if r.group is not None]
        held = sum(self.pages(r.tokens) for r in traces)
        limit = int(self.config.prune_at * self.pool)
        # Finished ones have left, so what is left held no more in the round.
        assert held <= limit or not any(r.prunable for r in traces)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 8),
    st.integers(0, 8),
    st.sampled_from([1, 16]),
    st.sampled_from(["fair", "queue"]),
    st.sampled_from([0.05, 0.25, 0.5, 0.9]),
)
def test_groups_stay_below_their_share(seed, groups, ordinary, page, admit, share) -> None:
    config = StepConfig("s", admit=admit, prune_at=share)
    requests = scenario(seed, groups, ordinary, POOL)
    simulator = Watched(POOL, page, config, seed)
    simulator.run(requests)
    assert len(simulator.ended) == len(requests)
    for request in requests:
        if request.group is None:
            assert request.fate == "finished"
        else:
            assert request.group.finished >= request.group.min_survivors


def test_ordinary_requests_do_not_count_towards_the_share() -> None:
    def pruned(ordinary: int) -> tuple[int, int]:
        group = Group("g")
        requests = [Request(0, 1, 60, group) for _ in range(8)]
        requests += [Request(0, 100, 60) for _ in range(ordinary)]
        simulator = Simulator(POOL, 1, StepConfig("s", prune_at=0.25), 3)
        simulator.run(requests)
        return simulator.pruned["watermark"], simulator.pruned["decode"]

    alone, beside = pruned(0), pruned(6)  # 960 tokens of others at the end
    assert alone == beside
    assert alone == (2, 0)  # 400 tokens are theirs; seven traces of 61 would hold more


class Unlimited(Simulator):
    """Never looks at the share."""

    def _above(self) -> int:
        return 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 16]), st.sampled_from(["fair", "queue"]))
def test_a_share_of_one_changes_nothing(seed, page, admit) -> None:
    fates = []
    for kind, config in (
        (Unlimited, StepConfig("s", admit=admit)),
        (Simulator, StepConfig("s", admit=admit, prune_at=1)),
    ):
        requests = copy.deepcopy(scenario(seed, 5, 3, POOL))
        simulator = kind(POOL, page, config, seed)
        simulator.run(requests)
        fates.append(([(r.fate, r.generated, r.started) for r in requests], simulator.pruned))
    assert fates[0] == fates[1]


def test_the_limit_in_tokens() -> None:
    assert watermark(1001, 1) is None and watermark(1001, 1.0) is None
    assert watermark(1001, 0.5) == 500
    assert above_watermark([], 10) == 0
    assert above_watermark([6, 4], 10) == 0
    assert above_watermark(iter([6, 7]), 10) == 3


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), float("inf"), True, "half", None])
def test_what_is_no_share(share: object) -> None:
    with pytest.raises(ConfigError, match="--step-prune-at must be a share"):
        StepConfig("s", prune_at=share)  # type: ignore[arg-type]


def test_the_papers_policy_has_no_share() -> None:
    with pytest.raises(ConfigError, match="--step-prune-at contradicts"):
        StepConfig("s", policy="paper", prune_at=0.5)
    assert StepConfig("s", policy="paper", prune_at=1).effective()["prune_at"] == 1
