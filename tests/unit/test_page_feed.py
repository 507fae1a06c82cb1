"""The scheduler's answers to the live page: fail-open, from the first rank, and then nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from step_sglang import protocol
from step_sglang.live.events import decode
from step_sglang.live.feed import Feed
from step_sglang.patches import guard
from step_sglang.patches.feed import answer_feed, is_for_feed
from step_sglang.patches.pruning import own_tokens, own_tokens_of
from step_sglang.patches.state import set_trace
from step_sglang.pruning.groups import GroupRegistry, TraceStatus


def request(tokens: int = 10) -> SimpleNamespace:
    return SimpleNamespace(
        rid="r",
        output_ids=list(range(tokens)),
        origin_input_ids=[0] * 4,
        kv=SimpleNamespace(cache_protected_len=4, kv_allocated_len=4 + tokens),
    )


def scheduler_of(*reqs: SimpleNamespace, rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        running_batch=SimpleNamespace(reqs=list(reqs)),
        waiting_queue=[request()],
        chunked_req=None,
        page_size=1,
        max_total_num_tokens=100,
        tree_cache=SimpleNamespace(evictable_size=lambda: 20),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 30),
        attn_tp_group=SimpleNamespace(rank=rank, ranks=[0, 1]),
    )


def ask(scheduler: SimpleNamespace, groups: GroupRegistry, what: str = protocol.FEED_NEXT) -> bytes:
    question = SimpleNamespace(rid=what)
    assert is_for_feed(question)
    answer = answer_feed(scheduler, SimpleNamespace(groups=groups), question)
    return bytes(answer.internal_state[protocol.FEED])


def watched() -> tuple[SimpleNamespace, GroupRegistry]:
    groups, traced = GroupRegistry(), request()
    set_trace(traced, groups.join("q", rid="r"))
    return scheduler_of(traced, request()), groups


def test_other_questions_are_not_for_the_feed() -> None:
    assert not is_for_feed(SimpleNamespace(rid=None))


def test_an_answer_has_the_traces_that_were_there_and_the_pool() -> None:
    scheduler, groups = watched()
    update = decode(ask(scheduler, groups))
    assert [event.kind for event in update.events] == ["group", "trace"]
    assert update.progress.tokens == (10,) and update.progress.kv == (10,)
    (pool,) = update.pool
    assert (pool.used, pool.cached, pool.size) == (50, 20, 100)
    assert (pool.running, pool.waiting) == (2, 1)
    assert not decode(ask(scheduler, groups)).full


def test_nothing_is_noted_once_nobody_looks() -> None:
    scheduler, groups = watched()
    ask(scheduler, groups)
    assert groups.watcher is not None
    assert ask(scheduler, groups, protocol.FEED_STOP) == b""
    assert groups.watcher is None


def test_a_rank_that_is_not_heard_does_nothing() -> None:
    _, groups = watched()
    assert ask(scheduler_of(rank=1), groups) == b""
    assert groups.watcher is None


def test_what_fails_costs_the_feed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_counts", guard.Counter())
    scheduler, groups = watched()
    ask(scheduler, groups)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    for name in ("joined", "ended", "take"):
        monkeypatch.setattr(Feed, name, fail)
    trace = groups.join("q", rid="other")
    groups.end(trace, TraceStatus.FINISHED)
    assert groups.num_live == 1
    assert ask(scheduler, groups) == b""
    assert groups.watcher is None
    assert guard.counts() == {protocol.IN_PAGE: 3}


def test_tokens_of_many_are_those_of_each() -> None:
    draw = random.Random(0)
    reqs = [
        SimpleNamespace(
            origin_input_ids=[0] * draw.randrange(50),
            kv=SimpleNamespace(
                cache_protected_len=draw.randrange(50), kv_allocated_len=draw.randrange(50, 200)
            ),
        )
        for _ in range(200)
    ]
    for page in (1, 16):
        assert own_tokens_of(reqs, page) == [own_tokens(req, page) for req in reqs]
