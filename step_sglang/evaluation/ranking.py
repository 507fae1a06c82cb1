"""How well signals rank recorded traces as they grow, measured as in `train` (paper Fig. 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from step_sglang.evaluation.traces import TRACES, RecordedTrace, load_groups
from step_sglang.training.confidence import token_signals
from step_sglang.training.metrics import Ranking, rankings
from step_sglang.training.table import Floats, TraceTable

Rankings = Mapping[str, Mapping[float, Ranking]]


def recorded_rankings(folders: Sequence[Path], window: int) -> Rankings | None:
    """Rank by every recorded signal; None where no traces were recorded.

    Args:
        folders: of `bench`.
        window: tokens of a DeepConf group.
    """
    found = [folder for folder in folders if any((folder / TRACES).glob("*.jsonl.gz"))]
    if not found:
        return None
    questions: dict[str, list[RecordedTrace]] = defaultdict(list)
    for group in load_groups(found):
        questions[group.question] += group.traces
    table, scores = build(list(questions.values()), window)
    return rankings(table, scores) if len(scores) else None


def build(questions: Sequence[Sequence[RecordedTrace]], window: int) -> tuple[TraceTable, Floats]:
    """The traces as a table, and their step scores [S]."""
    traces = [trace for theirs in questions for trace in theirs]
    sizes = [len(theirs) for theirs in questions]
    lowest = [
        token_signals(np.zeros(t.tokens).tolist(), t.confidences, window).lowest_confidence
        for t in traces
    ]
    positions = [np.asarray(t.positions, np.int64) for t in traces]
    counts = [len(found) for found in positions]
    steps = np.concatenate([*positions, np.zeros(0, np.int64)])
    unknown = np.full(len(steps), np.nan)  # log-probabilities are not recorded
    table = TraceTable(
        question=np.repeat(np.arange(len(sizes)), sizes),
        correct=np.asarray([t.correct for t in traces], bool),
        answer=np.full(len(traces), -1, np.int64),
        num_tokens=np.asarray([t.tokens for t in traces], np.int64),
        mean_logprob=np.full(len(traces), np.nan),
        lowest_confidence=np.asarray([values[-1] for values in lowest], np.float64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        positions=steps,
        step_mean_logprob=unknown,
        step_lowest_confidence=np.concatenate(
            [*(values[at] for values, at in zip(lowest, positions, strict=True)), np.zeros(0)]
        ),
    )
    scores = np.concatenate([*(np.asarray(t.step_scores, np.float64) for t in traces), np.zeros(0)])
    return table, scores
