"""The HTTP server's end of the feed: asks the schedulers while somebody looks, and tells them all.

Knows neither SGLang nor HTTP: how schedulers are asked is given. Bounded in every direction: what
is known, what waits for a slow viewer, and how many viewers there are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from step_sglang.live.events import (
    Event,
    GroupBegan,
    Progress,
    Steps,
    TraceBegan,
    TraceEnded,
    Update,
    decode,
    encode,
)
from step_sglang.live.known import Known
from step_sglang.live.votes import Finished, VoteBoard
from step_sglang.voting.answers import Extractor
from step_sglang.voting.session import VoteSession

logger = logging.getLogger(__name__)

PERIOD = 0.2  # seconds between two updates
LINGER = 5.0  # seconds that the feed outlives its last viewer, so that a reload loses nothing
MAX_VIEWERS = 64
MAX_BEHIND = 25  # updates that wait for one viewer; then it is told everything anew
MAX_STEP_TEXT = 4000  # characters

Ask = Callable[[], Awaitable[Sequence[bytes]]]  # one answer of each replica


class _Viewer:
    def __init__(self) -> None:
        self.updates: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_BEHIND)
        self.behind = True  # is to be told everything

    def tell(self, update: bytes) -> None:
        if self.behind:
            return
        try:
            self.updates.put_nowait(update)
        except asyncio.QueueFull:
            while not self.updates.empty():
                self.updates.get_nowait()
            self.behind = True


class Hub:
    """One per HTTP server.

    Args:
        ask: asks every replica what happened since the last time.
        stop: tells them that nobody looks any more.
        read_tokens: the text of token ids.
        vote: of groups that the server does not vote on itself.
        extract: reads their answers.
    """

    def __init__(
        self,
        ask: Ask,
        stop: Callable[[], Awaitable[None]],
        read_tokens: Callable[[Sequence[int]], str],
        vote: str,
        extract: Extractor,
    ) -> None:
        self._ask, self._stop, self._read_tokens = ask, stop, read_tokens
        self._board = VoteBoard(vote, extract)
        self._known = Known()
        self._viewers: set[_Viewer] = set()
        self._loop: asyncio.Task[None] | None = None
        self._left = 0.0
        self._logged: set[type[Exception]] = set()
        self.watched = False  # somebody looks, or did a moment ago

    @property
    def full(self) -> bool:
        """Whether nobody more can look."""
        return len(self._viewers) >= MAX_VIEWERS

    def finished(self, trace: Finished) -> None:
        """A trace finished; only to be called while it is watched."""
        self._board.finished(trace)

    @contextmanager
    def following(self, session: VoteSession) -> Iterator[None]:
        """Show a vote of the server's own, while the context lasts."""
        end = self._board.follow(session)
        try:
            yield
        finally:
            end()
            if not self.watched:
                self._board.clear()

    async def watch(self) -> AsyncGenerator[bytes | None, None]:
        """Updates as JSON, the first one full; None at times when there is nothing."""
        viewer = _Viewer()
        self._viewers.add(viewer)
        self.watched = True
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        try:
            while True:
                try:
                    yield await asyncio.wait_for(viewer.updates.get(), timeout=1.0)
                except TimeoutError:
                    yield None
        finally:
            self._viewers.discard(viewer)
            self._left = time.monotonic()

    async def _run(self) -> None:
        try:
            while self._viewers or time.monotonic() - self._left < LINGER:
                began = time.monotonic()
                try:
                    await self._round()
                except Exception as error:  # the page goes on with what comes next
                    if type(error) not in self._logged:
                        self._logged.add(type(error))
                        logger.exception("STEP could not tell the live page what happened")
                    await self._begin_anew()
                await asyncio.sleep(max(0.02, PERIOD - (time.monotonic() - began)))
        finally:
            self.watched = False
            self._known = Known()
            self._board.clear()
        # Not where this task is cancelled: the server ends, and its schedulers answer nobody.
        await self._stop()

    async def _begin_anew(self) -> None:
        self._known = Known()
        for viewer in self._viewers:
            viewer.behind = True
        await self._stop()

    async def _round(self) -> None:
        answers = await self._ask()
        updates = [
            _numbered(decode(answer), place, len(answers)) for place, answer in enumerate(answers)
        ]
        known = self._known
        if known.time and any(update.full for update in updates):
            # A scheduler numbers from the start again, after a failure: begin anew with all.
            await self._begin_anew()
            return
        update = self._read(_joined(updates))
        known.apply(update)
        more: list[Event] = list(self._board.take(known, update.time))
        if (gone := known.excess()) is not None:
            more.append(gone)
        extra = replace(update, events=tuple(more), pool=())
        known.apply(extra)
        news = encode(replace(update, events=(*update.events, *more)))
        everything: bytes | None = None
        for viewer in self._viewers:
            if viewer.behind and viewer.updates.empty():
                everything = everything or encode(known.full())
                viewer.behind = False
                viewer.tell(everything)
            else:
                viewer.tell(news)

    def _read(self, update: Update) -> Update:
        """The same with texts instead of tokens."""

        def text(event: Event) -> Event:
            if not isinstance(event, Steps) or event.token_ids is None:
                return event
            texts = tuple(self._read_tokens(ids)[-MAX_STEP_TEXT:] for ids in event.token_ids)
            return replace(event, texts=texts, token_ids=None)

        return replace(update, events=tuple(map(text, update.events)))


def _numbered(update: Update, place: int, replicas: int) -> Update:
    """Numbers that no other replica uses."""
    if replicas == 1:
        return update

    def own(number: int) -> int:
        return number * replicas + place

    def renumbered(event: Event) -> Event:
        match event:
            case GroupBegan():
                return replace(event, group=own(event.group), replica=place)
            case TraceBegan():
                return replace(event, trace=own(event.trace), group=own(event.group))
            case Steps() | TraceEnded():
                return replace(event, trace=own(event.trace))
        return event

    progress = replace(update.progress, traces=tuple(map(own, update.progress.traces)))
    return replace(
        update,
        events=tuple(map(renumbered, update.events)),
        pool=tuple(replace(sample, replica=place) for sample in update.pool),
        progress=progress,
    )


def _joined(updates: Sequence[Update]) -> Update:
    """One update of several replicas'. Never full: the caller knows what that means."""
    first = updates[0]
    if len(updates) == 1:
        return replace(first, full=False)
    parts = [u.progress for u in updates]
    return Update(
        max(u.time for u in updates),
        events=tuple(event for u in updates for event in u.events),
        pool=tuple(sample for u in updates for sample in u.pool),
        progress=Progress(
            tuple(n for p in parts for n in p.traces),
            tuple(n for p in parts for n in p.tokens),
            tuple(n for p in parts for n in p.kv),
        ),
        lost=sum(u.lost for u in updates),
    )
