"""Who starts next on the real server: no kind of request starves, and limits of what runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from step_sglang.client.abort import abort_group
from step_sglang.pruning.admission import PATIENCE
from tests.server.idle import free_tokens, step_state
from tests.server.launch import Server, serve
from tests.server.pruned import wait_until

pytestmark = pytest.mark.server

SLOTS = 16
PROMPT = list(range(40, 60))


def send(server: Server, tokens: int, n: int = 1, **custom: Any) -> Any:
    return server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "custom_params": custom,
        },
    )


class Load:
    """Clients that send the next request as soon as the last is answered."""

    def __init__(self, clients: int, request: Callable[[], Any]) -> None:
        self.answered = 0
        self._request, self._stop, self._lock = request, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def _run(self) -> None:
        while not self._stop.is_set():
            self._request()
            with self._lock:
                self.answered += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.answered >= len(self._threads))
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answered_until(self, future: Future[Any], most: int) -> int:
        """How many it was answered until then; at most so many."""
        before = self.answered
        while not wait((future,), timeout=0.02).done:
            assert self.answered - before <= most, "it starves"
        return self.answered - before


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


@pytest.fixture(scope="module")
def slots(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Few slots, and memory for all: what is short are slots."""
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "8192"),
        *("--max-running-requests", str(SLOTS)),
        log=tmp_path_factory.mktemp("log") / "slots.log",
    ) as running:
        yield running


def in_flight(admissions: int) -> int:
    """Answers of a load until so many were admitted, which then run; twice, for the clients."""
    return admissions + 3 * SLOTS


def test_an_ordinary_request_starts_among_new_groups_without_end(slots, threads) -> None:
    with Load(80, lambda: send(slots, 20, step=True)) as load:
        ordinary = threads.submit(send, slots, 10, step=False)
        count = load.answered_until(ordinary, in_flight(PATIENCE + 3))
    print(f"{count} others were answered before it")
    assert ordinary.result()["meta_info"]["finish_reason"]["type"] == "length"


def test_a_group_ends_among_new_groups_and_ordinary_requests_without_end(slots, threads) -> None:
    """The first of its members are a new group's; the others wait in the line of a running one."""
    members = 2 * SLOTS
    with (
        Load(40, lambda: send(slots, 20, step=True)) as new,
        Load(40, lambda: send(slots, 20, step=False)) as ordinary,
    ):
        both = new.answered
        group = threads.submit(send, slots, 10, n=members, step={"min_survivors": members})
        most = in_flight(members * (PATIENCE + 3))
        count = ordinary.answered_until(group, most) + new.answered - both
    print(f"{count} others were answered before it")
    assert count <= 2 * most
    assert len(group.result()) == members
    assert all(a["meta_info"]["finish_reason"]["type"] == "length" for a in group.result())


def test_a_new_group_starts_among_ordinary_requests_without_end(slots, threads) -> None:
    with Load(80, lambda: send(slots, 20, step=False)) as load:
        group = threads.submit(send, slots, 10, n=4)
        load.answered_until(group, in_flight(4 * (PATIENCE + 3)))
    assert len(group.result()) == 4
    wait_until(lambda: step_state(slots)["live_traces"] == 0)
    assert free_tokens(slots) == 8192


@pytest.fixture(scope="module")
def limited(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "8192"),
        *("--step-max-groups", "2", "--step-max-batch", "12", "--decode-log-interval", "1"),
        log=tmp_path_factory.mktemp("log") / "limited.log",
    ) as running:
        yield running


def test_groups_run_two_at_a_time(limited, threads) -> None:
    groups = [threads.submit(send, limited, 60, n=4, step={"group": f"g{i}"}) for i in range(6)]
    begun = [0]
    while not all(group.done() for group in groups):
        state = step_state(limited)
        begun.append(state["groups_begun"])
        assert state["groups_begun"] <= 2
        assert state["groups_waiting"] <= 4
    assert max(begun) == 2
    assert step_state(limited)["groups_waiting"] == 0
    assert all(len(group.result()) == 4 for group in groups)


