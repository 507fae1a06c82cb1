"""The scheduler's answer to whoever shows the live page: what happened since the last one.

Asked by a question about its internal state, which every scheduler gets in its turn between two
forward passes; an id says that the feed is meant, and then nothing else is put together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from step_sglang import protocol
from step_sglang.live.events import PoolSample, encode
from step_sglang.live.feed import Feed
from step_sglang.patches.guard import guard
from step_sglang.patches.pruning import own_tokens_of
from step_sglang.patches.state import TRACE, SchedulerStep, trace_of
from step_sglang.pruning.groups import Trace


class _OpenFeed:
    """A feed that costs nobody anything but itself when it fails."""

    def __init__(self) -> None:
        self.feed = Feed()

    @guard(protocol.IN_PAGE)
    def joined(self, trace: Trace) -> None:
        self.feed.joined(trace)

    @guard(protocol.IN_PAGE)
    def scored(self, trace: Trace, position: int, score: float, output_ids: Sequence[int]) -> None:
        self.feed.scored(trace, position, score, output_ids)

    @guard(protocol.IN_PAGE)
    def ended(self, trace: Trace) -> None:
        self.feed.ended(trace)

    @guard(protocol.IN_PAGE)
    def freed(self, trace: Trace, tokens: int) -> None:
        self.feed.freed(trace, tokens)


def is_for_feed(recv_req: Any) -> bool:
    """Whether a question about the internal state is for the feed."""
    return recv_req.rid in (protocol.FEED_NEXT, protocol.FEED_STOP)


def answer_feed(scheduler: Any, state: SchedulerStep, recv_req: Any) -> Any:
    """SGLang's answer, with the next update under ``protocol.FEED``; empty where that failed."""
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    update = b""
    ranks = scheduler.attn_tp_group
    # Only the first of several ranks with the same requests is heard.
    if recv_req.rid == protocol.FEED_STOP or ranks.rank != ranks.ranks[0]:
        state.groups.watcher = None
    else:
        with guard(protocol.IN_PAGE) as taking:
            update = _next_update(scheduler, state)
        if taking.failed:
            state.groups.watcher = None
    return GetInternalStateReqOutput(internal_state={protocol.FEED: update})


def _next_update(scheduler: Any, state: SchedulerStep) -> bytes:
    watcher = state.groups.watcher
    running, page = scheduler.running_batch.reqs, scheduler.page_size
    if not isinstance(watcher, _OpenFeed):
        watcher = state.groups.watcher = _OpenFeed()
        chunked = () if scheduler.chunked_req is None else (scheduler.chunked_req,)
        for req in (*running, *chunked, *scheduler.waiting_queue):
            if (trace := trace_of(req)) is not None:
                watcher.feed.joined(trace, len(req.output_ids))
    reqs = [req for req in running if hasattr(req, TRACE)]
    return encode(
        watcher.feed.take(
            [getattr(req, TRACE) for req in reqs],
            [len(req.output_ids) for req in reqs],
            own_tokens_of(reqs, page),
            _pool(scheduler),
        )
    )


def _pool(scheduler: Any) -> PoolSample:
    cached = int(scheduler.tree_cache.evictable_size())
    free = int(scheduler.token_to_kv_pool_allocator.available_size())
    size = int(scheduler.max_total_num_tokens)
    return PoolSample(
        time=time.time(),
        used=max(0, size - free - cached),
        cached=cached,
        size=size,
        running=len(scheduler.running_batch.reqs),
        waiting=len(scheduler.waiting_queue),
    )
