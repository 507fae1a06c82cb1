"""Recorded traces: the time of every token and the score of every step.

One file per question, n and repeat:

traces/QUESTION-N-REPEAT.jsonl.gz    a line about the question, then one line per trace
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from step_sglang import files, protocol
from step_sglang.data.questions import Job
from step_sglang.errors import ServerError
from step_sglang.evaluation.errors import BenchError, ReplayError
from step_sglang.evaluation.methods import SampleResult
from step_sglang.evaluation.sampler import Graded
from step_sglang.evaluation.trial_result import as_pair
from step_sglang.voting.session import SampledTrace

TRACES = "traces"


@dataclass(frozen=True)
class RecordedTrace:
    """One trace with its timeline. T output tokens, S steps."""

    fate: str
    answer: str | None
    correct: bool
    score: float | None
    times: Sequence[float]  # [T] unix seconds when the scheduler saw each token
    confidences: tuple[float, ...]  # [T] token confidences, nats
    positions: tuple[int, ...]  # [S] output index of each scored boundary token
    step_scores: tuple[float, ...]  # [S]
    text: str

    @property
    def tokens(self) -> int:
        """Tokens that it generated."""
        return len(self.times)


@dataclass(frozen=True)
class RecordedGroup:
    """All traces of one question, sampled together."""

    question: str  # its id
    repeat: int
    gold: str
    prompt_tokens: int
    max_new_tokens: int  # limit of each trace
    latency: float  # seconds from the request to the last trace's end
    traces: tuple[RecordedTrace, ...]
    calibration: tuple[float, float] | None = None  # slope and bias, of the server's scorer

    @property
    def whole(self) -> bool:
        """Whether every trace ended by itself."""
        return all(trace.fate == "finished" for trace in self.traces)


def recorded_group(
    job: Job,
    repeat: int,
    prompt_tokens: int,
    max_new_tokens: int,
    latency: float,
    asked: SampleResult,
    graded: Graded,
) -> RecordedGroup:
    """A group that was sampled with ``record``, as it is stored.

    Raises:
        ServerError: the server returned no timeline.
    """
    pairs = zip(asked.traces, graded.traces, strict=True)
    traces = tuple(_recorded(trace, result.correct) for trace, result in pairs)
    return RecordedGroup(
        job.id, repeat, job.answer, prompt_tokens, max_new_tokens, latency, traces,
        stated_calibration(asked.traces),
    )  # fmt: skip


def stated_calibration(traces: Sequence[SampledTrace]) -> tuple[float, float] | None:
    """What the server said of its scorer's calibration with any of the traces."""
    return next((t.calibration.pair for t in traces if t.calibration is not None), None)


def _recorded(trace: SampledTrace, correct: bool) -> RecordedTrace:
    step = trace.meta_info.get(protocol.META_KEY) or {}
    try:
        timeline = step[protocol.META_RECORD]
        return RecordedTrace(
            fate=trace.fate.value,
            answer=trace.answer,
            correct=correct,
            score=trace.score,
            times=tuple(timeline[protocol.RECORD_TIMES]),
            confidences=tuple(timeline[protocol.RECORD_CONFIDENCES]),
            positions=tuple(step[protocol.META_POSITIONS]),
            step_scores=tuple(step[protocol.META_STEP_SCORES]),
            text=trace.text,
        )
    except (KeyError, TypeError) as error:
        raise ServerError(
            f"the server returned no timeline of a trace ({error}); is it of this version?"
        ) from error


def write_group(folder: Path, group: RecordedGroup) -> None:
    """Write a group, or nothing; one that is there is replaced.

    Raises:
        BenchError: the disk is full or fails.
    """
    head = {key: value for key, value in asdict(group).items() if key != "traces"}
    lines = [head, *(asdict(trace) for trace in group.traces)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file = folder / TRACES / f"{group.question}-{len(group.traces)}-{group.repeat}.jsonl.gz"
    try:
        file.parent.mkdir(exist_ok=True)
        files.write(file, gzip.compress(text.encode(), 6))
    except OSError as error:
        raise BenchError(f"writing to {folder} failed: {error.strerror}") from error


def load_groups(
    folders: Sequence[Path], warn: Callable[[str], None] = lambda problem: None
) -> Iterator[RecordedGroup]:
    """Recorded groups of several folders, in the order of their files' names.

    Args:
        folders: of `bench`, such as shards.
        warn: is told of a group that occurs twice; the first counts.

    Raises:
        ReplayError: there are none, or a file is damaged.
    """
    files = [file for folder in folders for file in sorted((folder / TRACES).glob("*.jsonl.gz"))]
    if not files:
        raise ReplayError(f"{folders[0]} holds no recorded traces: run bench with --record")
    seen: set[tuple[str, int, int]] = set()
    for file in files:
        try:
            # Only "\n" ends a line: a trace's text may hold U+2028 and its like.
            lines = gzip.decompress(file.read_bytes()).split(b"\n")
            head, *rows = [json.loads(line) for line in lines if line]
            head["calibration"] = as_pair(head.get("calibration"))
            group = RecordedGroup(**head, traces=tuple(map(_trace, rows)))
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise ReplayError(
                f"{file} is damaged ({error}): remove it, and record again"
            ) from error
        key = (group.question, len(group.traces), group.repeat)
        if key in seen:
            warn(f"{file} repeats a group; the first counts")
            continue
        seen.add(key)
        yield group


def _trace(row: dict[str, Any]) -> RecordedTrace:
    lists = ("times", "confidences", "positions", "step_scores")
    return RecordedTrace(**{**row, **{name: tuple(row[name]) for name in lists}})
