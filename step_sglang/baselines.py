"""What other methods judge a trace by, and when they end it: for comparison with STEP.

A method is what a request asks for (a frozen description) and the signal it gives to each trace.
The engine feeds every output token to the signal; the signal answers which trace is to end now, or
how the trace ranks when memory is short. Knows nothing of SGLang.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from step_sglang import words
from step_sglang.embedding import Embedding
from step_sglang.errors import RequestError, shown

if TYPE_CHECKING:
    from step_sglang.groups import Trace

VARIANTS = ("random", "diversity")
DEFAULT_TOP_K = 20  # candidates of a token confidence (DeepConf, arXiv 2508.15260, section 4.1)
MAX_TOP_K = 256
MAX_WINDOW = 1 << 20


@dataclass(frozen=True)
class Surroundings:
    """What signals may know of the engine."""

    boundaries: frozenset[int]  # token ids that end a step
    think_end_id: int | None
    embedding: Embedding


class Signal:
    """Judges one trace; this one never has anything to say."""

    watches_tokens = False
    top_k = 0  # candidates of the token confidence that it wants; 0: none

    def token(self, token: int, confidence: float) -> Trace | None:
        """Take over an output token; returns a trace of the group that is to end now."""
        return None

    def standing(self, length: int) -> tuple[float, int]:
        """(score sum, number of steps) by which it ranks among its group when memory is short."""
        raise NotImplementedError

    def meta(self) -> dict[str, Any]:
        """What the response says of it."""
        return {}


@dataclass(frozen=True)
class Baseline(ABC):
    """A method as a request asks for it."""

    NAME: ClassVar[str]
    # Whether a trace may be pruned because memory is short. The others end traces by themselves,
    # and their memory is managed as an ordinary request's.
    FOR_MEMORY: ClassVar[bool] = False
    REASON: ClassVar[str] = ""  # why it ends a trace, in the log line and the metrics
    # Whether it may end the last survivors of a group.
    ENDS_SURVIVORS: ClassVar[bool] = False

    @abstractmethod
    def signal(self, trace: Trace, number: int, around: Surroundings) -> Signal:
        """The signal of a trace that joined its group as its ``number``-th."""


@dataclass(frozen=True)
class Random(Baseline):
    """Control: when memory is short, any trace of the group is the victim."""

    NAME = "random"
    FOR_MEMORY = True

    def signal(self, trace: Trace, number: int, around: Surroundings) -> Signal:
        """A number drawn once, the same on every rank."""
        return _Lot(random.Random(f"{trace.group.group_id} {number}").random())


@dataclass(frozen=True)
class Longest(Baseline):
    """Control: when memory is short, the longest trace of the group is the victim."""

    NAME = "longest"
    FOR_MEMORY = True

    def signal(self, trace: Trace, number: int, around: Surroundings) -> Signal:
        """Ranks by length alone."""
        return _Length()


@dataclass(frozen=True)
class DeepConf(Baseline):
    """DeepConf online (arXiv 2508.15260, section 3.2): ends a trace whose confidence falls.

    ``stop_below`` None: a warm-up trace, whose lowest group confidence is only measured.
    """

    NAME = "deepconf"
    REASON = words.PRUNED_FOR_CONFIDENCE
    ENDS_SURVIVORS = True  # the warm-up traces, in an earlier request, are left

    window: int = 2048  # tokens of a group of tokens
    top_k: int = DEFAULT_TOP_K
    stop_below: float | None = None

    def __post_init__(self) -> None:
        _check_whole(self, "window", 1, MAX_WINDOW)
        _check_whole(self, "top_k", 1, MAX_TOP_K)
        if self.stop_below is not None:
            _check_number(self, "stop_below", -1e9, 1e9)

    def signal(self, trace: Trace, number: int, around: Surroundings) -> Signal:
        """The lowest group confidence."""
        return LowestConfidence(self, trace)


@dataclass(frozen=True)
class SlimSC(Baseline):
    """Slim-SC (arXiv 2509.13990): ends one of two traces with nearly the same thought.

    A thought is a step. ``variant`` says which of the two ends: either, or the one whose own
    thoughts are less diverse.
    """

    NAME = "slim-sc"
    REASON = words.PRUNED_FOR_SIMILARITY

    variant: str = "random"
    threshold: float = 0.95  # cosine
    delay: int = 20  # thoughts of a trace before its next one is compared

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise _wrong(self, "variant", f"one of {', '.join(VARIANTS)}")
        _check_number(self, "threshold", -1.0, 1.0)
        _check_whole(self, "delay", 0, 1 << 20)

    def signal(self, trace: Trace, number: int, around: Surroundings) -> Signal:
        """Shares the thoughts of the whole group."""
        if trace.group.thoughts is None:
            trace.group.thoughts = Thoughts(random.Random(trace.group.group_id))
        return _Thinking(self, trace, around, trace.group.thoughts)


BASELINES: Mapping[str, type[Baseline]] = {
    method.NAME: method for method in (Random, Longest, DeepConf, SlimSC)
}


def parse_baseline(value: object) -> Baseline:
    """Read ``custom_params.step.baseline``.

    Raises:
        RequestError: it names no method, or one of its parameters is wrong.
    """
    where = f"custom_params.step.{words.BASELINE}"
    if not isinstance(value, Mapping):
        raise RequestError(f'{where} must be an object such as {{"name": "deepconf"}}')
    name = value.get("name")
    method = BASELINES.get(name) if isinstance(name, str) else None
    if method is None:
        raise RequestError(f"{where}.name must be one of {', '.join(BASELINES)}, not {shown(name)}")
    known = {option.name for option in fields(method)}
    unknown = sorted(str(key)[:40] for key in value if key != "name" and key not in known)
    if unknown:
        raise RequestError(f"{where} {name!r} has no {unknown}; it may have {sorted(known)}")
    return method(**{key: item for key, item in value.items() if key != "name"})


@dataclass
class _Lot(Signal):
    value: float

    def standing(self, length: int) -> tuple[float, int]:
        return self.value, 1


class _Length(Signal):
    def standing(self, length: int) -> tuple[float, int]:
        return -float(length), 1


class LowestConfidence(Signal):
    """The lowest group confidence of a trace so far (DeepConf, equations 2, 3 and 6).

    Until the first group is complete it is the mean of what there is of it, and ends nothing.
    """

    def __init__(self, method: DeepConf, trace: Trace) -> None:
        self.watches_tokens = True
        self.top_k = method.top_k
        self._method, self._trace = method, trace
        self._window: deque[float] = deque()
        self._sum, self._count = 0.0, 0
        self.lowest: float | None = None

    def token(self, token: int, confidence: float) -> Trace | None:
        """One more token of the sliding group."""
        if math.isnan(confidence):
            return None  # the logits were not finite; the mean would never recover
        size = self._method.window
        if len(self._window) == size:
            self._sum -= self._window.popleft()
        self._window.append(confidence)
        self._sum += confidence
        self._count += 1
        group = self._sum / len(self._window)
        first = self._count <= size
        self.lowest = group if first or self.lowest is None else min(self.lowest, group)
        limit = self._method.stop_below
        complete = len(self._window) == size
        return self._trace if limit is not None and complete and group < limit else None

    def meta(self) -> dict[str, Any]:
        """The figure that warm-up traces are asked for."""
        return {words.META_CONFIDENCE: self.lowest}


@dataclass(eq=False)
class Thoughts:
    """The thoughts of a group's traces, one row each. Rows of traces that ended go in time."""

    random: random.Random
    _traces: list[Trace] = field(default_factory=list)  # that have a thought
    _sums: list[NDArray[np.float32]] = field(default_factory=list)  # [D] of each trace's rows
    _counts: list[int] = field(default_factory=list)
    _vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _owners: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # of rows
    _size: int = 0  # rows in use

    def __len__(self) -> int:
        return self._size

    def add(self, owner: Trace, vector: NDArray[np.float32]) -> None:
        """Keep a [D] unit vector."""
        if self._size == len(self._vectors):
            self._make_room(len(vector))
        place = self._place(owner)
        if place is None:
            place = len(self._traces)
            self._traces.append(owner)
            self._sums.append(np.zeros_like(vector))
            self._counts.append(0)
        self._vectors[self._size], self._owners[self._size] = vector, place
        self._size += 1
        self._sums[place] = self._sums[place] + vector
        self._counts[place] += 1

    def nearest(self, owner: Trace, vector: NDArray[np.float32]) -> tuple[Trace | None, float]:
        """The trace that goes on, not ``owner``, with the most similar thought, and the cosine."""
        others = np.asarray([t is not owner and t.goes_on for t in self._traces], bool)
        if not others.any():
            return None, -1.0
        owners = self._owners[: self._size]
        cosines = np.where(others[owners], self._vectors[: self._size] @ vector, -2.0)
        best = int(cosines.argmax())
        return self._traces[owners[best]], float(cosines[best])

    def redundancy(self, owner: Trace) -> float:
        """Mean cosine between the thoughts of one trace; 0 with fewer than two."""
        place = self._place(owner)
        count = 0 if place is None else self._counts[place]
        if place is None or count < 2:
            return 0.0
        # Unit vectors: each is 1 with itself.
        total = float(np.square(self._sums[place]).sum()) - count
        return total / (count * (count - 1))

    def _place(self, owner: Trace) -> int | None:
        return next((i for i, trace in enumerate(self._traces) if trace is owner), None)

    def _make_room(self, width: int) -> None:
        """Drop the rows of traces that ended; double the array where that frees too little."""
        stays = [i for i, trace in enumerate(self._traces) if trace.goes_on]
        renumbered = np.full(len(self._traces), -1, np.int32)
        renumbered[stays] = np.arange(len(stays), dtype=np.int32)
        owners = renumbered[self._owners[: self._size]]
        kept = owners >= 0
        rows = self._vectors[: self._size].reshape(-1, width)[kept]
        self._traces = [self._traces[i] for i in stays]
        self._sums = [self._sums[i] for i in stays]
        self._counts = [self._counts[i] for i in stays]
        self._size = len(rows)
        more = max(64, self._size)
        self._vectors = np.concatenate([rows, np.empty((more, width), np.float32)])
        self._owners = np.concatenate([owners[kept], np.empty(more, np.int32)])


