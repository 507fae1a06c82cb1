"""Prices of a machine, fitted to timed trials, or to recorded groups."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.fitted_prices import fit_groups, fit_trials, fitted_prices
from step_sglang.evaluation.results import RESULTS, ResultWriter
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace
from step_sglang.evaluation.trial_result import TrialResult, TrialTrace

MACHINE = CostModel(base=0.01, per_trace=0.001, per_token=1e-6, overhead=0.1)
PROMPT, AT_ONCE = 50, 6


def timed(number: int, method: str = "sc") -> TrialResult:
    """A question's 20 traces on a machine of known prices, six at a time: the others wait."""
    draw = random.Random(number)
    waiting = [draw.randint(60, 400) for _ in range(20)]
    running: list[tuple[int, int, float]] = []  # tokens, tokens so far, since when
    now, ended = 0.0, []
    while running or waiting:
        while waiting and len(running) < AT_ONCE:
            running.append((waiting.pop(), 1, now))
        held = sum(have + PROMPT for _, have, _ in running)
        now += MACHINE.base + MACHINE.per_trace * len(running) + MACHINE.per_token * held
        running = [(tokens, have + 1, since) for tokens, have, since in running]
        ended += [(tokens, since, now) for tokens, have, since in running if have == tokens]
        running = [one for one in running if one[1] < one[0]]
    traces = tuple(
        TrialTrace("finished", "7", True, tokens, 0.5, None, None, 0, since, 0.0, end - since)
        for tokens, since, end in ended
    )
    return TrialResult(
        f"q{number}", method, 20, 0, "ample", 1000, "7", "7", True, now + MACHINE.overhead,
        (now + MACHINE.overhead,), None, 1e9, traces, (),
    )  # fmt: skip


TRIALS = [timed(number) for number in range(6)]
PROMPTS = {trial.question: PROMPT for trial in TRIALS}


def slower(trial: TrialResult) -> TrialResult:
    """The same trial on a machine that takes twice as long."""
    traces = (replace(t, wait=2 * t.wait, decode=2 * t.decode) for t in trial.traces)  # type: ignore[operator]
    return replace(trial, latency=2 * trial.latency, traces=tuple(traces))


def close(found: CostModel | None) -> bool:
    """Prices that differ show in a step of six traces, and of one."""
    assert found is not None
    for rows, tokens in ((6, 1500), (1, 300)):
        real = MACHINE.base + MACHINE.per_trace * rows + MACHINE.per_token * tokens
        step = found.base + found.per_trace * rows + found.per_token * tokens
        if step != pytest.approx(real, rel=0.06):
            return False
    return found.overhead == pytest.approx(MACHINE.overhead, abs=0.01)


def test_the_pace_of_traces_tells_the_prices() -> None:
    assert close(fit_trials(TRIALS, PROMPTS))


@pytest.mark.parametrize(
    "other",
    [
        lambda t: replace(slower(t), method="record"),
        lambda t: replace(slower(t), phases=(1.0, 1.0)),
        lambda t: replace(
            slower(t), traces=(replace(slower(t).traces[0], retractions=1), *slower(t).traces[1:])
        ),
        lambda t: replace(
            slower(t), traces=(replace(slower(t).traces[0], wait=None), *slower(t).traces[1:])
        ),
    ],
    ids=["recorded", "in two requests", "retracted", "no stamps"],
)
def test_what_does_not_tell_when_its_traces_ran_is_left_out(other: object) -> None:
    assert close(fit_trials([*TRIALS, *map(other, TRIALS)], PROMPTS))  # type: ignore[arg-type]
    assert not close(fit_trials([*TRIALS, *map(slower, TRIALS)], PROMPTS))


def test_too_few_traces_tell_nothing() -> None:
    assert fit_trials(TRIALS[:2], PROMPTS) is None


def test_timed_trials_come_before_recorded_groups(tmp_path: Path) -> None:
    def trace(tokens: int) -> RecordedTrace:
        times = tuple(0.5 * i for i in range(tokens))
        return RecordedTrace("finished", "7", True, 0.5, times, (), (), (), "x")

    groups = [RecordedGroup(q, 0, "7", PROMPT, 400, 60.0, (trace(90), trace(60))) for q in PROMPTS]
    said: list[str] = []
    found = fitted_prices([tmp_path], groups, said.append)
    assert found.prices == fit_groups(groups) and "as no trial was timed; " in found.told
    (tmp_path / RESULTS).touch()  # as a run that was killed early leaves it
    assert fitted_prices([tmp_path], groups, said.append).prices == fit_groups(groups)
    with ResultWriter(tmp_path, {}) as writer:
        for trial in TRIALS:
            writer.add(trial)
    found = fitted_prices([tmp_path], groups, said.append)
    assert close(found.prices)
    assert found.told.startswith("step times: 120 traces of 6 of 6 timed trials; ")
    # Trials on other questions tell nothing: their prompts are not known.
    alone = [replace(groups[0], question="another")]
    assert fitted_prices([tmp_path], alone, said.append).prices == fit_groups(alone)
    assert not said
    # A line that is damaged is left out, and said to be.
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"question": 1}\n')
    assert close(fitted_prices([tmp_path], groups, said.append).prices)
    assert len(said) == 1 and f"line {len(TRIALS) + 1} is unusable" in said[0]


def test_what_the_prices_come_from_is_told(tmp_path: Path) -> None:
    times = tuple(0.5 * i for i in range(90))
    traces = (RecordedTrace("finished", "7", True, 0.5, times, (), (), (), "x"),)
    groups = [RecordedGroup(q, 0, "7", PROMPT, 400, 60.0, traces) for q in PROMPTS]
    torn = replace(TRIALS[0].traces[0], wait=None)
    with ResultWriter(tmp_path, {}) as writer:
        writer.add(replace(TRIALS[0], traces=(torn, *TRIALS[0].traces[1:])))
        for trial in TRIALS[1:3]:
            writer.add(replace(trial, phases=(1.0, 1.0)))
        writer.add(TRIALS[3])
    told = fitted_prices([tmp_path], groups, lambda problem: None).told
    assert told.startswith(
        "step times: the recorded groups, as 20 traces of 1 of 4 timed trials (left out: 1 with a "
        "trace without times, 2 in several requests) are too few; "
    )
    assert "ms a trace" in told
