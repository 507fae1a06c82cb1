"""The result of one trial: one method on one question. Knows nothing of files or servers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

ENDED = ("cancelled", "shrunk")  # fates of traces that a decided vote cut short


class TrialKey(NamedTuple):
    """Identifies a trial; no two results in a folder share one."""

    question: str  # its id
    method: str
    n: int
    repeat: int
    memory: str  # of the server, see `serving.PoolSize`


@dataclass(frozen=True)
class TrialTrace:
    """One trace of a trial. Times in seconds, None without the server's time stamps."""

    fate: str  # a value of voting.session.TraceFate
    answer: str | None
    correct: bool
    tokens: int  # generated
    score: float | None  # trace score
    confidence: float | None  # lowest group confidence
    reason: str | None  # why it was pruned
    retractions: int
    wait: float | None  # in the queue, also again after a retraction
    prefill: float | None
    decode: float | None


def known_waits(traces: Iterable[TrialTrace], seconds: float) -> list[float]:
    """Seconds in the queue, of the traces of which they are known.

    Of a trace that was cancelled the server says nothing. Without a token it never began, and
    waited for all of the request's ``seconds``.
    """
    found = []
    for trace in traces:
        if trace.wait is not None:
            found.append(trace.wait)
        elif trace.fate == "cancelled" and not trace.tokens:
            found.append(seconds)
    return found


class PoolUsage(NamedTuple):
    """The KV pool and the queue at one moment."""

    at: float  # seconds since the trial began
    share: float  # of the KV pool in use
    running: int  # requests
    waiting: int


@dataclass(frozen=True)
class TrialResult:
    """One question answered once by one method."""

    question: str
    method: str
    n: int
    repeat: int
    memory: str
    pool: int  # KV tokens that the server has
    gold: str
    answer: str | None
    correct: bool
    latency: float  # seconds from the request to the end of the last trace, all requests together
    phases: tuple[float, ...]  # seconds of each request, in order; DeepConf makes two
    threshold: float | None  # confidence below which DeepConf stopped traces
    started: float  # unix seconds
    traces: tuple[TrialTrace, ...]
    usage: tuple[PoolUsage, ...]
    calibration: tuple[float, float] | None = None  # slope and bias, of the server's scorer

    @property
    def key(self) -> TrialKey:
        """What identifies it."""
        return TrialKey(self.question, self.method, self.n, self.repeat, self.memory)

    @property
    def tokens(self) -> int:
        """Tokens that all traces generated."""
        return sum(trace.tokens for trace in self.traces)

    @property
    def pruned(self) -> int:
        """Traces that were pruned."""
        return self.num("pruned")

    @property
    def cancelled(self) -> int:
        """Traces that an early end cut short."""
        return self.num("cancelled")

    def num(self, fate: str) -> int:
        """Traces that ended so."""
        return sum(trace.fate == fate for trace in self.traces)

    @property
    def retracted(self) -> int:
        """How often SGLang took a trace's KV cache and queued it again."""
        return sum(trace.retractions for trace in self.traces)

    @property
    def ended(self) -> int:
        """Traces that a decided vote cut short, whole groups and single ones."""
        return sum(map(self.num, ENDED))

    @property
    def waits(self) -> list[float]:
        """Seconds that traces waited, of those of which it is known."""
        return known_waits(self.traces, self.phases[-1])

    def mean(self, name: str) -> float | None:
        """Mean of a time over the traces of which it is known."""
        if name == "wait":
            values = self.waits
        else:
            values = [v for trace in self.traces if (v := getattr(trace, name)) is not None]
        return sum(values) / len(values) if values else None

    def as_json(self) -> dict[str, Any]:
        """JSON values. Traces are stored as columns, far shorter than a list of objects."""
        value = asdict(self)
        names = [f.name for f in fields(TrialTrace)]
        value["traces"] = {name: [getattr(t, name) for t in self.traces] for name in names}
        value["usage"] = [list(moment) for moment in self.usage]
        value["phases"] = list(self.phases)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrialResult:
        """The inverse of :meth:`as_json`; raises KeyError, TypeError or ValueError."""
        columns = value["traces"]
        names = [f.name for f in fields(TrialTrace)]
        rows = zip(*(columns[name] for name in names), strict=True)
        return cls(
            **{
                **value,
                "traces": tuple(TrialTrace(*row) for row in rows),
                "usage": tuple(PoolUsage(*moment) for moment in value["usage"]),
                "phases": tuple(value["phases"]),
                "calibration": as_pair(value.get("calibration")),
            }
        )


def as_pair(value: Sequence[float] | None) -> tuple[float, float] | None:
    """A scorer's calibration as a record states it; None where it states none."""
    if value is None:
        return None
    slope, bias = value
    return slope, bias
