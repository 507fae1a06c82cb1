"""The schema of the feed: what is sent of traces, groups, votes and memory. All of it is JSON.

A stream is a sequence of :class:`Update`. Its first is ``full``: it holds all that is known, and
replaces what a reader knew. Every later one holds what is new. Numbers of traces and groups
belong to one stream; times are unix seconds. A recorded run is one full update.

Pydantic reads it because it is data of a dozen shapes from another program, told apart by a tag.
What people write, requests and flags, has its own checks: their one-line errors name the member,
what was found and what would be right, which pydantic's reports do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, TypeAdapter, ValidationError

from step_sglang.errors import StepError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a trace left another's text."""

    parent: str  # the other's request id
    position: int  # output tokens that both have
    depth: int  # 1: the parent is no branch itself


@dataclass(frozen=True, slots=True)
class GroupBegan:
    """A group, seen for the first time."""

    group: int
    time: float
    name: str  # its id; anybody may have chosen it
    replica: int = 0
    kind: Literal["group"] = "group"


@dataclass(frozen=True, slots=True)
class TraceBegan:
    """A trace, seen for the first time; what it had by then."""

    trace: int
    group: int
    time: float
    rid: str  # its request's id
    prompt_tokens: int
    expected: int = 1  # traces that its request asked for; they do not come all at once
    tokens: int = 0  # generated before it was first seen
    steps: int = 0  # scored before
    score: float | None = None  # the trace score then
    branch: Branch | None = None
    kind: Literal["trace"] = "trace"


@dataclass(frozen=True, slots=True)
class Steps:
    """Scored steps of a trace, in order. S steps."""

    trace: int
    times: tuple[float, ...]  # [S]
    positions: tuple[int, ...]  # [S] output index of each boundary token
    scores: tuple[float, ...]  # [S] step scores
    texts: tuple[str, ...] | None = None  # [S] where the request allowed it
    token_ids: tuple[tuple[int, ...], ...] | None = None  # [S] before they are decoded to texts
    kind: Literal["steps"] = "steps"


@dataclass(frozen=True, slots=True)
class TraceEnded:
    """A trace ended."""

    trace: int
    time: float
    fate: str  # finished, pruned or aborted; cancelled in recorded runs
    tokens: int  # generated
    score: float | None = None  # the trace score
    reason: str | None = None  # why it was pruned
    freed: int | None = None  # KV tokens that pruning it freed
    kind: Literal["end"] = "end"


@dataclass(frozen=True, slots=True)
class AnswerRead:
    """The answer of a trace that finished."""

    trace: int
    answer: str
    kind: Literal["answer"] = "answer"


@dataclass(frozen=True, slots=True)
class Bar:
    """One answer of a vote."""

    answer: str
    weight: float
    count: int  # traces that gave it


@dataclass(frozen=True, slots=True)
class VoteStood:
    """A group's vote as it stood."""

    group: int
    time: float
    vote: str  # one of the votes
    bars: tuple[Bar, ...]  # the winner first; the heaviest few
    settled: bool  # no trace that was known and had not ended could change the winner
    as_text: bool = False  # answers were compared as text; else by meaning
    kind: Literal["vote"] = "vote"


@dataclass(frozen=True, slots=True)
class GroupsGone:
    """Groups that are not kept any more; a reader forgets them and their traces."""

    groups: tuple[int, ...]
    kind: Literal["gone"] = "gone"


Event = GroupBegan | TraceBegan | Steps | TraceEnded | AnswerRead | VoteStood | GroupsGone


@dataclass(frozen=True, slots=True)
class PoolSample:
    """The KV pool of one replica, in tokens, and its requests."""

    time: float
    used: int  # by requests
    cached: int  # by the radix cache alone, which gives it back when asked
    size: int | None  # None: unknown, as in recordings
    running: int  # requests, also those that are no traces
    waiting: int
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The traces that run, R of them; a live trace that is not among them waits."""

    traces: tuple[int, ...] = ()  # [R]
    tokens: tuple[int, ...] = ()  # [R] generated
    kv: tuple[int, ...] = ()  # [R] KV tokens that no other trace shares


@dataclass(frozen=True, slots=True)
class Update:
    """One message of the feed."""

    time: float
    full: bool = False
    events: tuple[Annotated[Event, Discriminator("kind")], ...] = ()
    pool: tuple[PoolSample, ...] = ()
    progress: Progress = Progress()
    lost: int = 0  # events that were left out, because nobody took them in time
    version: int = VERSION


class FeedError(StepError):
    """What came is no feed of this version."""


_UPDATES: TypeAdapter[Update] = TypeAdapter(Update)


def encode(update: Update) -> bytes:
    """JSON on one line, without what is None."""
    return _UPDATES.dump_json(update, exclude_none=True)


def decode(data: bytes | str) -> Update:
    """The inverse of :func:`encode`; raises FeedError."""
    try:
        update = _UPDATES.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the message"
        raise FeedError(f"the feed is not of this version: {where}: {first['msg']}") from error
    if update.version != VERSION:
        raise FeedError(f"the feed is of version {update.version}, this package reads {VERSION}")
    return update
