"""Slim-SC (arXiv 2509.13990): of two traces with nearly the same thought, one ends."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from step_sglang import protocol
from step_sglang.baselines.base import (
    Baseline,
    EngineContext,
    JudgedTrace,
    Signal,
    check_integer,
    check_number,
    wrong_parameter,
)

VARIANTS = ("random", "diversity")


@dataclass(frozen=True)
class SlimSC(Baseline):
    """Slim-SC (arXiv 2509.13990): ends one of two traces with nearly the same thought.

    A thought is a step. ``variant`` says which of the two ends: either, or the one whose own
    thoughts are less diverse.
    """

    NAME = "slim-sc"
    REASON = protocol.PRUNED_FOR_SIMILARITY

    variant: str = "random"
    threshold: float = 0.95  # cosine
    delay: int = 20  # thoughts of a trace before its next one is compared

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise wrong_parameter(self, "variant", f"one of {', '.join(VARIANTS)}")
        check_number(self, "threshold", -1.0, 1.0)
        check_integer(self, "delay", 0, 1 << 20)

    def signal(self, trace: JudgedTrace, number: int, context: EngineContext) -> Signal:
        """Shares the thoughts of the whole group."""
        if trace.group.method_state is None:
            trace.group.method_state = Thoughts(random.Random(trace.group.group_id))
        return _Thinking(self, trace, context, trace.group.method_state)


@dataclass(eq=False)
class Thoughts:
    """The thoughts of a group's traces, one row each. Rows of traces that ended go in time."""

    random: random.Random
    _traces: list[JudgedTrace] = field(default_factory=list)  # that have a thought
    _sums: list[NDArray[np.float32]] = field(default_factory=list)  # [D] of each trace's rows
    _counts: list[int] = field(default_factory=list)
    _vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _owners: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # of rows
    _size: int = 0  # rows in use

    def __len__(self) -> int:
        return self._size

    def add(self, owner: JudgedTrace, vector: NDArray[np.float32]) -> None:
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

    def nearest(
        self, owner: JudgedTrace, vector: NDArray[np.float32]
    ) -> tuple[JudgedTrace | None, float]:
        """The trace that goes on, not ``owner``, with the most similar thought, and the cosine."""
        others = np.asarray([t is not owner and t.is_active for t in self._traces], bool)
        if not others.any():
            return None, -1.0
        owners = self._owners[: self._size]
        cosines = np.where(others[owners], self._vectors[: self._size] @ vector, -2.0)
        best = int(cosines.argmax())
        return self._traces[owners[best]], float(cosines[best])

    def redundancy(self, owner: JudgedTrace) -> float:
        """Mean cosine between the thoughts of one trace; 0 with fewer than two."""
        place = self._place(owner)
        count = 0 if place is None else self._counts[place]
        if place is None or count < 2:
            return 0.0
        # Unit vectors: each is 1 with itself.
        total = float(np.square(self._sums[place]).sum()) - count
        return total / (count * (count - 1))

    def _place(self, owner: JudgedTrace) -> int | None:
        return next((i for i, trace in enumerate(self._traces) if trace is owner), None)

    def _make_room(self, width: int) -> None:
        """Drop the rows of traces that ended; double the array where that frees too little."""
        stays = [i for i, trace in enumerate(self._traces) if trace.is_active]
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
        self, method: SlimSC, trace: JudgedTrace, context: EngineContext, thoughts: Thoughts
    ) -> None:
        self._method, self._trace, self._context = method, trace, context
        self._thoughts = thoughts
        self._step: list[int] = []
        self._count = 0
        self._over = False

    def token(self, token: int, confidence: float) -> JudgedTrace | None:
        if self._over or not self._trace.is_active:
            return None
        self._step.append(token)
        if token == self._context.think_end_id:
            self._over = True
        if token not in self._context.boundaries:
            return None
        vector = self._context.embedding(self._step)
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
