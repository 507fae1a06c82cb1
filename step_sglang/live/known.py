"""What is known of a stream: gathers updates, within limits, and gives all as one full update."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from step_sglang.live.events import (
    AnswerRead,
    Event,
    GroupBegan,
    GroupsGone,
    PoolSample,
    Progress,
    Steps,
    TraceBegan,
    TraceEnded,
    Update,
    VoteStood,
)

MAX_GROUPS = 256  # live ones are kept beyond it
MAX_STEPS = 400_000  # of all traces
MAX_TEXT = 8_000_000  # characters of all steps
MAX_SAMPLES = 6_000  # of the pool: 20 minutes of one replica
MAX_VOTES = 400  # of one group


@dataclass
class KnownTrace:
    """One trace."""

    began: TraceBegan
    times: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # "" where there is none
    sum: float = 0.0  # of all step scores, also those that are not kept
    num_steps: int = 0
    tokens: int = 0
    kv: int = 0
    runs: bool = False
    ended: TraceEnded | None = None
    answer: str | None = None

    @property
    def score(self) -> float | None:
        """The trace score."""
        if self.ended is not None:
            return self.ended.score
        return self.sum / self.num_steps if self.num_steps else None

    @property
    def fate(self) -> str:
        """How it stands: running, waiting, or how it ended."""
        if self.ended is not None:
            return self.ended.fate
        return "running" if self.runs else "waiting"

    def events(self) -> Iterator[Event]:
        """What tells another all of it."""
        began = self.began
        if len(self.scores) < self.num_steps - began.steps:  # some were not kept
            hidden = self.num_steps - len(self.scores)
            mean = (self.sum - sum(self.scores)) / hidden
            began = replace(began, steps=hidden, score=mean)
        yield began
        if self.times:
            texts = tuple(self.texts) if any(self.texts) else None
            yield Steps(
                began.trace,
                tuple(self.times),
                tuple(self.positions),
                tuple(self.scores),
                texts,
            )
        if self.ended is not None:
            yield self.ended
        if self.answer is not None:
            yield AnswerRead(began.trace, self.answer)


@dataclass
class KnownGroup:
    """One group."""

    began: GroupBegan
    traces: list[int] = field(default_factory=list)
    live: int = 0
    expected: int = 1
    votes: list[VoteStood] = field(default_factory=list)
    changes: int = 0

    @property
    def to_come(self) -> int:
        """Traces that its request asked for and that have not come."""
        return max(0, self.expected - len(self.traces))


class Known:
    """All that is known. :meth:`apply` takes updates in their order."""

    def __init__(self) -> None:
        self.groups: dict[int, KnownGroup] = {}  # by arrival
        self.traces: dict[int, KnownTrace] = {}
        self.by_rid: dict[str, int] = {}
        self.by_name: dict[str, int] = {}  # the last group of each name
        self.pool: deque[PoolSample] = deque(maxlen=MAX_SAMPLES)
        self.time = 0.0
        self.lost = 0
        self._steps = 0
        self._text = 0

    def apply(self, update: Update) -> None:
        """Take over one update; a full one replaces what was known."""
        if update.full:
            self.__init__()  # type: ignore[misc]
        self.time = update.time
        self.lost += update.lost
        for event in update.events:
            self._take(event)
        self.pool.extend(update.pool)
        progress = update.progress
        for trace in self.traces.values():
            trace.runs = False
        for number, tokens, kv in zip(progress.traces, progress.tokens, progress.kv, strict=True):
            if (known := self.traces.get(number)) is not None and known.ended is None:
                known.tokens, known.kv, known.runs = tokens, kv, True

    def excess(self) -> GroupsGone | None:
        """The oldest ended groups, as far as there is too much; they are to be forgotten."""
        steps, groups, gone = self._steps, len(self.groups), []
        for number, group in self.groups.items():
            if groups <= MAX_GROUPS and steps <= MAX_STEPS:
                break
            if group.live == 0 and group.to_come == 0:
                gone.append(number)
                groups -= 1
                steps -= sum(len(self.traces[trace].times) for trace in group.traces)
        return GroupsGone(tuple(gone)) if gone else None

    def forget(self, gone: GroupsGone) -> None:
        """Forget these groups and their traces."""
        self._take(gone)

    def full(self) -> Update:
        """All of it, as one update."""
        events: list[Event] = []
        for group in self.groups.values():
            events.append(group.began)
            for trace in group.traces:
                events.extend(self.traces[trace].events())
            events.extend(group.votes)
        running = [(n, t.tokens, t.kv) for n, t in self.traces.items() if t.runs]
        progress = Progress(*zip(*running, strict=True)) if running else Progress()
        return Update(self.time, True, tuple(events), tuple(self.pool), progress, self.lost)

    def _take(self, event: Event) -> None:
        match event:
            case GroupBegan():
                self.groups[event.group] = KnownGroup(event)
                self.by_name[event.name] = event.group
            case TraceBegan():
                self._begin(event)
            case Steps():
                self._score(event)
            case TraceEnded():
                self._end(event)
            case AnswerRead():
                if (trace := self.traces.get(event.trace)) is not None:
                    trace.answer = event.answer
                    self.groups[trace.began.group].changes += 1
            case VoteStood():
                if (group := self.groups.get(event.group)) is not None:
                    if len(group.votes) >= MAX_VOTES:
                        del group.votes[len(group.votes) // 2]  # its beginning and end stay
                    group.votes.append(event)
            case GroupsGone():
                for number in event.groups:
                    self._forget(number)

    def _begin(self, event: TraceBegan) -> None:
        group = self.groups.get(event.group)
        if group is None or event.trace in self.traces:
            return
        self.traces[event.trace] = KnownTrace(
            event,
            sum=(event.score or 0.0) * event.steps,
            num_steps=event.steps,
            tokens=event.tokens,
        )
        self.by_rid[event.rid] = event.trace
        group.traces.append(event.trace)
        group.live += 1
        group.expected = max(group.expected, event.expected)
        group.changes += 1

    def _score(self, event: Steps) -> None:
        trace = self.traces.get(event.trace)
        if trace is None:
            return
        trace.sum += sum(event.scores)
        trace.num_steps += len(event.scores)
        trace.tokens = max(trace.tokens, event.positions[-1] + 1) if event.positions else 0
        if self._steps >= MAX_STEPS:
            return
        self._steps += len(event.scores)
        trace.times.extend(event.times)
        trace.positions.extend(event.positions)
        trace.scores.extend(event.scores)
        texts = event.texts or ("",) * len(event.times)
        for text in texts:
            kept = text if self._text < MAX_TEXT else ""
            self._text += len(kept)
            trace.texts.append(kept)

    def _end(self, event: TraceEnded) -> None:
        trace = self.traces.get(event.trace)
        if trace is None or trace.ended is not None:
            return
        trace.ended, trace.tokens, trace.runs, trace.kv = event, event.tokens, False, 0
        group = self.groups[trace.began.group]
        group.live -= 1
        group.changes += 1

    def _forget(self, number: int) -> None:
        group = self.groups.pop(number, None)
        if group is None:
            return
        for name in group.traces:
            trace = self.traces.pop(name)
            self._steps -= len(trace.times)
            self._text -= sum(map(len, trace.texts))
            if self.by_rid.get(trace.began.rid) == name:
                del self.by_rid[trace.began.rid]
        if self.by_name.get(group.began.name) == number:
            del self.by_name[group.began.name]
