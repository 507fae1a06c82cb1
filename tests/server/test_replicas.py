"""Data parallelism: all traces of a group meet on one replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from step_sglang.client.abort import abort_group
from tests.server.launch import Server, one_core_each, serve
from tests.server.traces import PROMPT, sample

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def two_replicas(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "3000"),
        *("--dp-size", "2", "--max-running-requests", "128"),
        log=tmp_path_factory.mktemp("log") / "dp.log",
        SGLANG_CPU_OMP_THREADS_BIND=one_core_each(),
    ) as server:
        yield server


def replicas(answers: list[dict]) -> set[int]:
    return {answer["meta_info"]["dp_rank"] for answer in answers}


def test_a_group_meets_on_one_replica(two_replicas: Server) -> None:
    """Whoever sends its members, and however many groups there are."""
    with ThreadPoolExecutor(8) as threads:
        named = [
            (f"q{i % 6}", threads.submit(sample, two_replicas, 2, 8, group=f"q{i % 6}"))
            for i in range(24)
        ]
        unnamed = [threads.submit(sample, two_replicas, 4, 8) for _ in range(8)]
        where: dict[str, set[int]] = {}
        for group, future in named:
            where.setdefault(group, set()).update(replicas(future.result()))
        spread = Counter(rank for future in unnamed for rank in replicas(future.result()))
    assert all(len(ranks) == 1 for ranks in where.values())
    assert spread == {0: 4, 1: 4}  # one after the other


def test_a_minimum_counts_for_the_whole_group(two_replicas: Server) -> None:
    answers = sample(two_replicas, 48, 300, min_survivors=5)
    pruned = [answer["meta_info"]["step"]["pruned"] for answer in answers]
    assert any(pruned) and pruned.count(False) >= 5
    assert len(replicas(answers)) == 1
    assert abort_group(two_replicas.url, answers[0]["meta_info"]["step"]["group"]) == 0


def test_an_explicit_replica_wins(two_replicas: Server) -> None:
    for rank in (0, 1):
        answer = two_replicas.generate(
            input_ids=PROMPT,
            routed_dp_rank=rank,
            sampling_params={"max_new_tokens": 4, "custom_params": {"step": {"group": "q"}}},
        )
        assert answer["meta_info"]["dp_rank"] == rank
