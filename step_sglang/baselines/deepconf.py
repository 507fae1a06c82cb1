"""DeepConf online (arXiv 2508.15260): a trace ends when its token confidence falls."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol
from step_sglang.baselines.base import (
    DEFAULT_TOP_K,
    Baseline,
    EngineContext,
    JudgedTrace,
    Signal,
    check_integer,
    check_number,
)

MAX_TOP_K = 256
MAX_WINDOW = 1 << 20


@dataclass(frozen=True)
class DeepConf(Baseline):
    """DeepConf online (arXiv 2508.15260, section 3.2): ends a trace whose confidence falls.

    ``stop_below`` None: a warm-up trace, whose lowest group confidence is only measured.
    """

    NAME = "deepconf"
    REASON = protocol.PRUNED_FOR_CONFIDENCE
    ENDS_SURVIVORS = True  # the warm-up traces, in an earlier request, are left

    window: int = 2048  # tokens of a group of tokens
    top_k: int = DEFAULT_TOP_K
    stop_below: float | None = None

    def __post_init__(self) -> None:
        check_integer(self, "window", 1, MAX_WINDOW)
        check_integer(self, "top_k", 1, MAX_TOP_K)
        if self.stop_below is not None:
            check_number(self, "stop_below", -1e9, 1e9)

    def signal(self, trace: JudgedTrace, number: int, context: EngineContext) -> Signal:
        """The lowest group confidence."""
        return LowestConfidence(self, trace)


class LowestConfidence(Signal):
    """The lowest group confidence of a trace so far (DeepConf, equations 2, 3 and 6).

    Until the first group is complete it is the mean of what there is of it, and ends nothing.
    """

    def __init__(self, method: DeepConf, trace: JudgedTrace) -> None:
        self.watches_tokens = True
        self.top_k = method.top_k
        self._method, self._trace = method, trace
        self._window: deque[float] = deque()
        self._sum, self._count = 0.0, 0
        self.lowest: float | None = None

    def token(self, token: int, confidence: float) -> JudgedTrace | None:
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
        return {protocol.META_CONFIDENCE: self.lowest}