class _Thinking(Signal):
    watches_tokens = True

    def __init__(
        self, method: SlimSC, trace: Trace, around: Surroundings, thoughts: Thoughts
    ) -> None:
        self._method, self._trace, self._around = method, trace, around
        self._thoughts = thoughts
        self._step: list[int] = []
        self._count = 0
        self._over = False

    def token(self, token: int, confidence: float) -> Trace | None:
        if self._over or not self._trace.goes_on:
            return None
        self._step.append(token)
        if token == self._around.think_end_id:
            self._over = True
        if token not in self._around.boundaries:
            return None
        vector = self._around.embedding(self._step)
        self._step = []
        self._count += 1
        other, cosine = (None, -1.0)
        if self._count > self._method.delay:
            other, cosine = self._thoughts.nearest(self._trace, vector)
        self._thoughts.add(self._trace, vector)
        if other is None or cosine <= self._method.threshold:
            return None
        if self._method.variant == "random":
            return self._thoughts.random.choice((self._trace, other))
        mine, theirs = (self._thoughts.redundancy(t) for t in (self._trace, other))
        return self._trace if mine >= theirs else other


def _wrong(method: Baseline, name: str, right: str) -> RequestError:
    found = shown(getattr(method, name))
    return RequestError(f"custom_params.step.{words.BASELINE}.{name} must be {right}, not {found}")


def _check_whole(method: Baseline, name: str, low: int, high: int) -> None:
    value = getattr(method, name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(method, name, f"a whole number from {low} to {high}")


def _check_number(method: Baseline, name: str, low: float, high: float) -> None:
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _wrong(method, name, f"a number from {low:g} to {high:g}")
