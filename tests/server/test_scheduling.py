"""Priorities and scheduling policies on a server that prunes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.expected import assert_scores
from tests.server.launch import Server, serve
from tests.server.pruned import (
    POOL,
    PROMPT,
    group,
    nothing_is_left,
    split,
    start,
    wait_until,
)

pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture(scope="module")
def priority(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--enable-priority-scheduling", "--retraction-policy", "priority"),
        # Reserve next to nothing for what runs, so that ordinary requests come to retraction too.
        *("--schedule-conservativeness", "0.01", "--max-running-requests", "8"),
        *("--step-max-groups", "1"),
        log=tmp_path_factory.mktemp("log") / "priority.log",
    ) as server:
        yield server


def test_a_high_priority_starts_among_traces(priority: Server, threads: ThreadPoolExecutor) -> None:
    """Neither memory nor a slot is free; traces are preempted for slots and pruned for memory."""
    filling = start(priority, threads, n=48, tokens=600, body={"priority": 1})

    def ordinary(first: int) -> dict:
        return priority.generate(
            input_ids=[40 + (first + i) % 200 for i in range(100)],
            priority=100,
            sampling_params={"temperature": 0, "max_new_tokens": 10, "ignore_eos": True},
        )

    for _ in range(3):
        for answer in threads.map(ordinary, range(4)):
            assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert not filling.done()
    traces = filling.result()
    split(traces, 48)
    assert sum(a["meta_info"]["num_retractions"] for a in traces) > 0
    nothing_is_left(priority)


def test_retraction_by_priority(
    priority: Server,
    threads: ThreadPoolExecutor,
    models: dict[str, Path],
    scorer: Path,
) -> None:
    """Where no trace may be pruned SGLang retracts, by priority; scores survive it."""

    # SGLang reserves all of what a request generates that ignores the end token.
    def length(tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": tokens, "min_new_tokens": tokens, "ignore_eos": False}

    def ordinary(_: int) -> dict:
        return priority.generate(
            input_ids=PROMPT,
            priority=100,
            sampling_params={"temperature": 0, **length(400)},
        )

    futures = [threads.submit(ordinary, i) for i in range(2)]
    step, body = {"min_survivors": 6}, {"priority": 1}
    traces = group(priority, n=6, step=step, body=body, **length(300))
    answers = [future.result() for future in futures]
    assert "KV cache pool is full. Retract requests." in priority.log_text()
    assert [a["meta_info"]["step"]["pruned"] for a in traces] == [False] * 6
    assert sum(a["meta_info"]["num_retractions"] for a in traces) > 0
    assert [a["meta_info"]["num_retractions"] for a in answers] == [0] * 2
    for trace in traces:
        assert trace["meta_info"]["finish_reason"] == {"type": "length", "length": 300}
        assert_scores(models["qwen3"], scorer, PROMPT, trace)
    nothing_is_left(priority)


def test_groups_that_wait_for_others_begin_by_priority(
    priority: Server, threads: ThreadPoolExecutor
) -> None:
    def send(name: str, tokens: int, value: int) -> Future[list[dict]]:
        step, body = {"group": name}, {"priority": value}
        return threads.submit(group, priority, n=2, tokens=tokens, step=step, body=body)

    def waiting() -> int:
        state: dict[str, int] = priority.info()["internal_states"][0]["step"]
        return state["groups_waiting"]

    first = send("first", 500, 50)
    wait_until(lambda: priority.info()["internal_states"][0]["step"]["groups_begun"] == 1)
    low = send("low", 300, 1)
    wait_until(lambda: waiting() == 1)
    high = send("high", 20, 40)
    wait_until(lambda: waiting() == 2)
    assert not first.done()
    assert len(high.result()) == 2  # though it came later
    assert first.done() and not low.done()
    assert len(low.result()) == 2
    nothing_is_left(priority)


# `lpm` and `fcfs` are those of the servers above; SGLang itself knows no policy `priority`.
@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["random", "dfs-weight", "lof", "routing-key", "hrrn", "shortest-prefill-first"]
)
def test_schedule_policies(
    models: dict[str, Path], scorer: Path, tmp_path: Path, threads: ThreadPoolExecutor, policy: str
) -> None:
    """Groups and ordinary requests at once, more than there are slots for."""
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "40", "--schedule-policy", policy),
        log=tmp_path / f"{policy}.log",
    ) as server:
        futures = [threads.submit(group, server, step={"group": f"g{i}"}) for i in range(3)]
        ordinary = [
            threads.submit(
                server.generate,
                input_ids=PROMPT[i:],
                sampling_params={"temperature": 0, "max_new_tokens": 40, "ignore_eos": True},
            )
            for i in range(8)
        ]
        for future in futures:
            split(future.result())
        for future in ordinary:
            assert future.result()["meta_info"]["completion_tokens"] == 40
        nothing_is_left(server)
