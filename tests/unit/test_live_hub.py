"""The HTTP server's end of the feed: viewers, replicas, failures and votes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from step_sglang.live import hub as hub_module
from step_sglang.live.events import PoolSample, Update, VoteStood, decode, encode
from step_sglang.live.feed import Feed
from step_sglang.live.hub import Hub
from step_sglang.live.known import Known
from step_sglang.live.votes import Finished
from step_sglang.pruning.groups import GroupRegistry, TraceStatus
from step_sglang.voting.answers import extractor_named

POOL = PoolSample(1.0, 10, 0, 100, 1, 0)


class Replica:
    """A scheduler's side, without a scheduler."""

    def __init__(self) -> None:
        self.groups = GroupRegistry()
        self.asked = 0
        self.stopped = 0

    def next(self) -> bytes:
        self.asked += 1
        if self.groups.watcher is None:
            self.groups.watcher = Feed()
        watcher = self.groups.watcher
        assert isinstance(watcher, Feed)
        return encode(watcher.take([], [], [], POOL))


def hub_of(*replicas: Replica) -> Hub:
    async def ask() -> Sequence[bytes]:
        return [replica.next() for replica in replicas]

    async def stop() -> None:
        for replica in replicas:
            replica.groups.watcher = None
            replica.stopped += 1

    return Hub(ask, stop, lambda ids: "".join(map(chr, ids)), "weighted", extractor_named("boxed"))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "PERIOD", 0.03)
    monkeypatch.setattr(hub_module, "LINGER", 0.1)


async def updates(hub: Hub, count: int) -> list[Update]:
    found: list[Update] = []
    async with aclosing(hub.watch()) as stream:
        async for update in stream:
            if update is not None:
                found.append(decode(update))
            if len(found) == count:
                break
    return found


def test_nothing_is_asked_before_the_first_viewer_and_after_the_last() -> None:
    async def run() -> None:
        replica = Replica()
        hub = hub_of(replica)
        await asyncio.sleep(0.1)
        assert replica.asked == 0 and not hub.watched
        await updates(hub, 3)
        assert hub.watched, "a reload must not lose what is known"
        await asyncio.sleep(0.3)
        asked = replica.asked
        assert replica.stopped == 1 and not hub.watched
        await asyncio.sleep(0.1)
        assert replica.asked == asked

    asyncio.run(run())


def test_two_viewers_see_the_same_and_the_later_everything() -> None:
    async def run() -> None:
        replica = Replica()
        hub = hub_of(replica)
        first = asyncio.create_task(updates(hub, 8))
        await asyncio.sleep(0.1)
        trace = replica.groups.join("q", rid="r")
        await asyncio.sleep(0.1)
        second = await updates(hub, 1)
        assert second[0].full
        assert [event.kind for event in second[0].events] == ["group", "trace"]
        assert replica.stopped == 0
        found = await first
        assert found[0].full and not any(update.full for update in found[1:])
        assert sum(len(update.events) for update in found) == 2
        replica.groups.end(trace, TraceStatus.FINISHED)

    asyncio.run(run())


def test_replicas_do_not_share_numbers() -> None:
    async def run() -> None:
        replicas = [Replica(), Replica(), Replica()]
        hub = hub_of(*replicas)
        looking = asyncio.create_task(updates(hub, 10))
        await asyncio.sleep(0.08)
        for place, replica in enumerate(replicas):
            for number in range(4):
                replica.groups.join(f"q{place}", rid=f"{place}.{number}")
        known = Known()
        for update in await looking:
            known.apply(update)
        assert len(known.traces) == 12
        assert {group.began.replica for group in known.groups.values()} == {0, 1, 2}
        for group in known.groups.values():
            assert len(group.traces) == 4
            assert group.began.name == f"q{group.began.replica}"

    asyncio.run(run())


def test_a_scheduler_that_fails_costs_the_history_and_not_the_stream() -> None:
    async def run() -> None:
        replica = Replica()
        hub = hub_of(replica)
        looking = asyncio.create_task(updates(hub, 12))
        await asyncio.sleep(0.1)
        replica.groups.join("q", rid="r")
        await asyncio.sleep(0.05)
        replica.groups.watcher = None  # as it does when taking the feed fails
        found = await looking
        assert sum(update.full for update in found) == 2
        assert replica.stopped >= 1

    asyncio.run(run())


def test_a_viewer_that_does_not_read_holds_a_bounded_number_of_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "MAX_BEHIND", 5)

    async def run() -> None:
        hub = hub_of(Replica())
        async with aclosing(hub.watch()) as stream:
            first = await anext(stream)
            assert first is not None and decode(first).full
            await asyncio.sleep(0.6)
            (viewer,) = hub._viewers
            assert viewer.updates.qsize() <= 5
            seen = [await anext(stream) for _ in range(8)]
            assert any(update is not None and decode(update).full for update in seen)

    asyncio.run(run())


def test_answers_become_a_vote_that_settles() -> None:
    async def run() -> None:
        replica = Replica()
        hub = hub_of(replica)
        looking = asyncio.create_task(updates(hub, 20))
        await asyncio.sleep(0.08)
        traces = [replica.groups.join("q", rid=f"r{i}", samples=3) for i in range(3)]
        for trace in traces[:2]:
            trace.add_step(1.0, 1.0, 0)
            replica.groups.end(trace, TraceStatus.FINISHED)
            hub.finished(Finished(trace.rid, trace.score, None, lambda: r"\boxed{7}"))
        await asyncio.sleep(0.1)
        replica.groups.end(traces[2], TraceStatus.PRUNED)
        votes = [e for u in await looking for e in u.events if isinstance(e, VoteStood)]
        assert [bar.answer for bar in votes[-1].bars] == ["7"]
        assert votes[-1].bars[0].count == 2 and votes[-1].bars[0].weight == 2.0
        assert votes[-1].settled and votes[-1].as_text

    asyncio.run(run())


def test_token_ids_become_text() -> None:
    async def run() -> None:
        replica = Replica()
        hub = hub_of(replica)
        looking = asyncio.create_task(updates(hub, 6))
        await asyncio.sleep(0.08)
        trace = replica.groups.join("q", rid="r", show_text=True)
        assert replica.groups.watcher is not None
        replica.groups.watcher.scored(trace, 1, 0.5, [72, 105])
        steps = [e for u in await looking for e in u.events if e.kind == "steps"]
        assert steps[0].texts == ("Hi",) and steps[0].token_ids is None

    asyncio.run(run())


def test_a_server_that_ends_is_not_held_by_schedulers_that_are_gone() -> None:
    async def run() -> None:
        replica, gone = Replica(), asyncio.Event()

        async def ask() -> Sequence[bytes]:
            if gone.is_set():
                await asyncio.Future()
            return [replica.next()]

        async def stop() -> None:
            await asyncio.Future()

        hub = Hub(ask, stop, str, "weighted", extractor_named("boxed"))
        await updates(hub, 1)
        gone.set()
        await asyncio.sleep(0.05)
        loop = hub._loop
        assert loop is not None
        loop.cancel()  # as the end of an event loop does
        done, _ = await asyncio.wait({loop}, timeout=2)
        assert done and not hub.watched

    asyncio.run(run())
