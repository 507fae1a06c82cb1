"""The trivial controls of pruning under memory pressure: any trace, or the longest."""

from __future__ import annotations

import random
from dataclasses import dataclass

from step_sglang.baselines.base import Baseline, EngineContext, JudgedTrace, Signal


@dataclass(frozen=True)
class Random(Baseline):
    """Control: when memory is short, any trace of the group is the victim."""

    NAME = "random"
    FOR_MEMORY = True

    def signal(self, trace: JudgedTrace, number: int, context: EngineContext) -> Signal:
        """A number drawn once, the same on every rank."""
        return _Lot(random.Random(f"{trace.group.group_id} {number}").random())


@dataclass(frozen=True)
class Longest(Baseline):
    """Control: when memory is short, the longest trace of the group is the victim."""

    NAME = "longest"
    FOR_MEMORY = True

    def signal(self, trace: JudgedTrace, number: int, context: EngineContext) -> Signal:
        """Ranks by length alone."""
        return _Length()


@dataclass
class _Lot(Signal):
    value: float

    def rank_key(self, length: int) -> tuple[float, int]:
        return self.value, 1


class _Length(Signal):
    def rank_key(self, length: int) -> tuple[float, int]:
        return -float(length), 1
