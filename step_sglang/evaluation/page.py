"""Recorded groups as the page that replays them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from step_sglang import files
from step_sglang.evaluation.traces import TRACES, RecordedGroup, RecordedTrace, load_groups
from step_sglang.live.events import (
    AnswerRead,
    Event,
    GroupBegan,
    PoolSample,
    Steps,
    TraceBegan,
    TraceEnded,
    Update,
    VoteStood,
)
from step_sglang.live.html import recorded_page
from step_sglang.live.votes import bars
from step_sglang.protocol import DEFAULT_VOTE
from step_sglang.scoring.calibration import TraceCalibration, calibration_of
from step_sglang.voting.early_stopping import cannot_change
from step_sglang.voting.tally import Ballot, Poll, weight_of

PAGE = "page.html"
MAX_GROUPS = 24  # of one page, so that a browser opens it at once
_SAMPLES = 200  # of a group's memory


def write_page(folders: Sequence[Path], target: Path) -> Path | None:
    """Write the page of the first recorded groups into ``target``; None where none are recorded.

    Raises:
        ReplayError: a file is damaged.
        OSError: the disk fails.
    """
    if not any(any((folder / TRACES).glob("*.jsonl.gz")) for folder in folders):
        return None
    update = as_update(islice(load_groups(folders), MAX_GROUPS))
    files.write(target / PAGE, recorded_page(update).encode())
    return target / PAGE


def as_update(groups: Iterable[RecordedGroup]) -> Update:
    """Everything that is recorded of groups, but the text of their traces.

    The memory is that of a group's own tokens, as nothing else is recorded of it. A trace that
    generated nothing has no time, so it is left out.
    """
    events: list[Event] = []
    pool: list[PoolSample] = []
    last, number = 0.0, 0
    for place, group in enumerate(groups):
        traces = [trace for trace in group.traces if trace.times]
        if not traces:
            continue
        began = min(trace.times[0] for trace in traces)
        last = max(last, *(trace.times[-1] for trace in traces))
        name = f"{group.question}, repeat {group.repeat + 1}" if group.repeat else group.question
        events.append(GroupBegan(place, began, name, replica=place))
        for trace in traces:
            number += 1
            events.extend(_trace_events(trace, number, place, group))
        events.extend(_votes(traces, place, calibration_of(group.calibration)))
        pool.extend(_memory(traces, group.prompt_tokens, place))
    return Update(last, True, tuple(events), tuple(pool))


def _trace_events(
    trace: RecordedTrace, number: int, place: int, group: RecordedGroup
) -> Iterator[Event]:
    yield TraceBegan(
        number, place, trace.times[0], f"{place}-{number}", group.prompt_tokens, len(group.traces)
    )
    # The last step may end with a token that was never consumed.
    pairs = [
        (trace.times[position], position, score)
        for position, score in zip(trace.positions, trace.step_scores, strict=False)
        if position < trace.tokens
    ]
    if pairs:
        times, positions, scores = zip(*pairs, strict=True)
        yield Steps(number, times, positions, scores)
    yield TraceEnded(number, trace.times[-1], trace.fate, trace.tokens, trace.score)
    if trace.answer is not None and trace.fate == "finished":
        yield AnswerRead(number, trace.answer)


def _votes(
    traces: Sequence[RecordedTrace], place: int, calibration: TraceCalibration | None
) -> Iterator[VoteStood]:
    poll = Poll(DEFAULT_VOTE, same=lambda one, other: False)
    ends = sorted(traces, key=lambda trace: trace.times[-1])
    for ended, trace in enumerate(ends, start=1):
        if trace.fate == "finished" and trace.answer is not None:
            poll.add(Ballot(trace.answer, weight_of(trace.score, DEFAULT_VOTE, calibration)))
        if tallies := poll.tallies():
            settled = cannot_change(tallies, [1.0] * (len(ends) - ended), DEFAULT_VOTE)
            time = trace.times[-1]
            yield VoteStood(place, time, DEFAULT_VOTE, bars(tallies), settled, as_text=True)


def _memory(
    traces: Sequence[RecordedTrace], prompt_tokens: int, place: int
) -> Iterator[PoolSample]:
    import numpy as np

    times = [np.asarray(trace.times) for trace in traces]
    begin, end = min(t[0] for t in times), max(t[-1] for t in times)
    for now in np.linspace(begin, end, _SAMPLES):
        held = [int(np.searchsorted(t, now, side="right")) for t in times if t[-1] > now]
        used = prompt_tokens + sum(held) if held else 0
        yield PoolSample(float(now), used, 0, None, sum(n > 0 for n in held), 0, place)
