"""Data-parallel attention: ranks with batches of their own share the experts of one model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from step_sglang.client.abort import abort_group
from tests.models import build_model
from tests.server.amended import amend
from tests.server.expected import assert_scores
from tests.server.idle import LEAK
from tests.server.launch import Server, one_core_each, serve
from tests.server.traces import PROMPT, sample, victims

pytestmark = [pytest.mark.server, pytest.mark.full]

POOL = 3000  # tokens of each rank
LONG_PROMPT = [40 + i % 200 for i in range(700)]
ON_THE_CPU = (
    ("sglang.srt.distributed.parallel_state", "tests.server.padded:scatter_on_the_cpu"),
    ("sglang.srt.layers.dp_attention", "tests.server.padded:copy_on_the_cpu"),
)
CONFIGURATIONS = {
    "overlap": ("--attn-dp-size", "2"),
    # As it was written before; ranks then meet on their device group.
    "no-overlap": ("--dp-size", "2", "--enable-dp-attention", "--disable-overlap-schedule"),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("moe") / "model", "qwen3_moe", vocab=384)


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def server(
    request: pytest.FixtureRequest,
    moe: Path,
    scorer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param)
    with serve(
        moe,
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "256", "--chunked-prefill-size", "256", "--enable-metrics"),
        *("--tp-size", "2", *CONFIGURATIONS[request.param]),
        log=folder / "server.log",
        SGLANG_CPU_OMP_THREADS_BIND=one_core_each(),
        **amend(folder, *ON_THE_CPU, unpinned=True),
    ) as running:
        yield running


def ranks(answers: list[dict]) -> set[int]:
    return {answer["meta_info"]["dp_rank"] for answer in answers}


def ordinary(server: Server, prompt: list[int], rank: int, tokens: int = 20) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    return dict(server.generate(input_ids=prompt, routed_dp_rank=rank, sampling_params=params))


def states(server: Server) -> list[dict[str, Any]]:
    return [internal["step"] for internal in server.info()["internal_states"]]


def assert_nothing_is_left(server: Server) -> None:
    """Both ranks have their whole pool again, and nothing failed in STEP."""
    deadline = time.monotonic() + 120
    while True:
        server.info()  # wakes idle schedulers, which then say anew what they hold
        loads = requests.get(f"{server.url}/v1/loads", timeout=60).json()["loads"]
        if not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads):
            break
        assert time.monotonic() < deadline, loads
        time.sleep(0.2)
    assert requests.post(f"{server.url}/flush_cache", timeout=60).status_code == 200
    assert not [line for line in server.log_text().splitlines() if LEAK.search(line)]
    for state in states(server):
        assert state["live_traces"] == state["groups"] == state["passes_lost"] == 0
        assert state["failures"] == {} and state["stopped"] is None


def test_a_rank_prunes_beside_an_idle_one(server: Server, moe: Path, scorer: Path) -> None:
    for rank in (0, 1):
        begun = len(victims(server)[rank])
        answers = sample(server, 64, 200, group=group_on(server, rank))
        assert ranks(answers) == {rank}
        for answer in answers[::4]:
            assert_scores(moe, scorer, PROMPT, answer)
        pruned = [answer["meta_info"]["step"]["pruned"] for answer in answers]
        assert 20 <= sum(pruned) < 64
        assert len(victims(server)[rank]) == begun + sum(pruned)
    assert_nothing_is_left(server)


def group_on(server: Server, rank: int) -> str:
    """A group's name that belongs to a rank, as the server says."""
    for i in range(100):
        if ranks(sample(server, 1, 1, group=f"on {rank} {i}")) == {rank}:
            return f"on {rank} {i}"
    raise AssertionError("no name belongs there")


def test_both_prune_while_prompts_come(server: Server, moe: Path, scorer: Path) -> None:
    """A decode step of one rank meets a prefill of the other, an idle one, and another decode."""
    alone = [ordinary(server, LONG_PROMPT, rank)["output_ids"] for rank in (0, 1)]
    begun = {rank: len(found) for rank, found in victims(server).items()}
    with ThreadPoolExecutor(12) as threads:
        groups = [threads.submit(sample, server, 48, 150 + 100 * (i % 2)) for i in range(4)]
        doomed = threads.submit(sample, server, 8, 2000, group="doomed")
        others = []
        for i in range(12):
            others.append((i % 2, threads.submit(ordinary, server, LONG_PROMPT, i % 2)))
            time.sleep(0.5)
        assert abort_group(server.url, "doomed") >= 1  # some may have been pruned before
        assert {a["meta_info"]["finish_reason"]["type"] for a in doomed.result()} == {"abort"}
        for rank, future in others:
            assert future.result()["output_ids"] == alone[rank]
        for future in groups:
            answers = future.result()
            assert len(ranks(answers)) == 1
            assert any(not answer["meta_info"]["step"]["pruned"] for answer in answers)
            for answer in answers[::8]:
                assert_scores(moe, scorer, PROMPT, answer)
    assert all(len(found) >= begun[rank] + 20 for rank, found in victims(server).items())
    assert_nothing_is_left(server)


def test_a_group_meets_on_one_rank(server: Server) -> None:
    with ThreadPoolExecutor(8) as threads:
        named = [
            (f"q{i % 6}", threads.submit(sample, server, 2, 8, group=f"q{i % 6}"))
            for i in range(24)
        ]
        unnamed = [threads.submit(sample, server, 4, 8) for _ in range(8)]
        where: dict[str, set[int]] = {}
        for group, future in named:
            where.setdefault(group, set()).update(ranks(future.result()))
        spread = Counter(rank for future in unnamed for rank in ranks(future.result()))
    assert all(len(found) == 1 for found in where.values())
    assert spread == {0: 4, 1: 4}  # one after the other
    assert len(states(server)) == 2


def test_a_method_that_judges_every_token_works(server: Server) -> None:
    """Each rank has a batch of its own, so there is nothing to agree on."""
    baseline = {"name": "deepconf", "window": 20}
    answers = sample(server, 8, 100, baseline=baseline)
    assert all(answer["meta_info"]["step"]["confidence"] > 0 for answer in answers)


def test_thousands_of_steps_while_both_prune(server: Server) -> None:
    """Two thousand decode steps of each rank, nearly all of them with memory short."""
    before = {rank: len(found) for rank, found in victims(server).items()}
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(rounds, server, rank) for rank in (0, 1)]:
            future.result()
    assert all(len(found) >= before[rank] + 100 for rank, found in victims(server).items())
    assert_nothing_is_left(server)


def rounds(server: Server, rank: int) -> None:
    group, steps = group_on(server, rank), 0
    while steps < 2000:
        answers = sample(server, 64 - 8 * rank, 700, group=f"{group}")
        assert ranks(answers) == {rank}
        steps += max(answer["meta_info"]["completion_tokens"] for answer in answers)
