"""Turns simulated decode steps into seconds: prices fitted to recorded groups, or a roofline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from sklearn.linear_model import LinearRegression

from step_sglang.evaluation.errors import ReplayError
from step_sglang.evaluation.simulator import DecodeStep
from step_sglang.evaluation.traces import RecordedGroup
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
        total = 0.0
        for moment in history:
            mean = moment.attended / moment.steps + moment.running * prompt_tokens
            total += moment.steps * self.speed.decode(moment.running, mean)
            if moment.prefilled:
                total += self.speed.prefill([moment.prefilled], [moment.prefilled])
        return total


def fit_cost_model(groups: Sequence[RecordedGroup]) -> CostModel:
    """Fit to recorded groups by least squares with non-negative costs.

    Tokens of one decode step have the same time stamp. So every time stamp in a group is a step of
    the traces that have a token then, and it took the time since the stamp before.

    Raises:
        ReplayError: no group has two tokens.
    """
    rows, seconds, overheads = [], [], []
    for group in groups:
        steps: dict[float, tuple[int, int]] = {}  # moment -> traces and the tokens they attend to
        for trace in group.traces:
            for number, at in enumerate(trace.times):
                running, attended = steps.get(at, (0, 0))
                steps[at] = (running + 1, attended + group.prompt_tokens + number)
        moments = sorted(steps)
        for before, at in pairwise(moments):
            rows.append((1.0, *steps[at]))
            seconds.append(at - before)
        if moments:
            overheads.append(group.latency - (moments[-1] - moments[0]))
    if not rows:
        raise ReplayError("the recorded traces are too short to tell how long a step takes")
    matrix = np.asarray(rows, np.float64)
    scale = matrix.max(axis=0)  # comparable columns, or the solver stops too early
    model = LinearRegression(positive=True, fit_intercept=False)
    model.fit(matrix / scale, np.asarray(seconds, np.float64))
    base, per_trace, per_token = (float(price) for price in model.coef_ / scale)
    return CostModel(base, per_trace, per_token, max(0.0, statistics.mean(overheads)))
