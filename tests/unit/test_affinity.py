"""Which replica serves a group."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from step_sglang.pruning.affinity import GroupIds, replica_of


@given(st.text(min_size=1), st.integers(1, 64))
def test_a_group_has_one_replica(group: str, replicas: int) -> None:
    assert 0 <= replica_of(group, replicas) < replicas
    assert replica_of(group, replicas) == replica_of(group, replicas)


def test_it_is_the_same_in_every_process() -> None:
    assert [replica_of(f"q{i}", 4) for i in range(8)] == [1, 0, 2, 1, 0, 0, 3, 2]


def test_named_groups_spread() -> None:
    spread = Counter(replica_of(f"question {i}", 8) for i in range(8000))
    assert len(spread) == 8 and min(spread.values()) > 800


def test_unnamed_groups_take_turns() -> None:
    ids = GroupIds(3)
    made = [ids.new() for _ in range(12)]
    assert len(set(made)) == 12
    assert [replica_of(group, 3) for group in made] == [0, 1, 2] * 4


def test_unnamed_ids_cannot_be_foreseen() -> None:
    """They come from the system's randomness, and all of their 122 free bits vary."""
    made = []
    for _ in range(400):
        random.seed(0)
        made.append(int(GroupIds(1).new(), 16))
    assert len(set(made)) == 400
    varying = sum(0 < sum(value >> bit & 1 for value in made) < 400 for bit in range(128))
    assert varying == 122
