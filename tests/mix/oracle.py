"""What must hold of a mix of actions, whatever comes first: a tally that knows who was aborted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tests.soak.tally import Ask, Tally, ended_well

OVERTAKEN = 60  # requests that may come later than an ordinary one, and begin before it
SLACK = 0.5  # seconds after an abort of all in which it still takes effect
# Never excused, not even of a request that somebody aborts.
INEXCUSABLE = ("doubled", "lost: ReadTimeout", "lost: Connect", "lost: Chunked", "lost: KeyError")


@dataclass
class GroupEnds:
    """How the traces of one named group ended, over all of its requests."""

    minimum: int = 1  # that some request's own traces guarantee
    ended_well: int = 0
    pruned: int = 0
    touched: bool = False  # somebody aborted a part of it


@dataclass(frozen=True)
class Wait:
    """When a request came, and when its first trace left the waiting queue; monotonic seconds."""

    ask: Ask
    came: float
    began: float


@dataclass
class MixTally(Tally):
    """A tally in which anything may be aborted by an action on the whole server."""

    groups: dict[str, GroupEnds] = field(default_factory=dict)
    waits: list[Wait] = field(default_factory=list)
    asked: dict[int, tuple[Ask, float]] = field(default_factory=dict)  # by identity, with its time
    aborted: set[str] = field(default_factory=set)  # groups
    aborts: list[list[float]] = field(default_factory=list)  # of everything: begin and end

    @contextmanager
    def asking(self, ask: Ask) -> Iterator[None]:
        with self._lock:
            self.asked[id(ask)] = ask, time.monotonic()
        with super().asking(ask):
            yield
        self.note(ask)

    @contextmanager
    def everything_aborted(self) -> Iterator[None]:
        """Whatever is live in the meantime may end as aborted."""
        span = [time.monotonic(), float("inf")]
        self.aborts.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic() + SLACK

    def touched(self, ask: Ask) -> bool:
        """Whether somebody may have aborted it."""
        if ask.group in self.aborted:
            return True
        if ask.may_abort or id(ask) not in self.asked:
            return ask.may_abort
        came = self.asked[id(ask)][1]
        return any(begin <= time.monotonic() and came <= end for begin, end in self.aborts)

    def problem(self, ask: Ask, what: str) -> None:
        if self.touched(ask) and not what.startswith(INEXCUSABLE):
            with self._lock:
                self.counts["excused"] += 1
        else:
            super().problem(ask, what)

    def answers(self, ask: Ask, infos: Sequence[Mapping[str, Any]]) -> None:
        came = self.asked[id(ask)][1]
        queued = [info["queue_time"] for info in infos if info.get("queue_time") is not None]
        if queued:
            with self._lock:
                self.waits.append(Wait(ask, came, came + min(queued)))
        super().answers(replace(ask, may_abort=True) if self.touched(ask) else ask, infos)
        pruned = sum(bool((info.get("step") or {}).get("pruned")) for info in infos)
        self.count_group(ask, sum(map(ended_well, infos)), pruned)

    def count_group(self, ask: Ask, well: int, pruned: int) -> None:
        """Add the ends of one request's traces to those of its group."""
        if ask.group is None:
            return
        with self._lock:
            ends = self.groups.setdefault(ask.group, GroupEnds())
            ends.ended_well += well
            ends.pruned += pruned
            ends.minimum = max(ends.minimum, min(ask.step.get("min_survivors", 1), ask.traces))

    def note(self, ask: Ask) -> None:
        """Remember that a group lost traces to an abort."""
        if ask.group is not None and self.touched(ask):
            with self._lock:
                self.groups.setdefault(ask.group, GroupEnds()).touched = True

    def judged(self) -> list[str]:
        """What is wrong of groups and waits, once all is over."""
        return [*self._below_minimum(), *self._starved()]

    def _below_minimum(self) -> Iterator[str]:
        for name, ends in self.groups.items():
            if not ends.touched and ends.ended_well < ends.minimum:
                yield f"group {name!r} fell below its minimum: {ends}"

    def _starved(self) -> Iterator[str]:
        for wait, later in self.overtaken():
            if wait.ask.kind == "ordinary" and later > OVERTAKEN:
                yield (
                    f"{wait.ask} waited {wait.began - wait.came:.1f} s, "
                    f"while {later} later requests began"
                )

    def overtaken(self) -> list[tuple[Wait, int]]:
        """Every wait, with how many requests came later and began before it."""
        return [
            (wait, sum(o.came > wait.came and o.began < wait.began for o in self.waits))
            for wait in self.waits
        ]
