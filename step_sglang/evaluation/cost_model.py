"""Turns simulated decode steps into seconds: by prices, or by a roofline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from step_sglang.evaluation.simulator import DecodeStep
from step_sglang.simulation.speed import Speed


class Prices(Protocol):
    """Seconds of decode steps."""

    def seconds(self, history: Iterable[DecodeStep], prompt_tokens: float = 0) -> float:
        """Seconds that these take; every trace also attends to the shared prompt."""
        ...


@dataclass(frozen=True)
class CostModel:
    """Seconds of a decode step: a base, plus a cost per running trace and per attended token.

    Prefill, also of a retracted trace, costs as much per token as a running trace per step.
    """

    base: float
    per_trace: float
    per_token: float
    overhead: float  # seconds of a question outside its decode steps: prefill, HTTP

    def seconds(self, history: Iterable[DecodeStep], prompt_tokens: float = 0) -> float:
        """Seconds that these decode steps take; every trace also attends to the shared prompt."""
        total = self.overhead
        for moment in history:
            rows = moment.running * moment.steps
            attended = moment.attended + rows * prompt_tokens
            total += self.base * moment.steps
            total += self.per_trace * (rows + moment.prefilled) + self.per_token * attended
        return total


@dataclass(frozen=True)
class Roofline:
    """Seconds of a virtual GPU's passes, as :class:`Speed` has them."""

    speed: Speed

    def seconds(self, history: Iterable[DecodeStep], prompt_tokens: float = 0) -> float:
        """Seconds that these decode steps take, with the prefill of who started before them."""
        total = self.speed.overhead
        for moment in history:
            mean = moment.attended / moment.steps + moment.running * prompt_tokens
            total += moment.steps * self.speed.decode(moment.running, mean)
            if moment.prefilled:
                total += self.speed.prefill([moment.prefilled], [moment.prefilled])
        return total
