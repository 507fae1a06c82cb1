"""The result of a question: the answer, the vote, every trace, the times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from step_sglang import protocol
from step_sglang.voting.session import SampledTrace, TraceFate, VoteSession, VoteStatus


@dataclass(frozen=True)
class Timing:
    """Times, in seconds.

    ``wait``, ``prefill`` and ``decode`` come from the server's own time stamps (``source``
    "server"), which SGLang sends with ``--enable-metrics``. Without them (``source`` "client")
    ``wait`` and ``prefill`` are None, ``first_token`` holds both, and ``decode`` is what follows.
    """

    total: float  # of a trace: until its last chunk; of a result: until the vote
    first_token: float | None  # until the first chunk that the client saw
    wait: float | None
    prefill: float | None
    decode: float | None
    source: str


@dataclass(frozen=True)
class TraceResult:
    """One trace; only a ``finished`` trace votes."""

    index: int
    text: str
    fate: TraceFate
    answer: str | None  # of a trace that ended; None: none could be extracted
    score: float | None  # None: no step
    num_steps: int
    step_scores: tuple[float, ...] | None  # None: the trace did not end by itself
    tokens: int  # generated, as far as reported
    finish_reason: str | None
    times: Timing


@dataclass(frozen=True)
class Answer:
    """One answer: its weight in the vote and the traces that gave it, however they spell it."""

    answer: str
    weight: float
    traces: tuple[int, ...]


@dataclass(frozen=True)
class SolveProgress:
    """The state of a running group."""

    running: int
    finished: int
    pruned: int
    ended_otherwise: int  # aborted, cancelled, or not needed by the vote
    tokens: int
    leaders: tuple[Answer, ...]  # the winner first


@dataclass(frozen=True)
class Result:
    """A solved question.

    ``status`` other than ``VOTED``: ``answer`` is None, and ``message`` says why. ``best`` is then
    the best-scoring finished trace or, when none finished, the best partial one.
    """

    status: VoteStatus
    answer: str | None
    share: float  # the answer's share of the weight
    message: str
    answers: tuple[Answer, ...]  # all answers given, the winner first
    traces: tuple[TraceResult, ...]
    best: TraceResult | None
    timing: Timing
    early: bool  # ended before the last trace, because the vote was decided
    text_only: int = 0  # answers that were compared as text alone, as math-verify took too long
    turned_away: str = ""  # why the server aborted traces that it may take another time

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values; ``best`` is the position of the trace."""
        found: dict[str, Any] = _plain(asdict(self))
        found["best"] = None if self.best is None else self.best.index
        return found


def progress_of(session: VoteSession) -> SolveProgress:
    """The state of a group."""
    running, finished, pruned = (
        session.num(fate) for fate in (TraceFate.RUNNING, TraceFate.FINISHED, TraceFate.PRUNED)
    )
    return SolveProgress(
        running=running,
        finished=finished,
        pruned=pruned,
        ended_otherwise=len(session.traces) - running - finished - pruned,
        tokens=sum(trace.tokens for trace in session.traces),
        leaders=_answers(session),
    )


def result_of(session: VoteSession, total: float) -> Result:
    """The result of a group that ended ``total`` seconds after it was asked."""
    outcome = session.outcome()
    traces = tuple(_trace(trace) for trace in session.traces)
    return Result(
        status=outcome.status,
        answer=outcome.answer,
        share=outcome.share,
        message=_message(session, outcome.status),
        answers=_answers(session),
        traces=traces,
        best=None if outcome.best is None else traces[outcome.best],
        timing=_mean([trace.times for trace in traces], total),
        early=session.num(TraceFate.CANCELLED, TraceFate.SHRUNK) > 0,
        text_only=outcome.text_only,
        turned_away=_turned_away(session.traces),
    )


def _answers(session: VoteSession) -> tuple[Answer, ...]:
    return tuple(Answer(t.answer, t.weight, t.members) for t in session.tallies())


def _message(session: VoteSession, status: VoteStatus) -> str:
    if status is VoteStatus.NO_ANSWER:
        finished = session.num(TraceFate.FINISHED)
        return f"none of the {finished} finished traces has an extractable answer"
    if status is VoteStatus.NO_FINISHED_TRACE:
        return (
            f"no trace finished: {session.num(TraceFate.PRUNED)} were pruned, "
            f"{session.num(TraceFate.ABORTED, TraceFate.CANCELLED, TraceFate.SHRUNK)} aborted, "
            f"{session.num(TraceFate.RUNNING)} did not end"
        )
    return ""


def _turned_away(traces: Sequence[SampledTrace]) -> str:
    """What the server said of the first trace that it aborted for no reason of the trace's own.

    With a full queue, a timeout, or as somebody aborted it: these say 503, or nothing. What a trace
    does not survive on this server, such as too little memory for it alone, has another status.
    """
    for trace in traces:
        reason = trace.meta_info.get("finish_reason") or {}
        if trace.fate is TraceFate.ABORTED and reason.get("status_code") in (None, 503):
            return str(reason.get("message") or "no message")
    return ""


def _trace(trace: SampledTrace) -> TraceResult:
    step = trace.meta_info.get(protocol.META_KEY) or {}
    scores = step.get(protocol.META_STEP_SCORES)
    reason = trace.meta_info.get("finish_reason")
    return TraceResult(
        index=trace.index,
        text=trace.text,
        fate=trace.fate,
        answer=trace.answer,
        score=trace.score,
        num_steps=trace.num_steps,
        step_scores=None if scores is None else tuple(scores),
        tokens=trace.tokens,
        finish_reason=None if reason is None else reason["type"],
        times=_times(trace),
    )


def server_times(
    info: Mapping[str, Any],
) -> tuple[float | None, float | None, float | None]:
    """Seconds of waiting, prefill and decoding from the server's time stamps; None without them.

    A retracted trace waits again after its first token; that time is not decoding.
    """
    wait, entry, prefilled, finished = (
        info.get(key)
        for key in (
            "queue_time", "forward_entry_time", "prefill_finished_time", "request_finished_ts",
        )
    )  # fmt: skip
    if wait is None or entry is None or prefilled is None or finished is None:
        return None, None, None
    again = 0.0
    dispatched = info.get("api_server_dispatch_finish_ts")
    if info.get("num_retractions") and dispatched is not None:
        again = max(0.0, wait - max(0.0, entry - dispatched))
    return wait, prefilled - entry, max(0.0, finished - prefilled - again)


def _times(trace: SampledTrace) -> Timing:
    total, first = trace.ended or 0.0, trace.first_chunk
    wait, prefill, decode = server_times(trace.meta_info)
    if decode is not None:
        return Timing(total, first, wait, prefill, decode, "server")
    return Timing(total, first, None, None, None if first is None else total - first, "client")


def _mean(times: list[Timing], total: float) -> Timing:
    """Means over the traces; of the server's stamps where any trace has them."""
    stamped = [t for t in times if t.source == "server"]

    def mean(name: str) -> float | None:
        values = [getattr(t, name) for t in stamped or times if getattr(t, name) is not None]
        return sum(values) / len(values) if values else None

    source = "server" if stamped else "client"
    first = min((t.first_token for t in times if t.first_token is not None), default=None)
    return Timing(total, first, mean("wait"), mean("prefill"), mean("decode"), source)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
