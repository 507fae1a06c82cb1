"""Tensor parallelism: every rank prunes the same traces in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from step_sglang.client.abort import abort_group
from tests.server.expected import assert_scores
from tests.server.launch import Server, one_core_each, serve
from tests.server.traces import PROMPT, assert_same_victims, sample, victims
from tests.server.viewer import assert_seen, looking

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def two_ranks(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "3000"),
        *("--tp-size", "2", "--max-running-requests", "128"),
        log=tmp_path_factory.mktemp("log") / "tp.log",
        SGLANG_CPU_OMP_THREADS_BIND=one_core_each(),
    ) as server:
        yield server


def test_two_ranks_choose_the_same_victims(models, scorer: Path, two_ranks: Server) -> None:
    for answer in sample(two_ranks, 64, 200):
        assert_scores(models["qwen3"], scorer, PROMPT, answer)
    assert_same_victims(two_ranks, at_least=20)


def test_two_ranks_stay_together_while_groups_come_and_go(two_ranks: Server) -> None:
    """Prunings for decode steps and for admissions, a group that is aborted in the middle."""
    before = len(victims(two_ranks)[0])
    with ThreadPoolExecutor(8) as threads:
        doomed = threads.submit(sample, two_ranks, 16, 2000, group="doomed")
        others = [
            threads.submit(sample, two_ranks, 24, 150, group=f"q{i}", weight=1 + i % 2)
            for i in range(8)
        ]
        for future in others:
            assert any(not a["meta_info"]["step"]["pruned"] for a in future.result())
        abort_group(two_ranks.url, "doomed")
        doomed.result()
    assert_same_victims(two_ranks, at_least=before + 60)


def test_a_viewer_sees_each_trace_once(two_ranks: Server) -> None:
    with looking(two_ranks) as known:
        answers = sample(two_ranks, 48, 200, group="watched")
    assert any(answer["meta_info"]["step"]["pruned"] for answer in answers)
    assert_seen(known, "watched", answers)


@pytest.mark.slow
def test_two_ranks_stay_together_for_thousands_of_steps(two_ranks: Server) -> None:
    before = len(victims(two_ranks)[0])
    for _ in range(5):
        sample(two_ranks, 96, 800)
    assert_same_victims(two_ranks, at_least=before + 5 * 90)
