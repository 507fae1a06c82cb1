"""One-choice answers: a request that asks for a vote becomes a group, and one trace answers it.

Reads what the request says (``custom_params.step.traces`` and its companions), runs the group on a
stream of chunks that the caller gives, and forms the one answer. Knows nothing of SGLang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError, VoteError, safe_repr
from step_sglang.voting.answers import extractor_named
from step_sglang.voting.early_stopping import DEFAULT_THRESHOLD
from step_sglang.voting.session import (
    STREAM_INTERVAL,
    SampledTrace,
    TraceFate,
    VoteRules,
    VoteSession,
)
from step_sglang.voting.tally import Same

MAX_TRACES = 4096
_POLL = 0.25  # seconds between two looks at a connection, or at a silent group
KEEP_ALIVE = 1.0  # seconds between two comments of a streamed answer


@dataclass(frozen=True)
class VoteRequest:
    """A request's wish for one voted answer."""

    traces: int
    rules: VoteRules
    extract: str = "boxed"
    by_default: bool = False  # asked for by the server's configuration


def parse_vote(params: Mapping[str, Any], config: StepConfig) -> VoteRequest | None:
    """What a request's sampling parameters, and the server's default, say of a vote.

    The default applies to ordinary requests alone: one sample that generates something and says
    nothing else of STEP.

    Raises:
        RequestError: a member has a wrong type or value, or contradicts another.
    """
    step = _step(params)
    given = {} if step is None else {key: step[key] for key in protocol.VOTE_MEMBERS if key in step}
    by_default = protocol.TRACES not in given
    if by_default:
        ordinary = (
            config.traces > 1
            and params.get("n", 1) in (1, None)
            and (params.get("beam_width") or 1) == 1
            and params.get("max_new_tokens", 1) != 0
            and set(step or ()) <= set(protocol.VOTE_MEMBERS)
            and (_value(params) is None or step is not None)
        )
        if not ordinary:
            if given:
                raise RequestError(
                    f"custom_params.step.{next(iter(given))} needs traces beside it, the number "
                    "of traces to vote"
                )
            return None
    elif params.get("n", 1) not in (1, None):
        raise RequestError("custom_params.step.traces returns one choice: it needs n = 1")
    traces = given.get(protocol.TRACES, config.traces)
    if not isinstance(traces, int) or isinstance(traces, bool) or not 1 <= traces <= MAX_TRACES:
        raise RequestError(
            f"custom_params.step.traces must be an integer from 1 to {MAX_TRACES}, "
            f"not {safe_repr(traces)}"
        )
    if not by_default and traces > 1 and params.get("temperature") == 0:
        raise RequestError(
            "custom_params.step.traces needs a temperature above 0: at 0 all traces are the same"
        )
    extract = given.get(protocol.EXTRACT, config.extract)
    try:
        extractor_named(extract)
        rules = VoteRules(
            vote=given.get(protocol.VOTE, config.vote),
            early=given.get(protocol.EARLY, "exact"),
            threshold=given.get(protocol.THRESHOLD, DEFAULT_THRESHOLD),
        )
    except VoteError as error:
        raise RequestError(f"custom_params.step: {error}") from error
    return VoteRequest(traces, rules, extract, by_default)


def trace_params(
    params: Mapping[str, Any], wish: VoteRequest, config: StepConfig
) -> dict[str, Any]:
    """Sampling parameters of the group that such a request becomes."""
    step = _step(params) or {}
    rest = {key: value for key, value in step.items() if key not in protocol.VOTE_MEMBERS}
    changed: dict[str, Any] = {
        "n": wish.traces,
        "stream_interval": STREAM_INTERVAL,
        "custom_params": {**(params.get("custom_params") or {}), protocol.REQUEST_KEY: rest},
    }
    if wish.by_default and params.get("temperature") == 0:
        changed["temperature"] = config.temperature
    return {**params, **changed}


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
) -> dict[int, dict[str, Any]]:
    """Consume a group until its vote is decided; closing ``chunks`` cancels the rest.

    Args:
        chunks: of a streamed ``/generate`` answer.
        session: takes them over.
        check: raises for a chunk that is an error.
        connected: awaited now and then; raises when the client is gone.

    Returns:
        The last chunk of every trace that sent one.
    """
    last: dict[int, dict[str, Any]] = {}
    looked = time.monotonic()
    # Closed in the other order: the ticks first, which wait for a chunk.
    async with aclosing(chunks), aclosing(_with_ticks(chunks)) as ticks:
        async for chunk in ticks:
            if connected is not None and time.monotonic() - looked > _POLL:
                looked = time.monotonic()
                await connected()
            if chunk is None:
                continue
            check(chunk)
            last[chunk.get("index", 0)] = chunk
            if session.feed(chunk):
                # Comparing answers may take long: not on the event loop.
                await asyncio.to_thread(session.count)
                if session.decided():
                    break
    session.cancel()
    return last


def one_choice(session: VoteSession, last: dict[int, dict[str, Any]], rid: str) -> dict[str, Any]:
    """The answer to the request: the best trace of the winning answer, with the usage of all."""
    outcome = session.outcome()
    assert outcome.best is not None
    trace = session.traces[outcome.best]
    chunk = {key: value for key, value in last[outcome.best].items() if key != "index"}
    info = {**chunk["meta_info"], **_usage(session, last), "id": rid}
    if info.get("finish_reason") is None:
        info["finish_reason"] = {"type": "abort", "message": "no trace finished"}
    info["e2e_latency"] = time.perf_counter() - session.started
    step = dict(info.get(protocol.META_KEY) or {})
    step[protocol.META_VOTE] = {
        "status": outcome.status.value,
        "answer": outcome.answer,
        "share": outcome.share,
        "vote": session.rules.vote,
        "traces": len(session.traces),
        **{fate.value: session.num(fate) for fate in TraceFate if fate is not TraceFate.RUNNING},
        "answers": [
            {"answer": t.answer, "weight": t.weight, "count": t.count} for t in outcome.tallies
        ],
    }
    info[protocol.META_KEY] = step
    ids = list(trace.output_ids)
    return {**chunk, "text": trace.text, "output_ids": ids, "meta_info": info}


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


def session_of(wish: VoteRequest, same: Same, max_new_tokens: int | None) -> VoteSession:
    """What gathers the group of such a request."""
    extract = extractor_named(wish.extract)
    return VoteSession(wish.traces, wish.rules, same, extract, max_new_tokens)


def _usage(session: VoteSession, last: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Generated tokens of all traces, as far as reported; the prompt counts once."""

    def tokens(trace: SampledTrace) -> int:
        return int(trace.meta_info.get("reasoning_tokens") or 0)

    return {
        "completion_tokens": sum(trace.tokens for trace in session.traces),
        "reasoning_tokens": sum(tokens(trace) for trace in session.traces),
    }


def _value(params: Mapping[str, Any]) -> Any:
    custom = params.get("custom_params")
    return custom.get(protocol.REQUEST_KEY) if isinstance(custom, Mapping) else custom


def _step(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``custom_params.step`` when it is an object; what else it may be is checked elsewhere."""
    value = _value(params)
    return value if isinstance(value, Mapping) else None
