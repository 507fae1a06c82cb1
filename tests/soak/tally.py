"""What came back: checks every answer against what was asked, and counts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ask:
    """What one request asked for."""

    kind: str
    traces: int
    prompt_tokens: int
    new_tokens: int
    group: str | None = None
    may_stop: bool = False  # at the end token
    may_abort: bool = False  # somebody aborts it
    joins: bool = False  # its group has other requests: all of its own traces may be pruned
    step: Mapping[str, Any] = field(default_factory=dict)  # further members of `custom_params.step`
    body: Mapping[str, Any] = field(default_factory=dict)  # further members of the body

    @property
    def demand(self) -> int:
        """KV tokens at its end, if nothing is pruned."""
        return self.prompt_tokens + self.traces * self.new_tokens

    def __str__(self) -> str:
        group = "" if self.group is None else f" of {self.group!r}"
        return f"{self.kind}{group}: {self.traces} traces of {self.new_tokens} tokens"


@dataclass
class Tally:
    """Results of all threads. ``step`` False: a stock server, which knows no groups."""

    step: bool
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # seconds, of ordinary requests
    pruned: set[str] = field(default_factory=set)  # request ids
    answered: set[str] = field(default_factory=set)  # likewise
    left: set[str] = field(default_factory=set)  # groups whose client went away
    demand_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def problem(self, ask: Ask, what: str) -> None:
        """Note something that must not happen."""
        with self._lock:
            self.problems.append(f"{ask}: {what}")

    @contextmanager
    def asking(self, ask: Ask) -> Iterator[None]:
        """Around one request: whatever goes wrong in it is noted as a problem."""
        started = time.monotonic()
        with self._lock:
            self.counts["asked"] += 1
            self.counts[ask.kind] += 1
        try:
            yield
        except Exception as error:
            self.problem(ask, f"lost: {type(error).__name__} {str(error)[:300]}")
        finally:
            seconds = time.monotonic() - started
            with self._lock:
                self.counts["ended"] += 1
                self.demand_seconds += seconds * ask.demand
                if ask.kind == "ordinary":
                    self.latencies.append(seconds)

    def answers(self, ask: Ask, infos: Sequence[Mapping[str, Any]]) -> None:
        """Check the ``meta_info`` of every trace of one request."""
        if len(infos) != ask.traces:
            self.problem(ask, f"{len(infos)} traces came back")
        for info in infos:
            self._answer(ask, info)
        may_lose_all = ask.may_abort or ask.joins
        if not may_lose_all and not any(ended_well(info) for info in infos):
            self.problem(ask, "no trace of the group finished")
        if self.step and ask.group is not None:
            groups = {info["step"]["group"] for info in infos if "step" in info}
            if groups - {ask.group} or (not ask.may_abort and not groups):
                self.problem(ask, f"its traces are of the groups {groups}")

    def _answer(self, ask: Ask, info: Mapping[str, Any]) -> None:
        reason, tokens = info["finish_reason"], info["completion_tokens"]
        step = info.get("step") or {}
        pruned, branch = bool(step.get("pruned")), step.get("branch")
        # A branch did not generate what it took over, but what came before it in its place did.
        taken = 0 if branch is None else branch["position"] + 1
        with self._lock:
            self.counts["traces"] += 1
            self.counts["pruned"] += pruned
            self.counts["retractions"] += info.get("num_retractions") or 0
            self.counts["branches"] += branch is not None
            doubled = info["id"] in self.answered
            self.answered.add(info["id"])
            if pruned:
                self.pruned.add(info["id"])
        if doubled:
            self.problem(ask, f"doubled: {info['id']}")
        kind = reason["type"]
        fine = {
            "length": tokens >= ask.new_tokens - taken if taken else tokens == ask.new_tokens,
            "stop": ask.may_stop and (taken > 0 or tokens <= ask.new_tokens),
            "abort": ask.may_abort or (pruned and reason.get("status_code") is None),
        }
        if not fine.get(kind, False) or (pruned and ask.group is None):
            self.problem(ask, f"a trace ended with {reason} after {tokens} tokens")


def ended_well(info: Mapping[str, Any]) -> bool:
    return info["finish_reason"]["type"] in ("length", "stop")