def test_a_member_joins_its_group_while_others_wait(limited, threads) -> None:
    """And an ordinary request, a lone trace, and a group that is not pruned wait for nobody."""
    running = [threads.submit(send, limited, 400, n=2, step={"group": f"r{i}"}) for i in range(2)]
    wait_until(lambda: step_state(limited)["groups_begun"] == 2)
    waiting = threads.submit(send, limited, 5, n=2, step={"group": "late"})
    wait_until(lambda: step_state(limited)["groups_waiting"] == 1)
    send(limited, 5, step={"group": "r1"})
    send(limited, 5, step=True)
    send(limited, 5, step=False)
    send(limited, 5, n=2, step={"group": "slim", "baseline": {"name": "slim-sc"}})
    assert not waiting.done()
    assert not any(group.done() for group in running)
    assert len(waiting.result()) == 2
    assert any(group.done() for group in running)


def test_a_group_that_is_aborted_while_it_waits_leaves_nothing(limited, threads) -> None:
    running = [threads.submit(send, limited, 300, n=2, step={"group": f"a{i}"}) for i in range(2)]
    wait_until(lambda: step_state(limited)["groups_begun"] == 2)
    waiting = threads.submit(send, limited, 5, n=3, step={"group": "gone"})
    wait_until(lambda: step_state(limited)["groups_waiting"] == 1)
    assert abort_group(limited.url, "gone") == 3
    assert {a["meta_info"]["finish_reason"]["type"] for a in waiting.result()} == {"abort"}
    wait_until(lambda: step_state(limited)["groups_waiting"] == 0)
    for group in running:
        assert len(group.result()) == 2
    wait_until(lambda: step_state(limited)["live_traces"] == 0)
    assert free_tokens(limited) == 8192


def in_grammar(server: Server, groups: int, members: int, regex: str, tokens: int) -> list[Any]:
    """The answers of so many groups, whose members are requests of their own in one body."""
    names = [f"grammar {i}" for i in range(groups) for _ in range(members)]
    return server.generate(
        input_ids=[PROMPT] * len(names),
        sampling_params=[
            {
                "max_new_tokens": tokens,
                "regex": regex + name[-1],
                "custom_params": {"step": {"group": name}},
            }
            for name in names
        ],
    )


def test_limits_hold_for_requests_that_waited_for_their_grammar(limited, threads) -> None:
    """SGLang puts them into the queue in the middle of a pass, and tries them in it."""
    start = len(limited.log_text())
    answers = threads.submit(in_grammar, limited, 6, 4, "([a-f]{2,9}x){60}", 60)
    begun = [0]
    while not answers.done():
        begun.append(step_state(limited)["groups_begun"])
    assert len(answers.result()) == 24
    assert max(begun) == 2
    running = [int(n) for n in re.findall(r"#running-req: (\d+)", limited.log_text()[start:])]
    assert max(running) <= 12


def test_what_cannot_run_does_not_wait_for_its_turn(limited, threads) -> None:
    """A grammar that SGLang refuses is answered, though the group may not begin yet."""
    running = [threads.submit(send, limited, 400, n=2, step={"group": f"r{i}"}) for i in range(2)]
    wait_until(lambda: step_state(limited)["groups_begun"] == 2)
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"regex": "([a-", "custom_params": {"step": {"group": "refused"}}},
    }
    for _ in range(2):  # the second time SGLang knows at once
        assert limited.post("/generate", body).status_code == 400
    assert not any(group.done() for group in running)
    for group in running:
        group.result()


def test_a_batch_with_traces_stays_within_its_limit(limited, threads) -> None:
    start = len(limited.log_text())
    group = threads.submit(send, limited, 60, n=40)
    assert len(group.result()) == 40
    running = [int(n) for n in re.findall(r"#running-req: (\d+)", limited.log_text()[start:])]
    assert max(running) == 12
    # Ordinary requests are not held back, and half of the limit is for traces beside them.
    start = len(limited.log_text())
    ordinary = threads.submit(send, limited, 400, n=14, step=False)  # they come together
    wait_until(lambda: "#running-req: 14" in limited.log_text()[start:])
    traces = send(limited, 10, n=8)
    assert len(traces) == 8
    assert not ordinary.done()
    running = [int(n) for n in re.findall(r"#running-req: (\d+)", limited.log_text()[start:])]
    assert 14 < max(running) <= 14 + 6
    assert len(ordinary.result()) == 14
