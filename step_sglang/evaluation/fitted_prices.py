"""What a decode step takes on a machine, fitted to what `bench` measured there.

Trials that were timed tell it best: a recorded group also logs every token, in a pool in which all
traces run at once. So its stamps count only where no trial was timed.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression

from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.errors import ReplayError
from step_sglang.evaluation.methods import RECORD
from step_sglang.evaluation.results import RESULTS, load_results
from step_sglang.evaluation.traces import RecordedGroup
from step_sglang.evaluation.trial_result import TrialResult

_FEWEST = 50  # traces; fewer tell less than the stamps of a recorded group's tokens


@dataclass(frozen=True)
class FittedPrices:
    """Prices, and what they were fitted to."""

    prices: CostModel
    of: str

    @property
    def told(self) -> str:
        """A line for the user."""
        p = self.prices
        return (
            f"step times: {self.of}; {p.base * 1e3:.2f} ms + {p.per_trace * 1e3:.3f} ms a trace + "
            f"{p.per_token * 1e6:.2f} µs a token, and {p.overhead:.2f} s a question"
        )


def fitted_prices(
    folders: Sequence[Path], groups: Sequence[RecordedGroup], warn: Callable[[str], None]
) -> FittedPrices:
    """Of the timed trials on the questions of these groups, else of the groups themselves.

    Args:
        folders: of `bench --record`, where the groups come from.
        groups: at least one.
        warn: told of every line of results that is left out, and why.

    Raises:
        BenchError: the folders were measured in different ways.
        ReplayError: no group has two tokens, and nothing was timed.
    """
    prompts = {group.question: group.prompt_tokens for group in groups}
    # A run that was killed early has no results, or an empty file of them.
    timed = [f for f in folders if (f / RESULTS).is_file() and (f / RESULTS).stat().st_size]
    trials: list[TrialResult] = []
    if timed:
        loaded = load_results(timed)
        for problem in loaded.problems:
            warn(problem)
        trials = [
            trial
            for trial in loaded.results
            if trial.question in prompts and trial.method != RECORD.name
        ]
    told = [why for trial in trials if (why := _left_out(trial))]
    traces = sum(len(trial.traces) for trial in trials if not _left_out(trial))
    fitted = fit_trials(trials, prompts)
    out = ", ".join(f"{count} {why}" for why, count in Counter(told).items())
    of = f"{traces} traces of {len(trials) - len(told)} of {len(trials)} timed trials"
    of += f" (left out: {out})" if out else ""
    if fitted is None:
        why = f"{of} are too few" if trials else "no trial was timed"
        return FittedPrices(fit_groups(groups), f"the recorded groups, as {why}")
    return FittedPrices(fitted, of)


def fit_trials(trials: Sequence[TrialResult], prompts: Mapping[str, int]) -> CostModel | None:
    """Fit to the decode times of the traces of timed trials; None where too few have them.

    When each trace ran is known from its wait, prefill and decoding, and so is how many ran beside
    it and, as each goes at an even pace, how many tokens they attended to.

    Args:
        trials: of any method. What is recorded, was retracted or came in several requests is left
            out: when its traces ran is not known.
        prompts: the prompt tokens of each question.
    """
    rows: list[tuple[float, float, float]] = []
    seconds, overheads = [], []
    for trial in trials:
        if _left_out(trial):
            continue
        began, decode, tokens = _moments(trial)
        ended = began + decode
        overheads.append(trial.latency - float(ended.max() - began.min()))
        rows += _spent(began, decode, tokens, prompts[trial.question])
        seconds += decode.tolist()
    return _fit(rows, seconds, overheads) if len(rows) >= _FEWEST else None


def fit_groups(groups: Sequence[RecordedGroup]) -> CostModel:
    """Fit to the time stamps of recorded groups.

    Tokens of one decode step have the same time stamp. So every time stamp in a group is a step of
    the traces that have a token then, and it took the time since the stamp before.

    Raises:
        ReplayError: no group has two tokens.
    """
    rows: list[tuple[float, float, float]] = []
    seconds, overheads = [], []
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
    return _fit(rows, seconds, overheads)


_Times = NDArray[np.float64]


def _left_out(trial: TrialResult) -> str | None:
    """Why it is not known when its traces ran; None: it is."""
    if trial.method == RECORD.name:
        return "recorded"
    if trial.retracted:
        return "retracted"
    if len(trial.phases) > 1:
        return "in several requests"
    known = (
        trace.wait is not None and trace.prefill is not None and trace.decode and trace.tokens > 1
        for trace in trial.traces
    )  # fmt: skip
    return None if all(known) else "with a trace without times"


def _moments(trial: TrialResult) -> tuple[_Times, _Times, _Times]:
    """When decoding began, its seconds and its steps, of each trace."""
    found = [
        ((trace.wait or 0.0) + (trace.prefill or 0.0), trace.decode or 0.0, trace.tokens - 1)
        for trace in trial.traces
    ]
    began, decode, tokens = np.asarray(found, np.float64).T
    return began, decode, tokens


def _spent(
    began: _Times, decode: _Times, tokens: _Times, prompt: int
) -> Iterator[tuple[float, float, float]]:
    """Of each trace: its steps, and over them the traces that ran and the tokens attended to."""
    edges = np.unique(np.concatenate([began, began + decode]))
    middle, lasted = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    done = (middle - began[:, None]) / decode[:, None]  # [traces, spans]
    runs = (done > 0) & (done < 1)
    running = runs.sum(axis=0)
    attended = (runs * (done * tokens[:, None] + prompt)).sum(axis=0)
    for mine, seconds, steps in zip(runs, decode, tokens, strict=True):
        share = steps * (lasted * mine) / seconds  # of its steps, in each span
        yield float(steps), float(share @ running), float(share @ attended)


def _fit(
    rows: Sequence[tuple[float, float, float]],
    seconds: Sequence[float],
    overheads: Sequence[float],
) -> CostModel:
    """Least squares with non-negative costs of a step, of a trace in it, of an attended token."""
    matrix = np.asarray(rows, np.float64)
    scale = matrix.max(axis=0)  # comparable columns, or the solver stops too early
    model = LinearRegression(positive=True, fit_intercept=False)
    model.fit(matrix / scale, np.asarray(seconds, np.float64))
    base, per_trace, per_token = (float(price) for price in model.coef_ / scale)
    return CostModel(base, per_trace, per_token, max(0.0, statistics.mean(overheads)))
