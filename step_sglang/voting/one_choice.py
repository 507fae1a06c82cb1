"""One-choice answers: a request that asks for a vote becomes a group, and one trace answers it.

Runs the group of such a request on a stream of chunks that the caller gives, and forms the one
answer. Knows nothing of SGLang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from step_sglang import protocol
from step_sglang.voting.answers import extractor_named
from step_sglang.voting.request import VoteRequest
from step_sglang.voting.session import SampledTrace, TraceFate, VoteOutcome, VoteSession
from step_sglang.voting.verifier import Comparison

_POLL = 0.25  # seconds between two looks at a connection, or at a silent group
KEEP_ALIVE = 1.0  # seconds between two comments of a streamed answer


@dataclass
class VoteProgress:
    """The groups behind one request, for whoever keeps its connection alive."""

    sessions: list[VoteSession] = field(default_factory=list)

    def comment(self) -> str | None:
        """A server-sent-events comment; None before the first chunk, when all can still fail."""
        if not any(t.first_chunk is not None for g in self.sessions for t in g.traces):
            return None
        counts = ", ".join(
            f"{sum(g.num(fate) for g in self.sessions)} {fate.value}"
            for fate in (TraceFate.RUNNING, TraceFate.FINISHED, TraceFate.PRUNED)
        )
        return f": step {counts}\n\n"


async def run(
    chunks: AsyncGenerator[dict[str, Any], None],
    session: VoteSession,
    check: Callable[[dict[str, Any]], None],
    connected: Callable[[], Any] | None,
    comparison: Comparison,
    is_aborted: Callable[[], bool] = lambda: False,
    end: Callable[[list[str]], object] = lambda ids: None,
) -> dict[int, dict[str, Any]]:
    """Consume a group until it is decided or aborted; closing ``chunks`` cancels the rest.

    Args:
        chunks: of a streamed ``/generate`` answer.
        session: takes them over.
        check: raises for a chunk that is an error.
        connected: awaited now and then; raises when the client is gone.
        comparison: compares the answers.
        is_aborted: whether the group is to end now.
        end: ends single traces by their ids, soon.

    Returns:
        The last chunk of every trace that sent one.
    """
    last: dict[int, dict[str, Any]] = {}
    looked = time.monotonic()
    # Closed in the other order: the ticks first, which wait for a chunk.
    async with aclosing(chunks), aclosing(_with_ticks(chunks)) as ticks:
        async for chunk in ticks:
            if is_aborted():
                break
            if connected is not None and time.monotonic() - looked > _POLL:
                looked = time.monotonic()
                await connected()
            if chunk is None:
                continue
            check(chunk)
            last[chunk.get("index", 0)] = chunk
            if session.feed(chunk):
                await _count(session, comparison, connected, is_aborted)
                if session.decided():
                    break
                if ended := session.surplus():
                    end(ended)
    session.cancel()
    return last


async def _count(
    session: VoteSession,
    comparison: Comparison,
    connected: Callable[[], Any] | None,
    is_aborted: Callable[[], bool],
) -> None:
    """Count what ended; it may take long, so look now and then whether it is still wanted."""
    counting = asyncio.ensure_future(comparison.arun(session.counting()))
    try:
        while not (await asyncio.wait({counting}, timeout=_POLL))[0]:
            if connected is not None:
                await connected()
            if is_aborted():
                comparison.stop()
        counting.result()
    finally:
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)


def one_choice(
    session: VoteSession,
    last: Mapping[int, dict[str, Any]],
    rid: str,
    *,
    aborted: Mapping[str, Any] | None = None,
    before_start: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The answer to the request: the best trace of the winning answer, with the usage of all.

    Args:
        session: the group, at its end.
        last: the last chunk of every trace that sent one.
        rid: the request's id.
        aborted: the finish reason of a request that was aborted.
        before_start: makes the answer where no trace sent anything.
    """
    outcome = session.outcome()
    if outcome.best is None:
        assert before_start is not None
        chunk = before_start()
        info = chunk["meta_info"]
    else:
        trace = session.traces[outcome.best]
        chunk = {key: value for key, value in last[outcome.best].items() if key != "index"}
        # SGLang's list of a trace that runs goes on growing; the text is that of these tokens.
        chunk["text"] = trace.text
        chunk["output_ids"] = list(trace.output_ids[: trace.num_ids])
        info = {**chunk["meta_info"], **_usage(session), "id": rid}
        if aborted is not None:
            info["finish_reason"] = dict(aborted)
        elif info.get("finish_reason") is None:
            info["finish_reason"] = {"type": "abort", "message": "no trace finished"}
        info["e2e_latency"] = time.perf_counter() - session.started
    step = dict(info.get(protocol.META_KEY) or {})
    step[protocol.META_VOTE] = _vote_info(session, outcome)
    info[protocol.META_KEY] = step
    return {**chunk, "meta_info": info}


