"""Turns simulated decode steps into seconds: a cost model fitted to recorded groups."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from sklearn.linear_model import LinearRegression

from step_sglang.evaluation.errors import ReplayError
from step_sglang.evaluation.simulator import DecodeStep
from step_sglang.evaluation.traces import RecordedGroup


@dataclass(frozen=True)
class CostModel:
    """Seconds of a decode step: a base, plus a cost per running trace and per attended token.

    Prefill, also of a retracted trace, costs as much per token as a running trace per step.
    """

    base: float
    per_trace: float
    per_token: float
    overhead: float  # seconds of a question outside its decode steps: prefill, HTTP

    def seconds(self, history: Iterable[DecodeStep], prompt_tokens: int = 0) -> float:
        """Seconds that these decode steps take; every trace also attends to the shared prompt."""
        total = self.overhead
        for moment in history:
            attended = moment.tokens + moment.running * prompt_tokens
            rows = moment.running + moment.prefilled
            total += self.base + self.per_trace * rows + self.per_token * attended
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