def _vote_info(session: VoteSession, outcome: VoteOutcome) -> dict[str, Any]:
    return {
        "status": outcome.status.value,
        "answer": outcome.answer,
        "share": outcome.share,
        "vote": session.rules.vote,
        "traces": len(session.traces),
        "text_only": outcome.text_only,
        **{fate.value: session.num(fate) for fate in TraceFate if fate is not TraceFate.RUNNING},
        "answers": [
            {"answer": t.answer, "weight": t.weight, "count": t.count} for t in outcome.tallies
        ],
    }


async def not_voted(chunks: AsyncGenerator[Any, None], why: str) -> AsyncGenerator[Any, None]:
    """The answers to a request that could not be voted, each with a note that says why."""
    note = {
        "status": protocol.NOT_VOTED, "message": f"not voted: {why}",
        "answer": None, "share": 0.0, "traces": 1,
    }  # fmt: skip
    async with aclosing(chunks):
        async for chunk in chunks:
            for answer in chunk if isinstance(chunk, list) else [chunk]:
                step = answer["meta_info"].get(protocol.META_KEY) or {}
                answer["meta_info"][protocol.META_KEY] = {**step, protocol.META_VOTE: note}
            yield chunk


async def kept_alive(
    chunks: AsyncGenerator[Any, None],
    comment: Callable[[], str | None],
    encode: Callable[[str], Any],
) -> AsyncGenerator[Any, None]:
    """The same chunks, with a comment every :data:`KEEP_ALIVE` seconds in between."""
    said = 0.0
    async with aclosing(chunks), aclosing(_with_ticks(chunks)) as ticks:
        async for chunk in ticks:
            if chunk is not None:
                yield chunk
            elif time.monotonic() - said > KEEP_ALIVE:
                text = comment()
                if text is not None:
                    said = time.monotonic()
                    yield encode(text)


async def _with_ticks(chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The chunks, and None whenever nothing came for a while."""
    pending: asyncio.Task[Any] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait({pending}, timeout=_POLL)
            if not done:
                yield None
                continue
            finished, pending = pending, None
            try:
                chunk = finished.result()
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        if pending is not None:
            # The generator is busy until its task has ended; only then can it be closed.
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def session_of(wish: VoteRequest, max_new_tokens: int | None) -> VoteSession:
    """What gathers the group of such a request."""
    extract = extractor_named(wish.extract)
    return VoteSession(wish.traces, wish.rules, extract, max_new_tokens)


def _usage(session: VoteSession) -> dict[str, int]:
    """Generated tokens of all traces, as far as reported; the prompt counts once."""

    def tokens(trace: SampledTrace) -> int:
        return int(trace.meta_info.get("reasoning_tokens") or 0)

    return {
        "completion_tokens": sum(trace.tokens for trace in session.traces),
        "reasoning_tokens": sum(tokens(trace) for trace in session.traces),
    }
