"""Draws an evaluation: accuracy against latency, where the time goes, the effect of the memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from step_sglang.evaluation.ranking import Rankings
from step_sglang.evaluation.summary import Summary
from step_sglang.training.plots import draw_ranking

LATENCY, BREAKDOWN, MEMORY = "latency.png", "breakdown.png", "memory.png"
RANKING = "ranking.png"  # Fig. 5


def draw_all(
    folder: Path, summaries: Sequence[Summary], rankings: Rankings | None = None
) -> list[Path]:
    """Write the plots that the results allow; returns their files."""
    memories = list(dict.fromkeys(s.memory for s in summaries))
    last = [s for s in summaries if s.memory == memories[-1]]
    drawn = [(LATENCY, accuracy_against_latency(last))]
    timed = [s for s in last if s.n == max(x.n for x in last) and s.wait is not None]
    if timed:
        drawn.append((BREAKDOWN, breakdown(timed)))
    if len(memories) > 1:
        drawn.append((MEMORY, by_memory(summaries, memories)))
    if rankings:
        drawn.append((RANKING, draw_ranking(rankings)))
    files = []
    for name, figure in drawn:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)
        files.append(folder / name)
    return files


def accuracy_against_latency(summaries: Sequence[Summary]) -> pyplot.Figure:
    """Accuracy over latency, one line per method through its numbers of traces (Fig. 4)."""
    figure, axis = pyplot.subplots(figsize=(6, 4.5))
    for title, theirs in _by_title(summaries).items():
        axis.errorbar(
            [s.latency.value for s in theirs],
            [100 * s.accuracy.value for s in theirs],
            yerr=[100 * np.nan_to_num(s.accuracy.error) for s in theirs],
            fmt="o-", capsize=2, label=title,
        )  # fmt: skip
        for s in theirs:
            axis.annotate(
                f"{s.n}", (s.latency.value, 100 * s.accuracy.value), textcoords="offset points",
                xytext=(4, 4), fontsize="x-small",
            )  # fmt: skip
    axis.set(xlabel="latency of a question, s", ylabel="accuracy, %")
    axis.legend(fontsize="small")
    return figure


def breakdown(summaries: Sequence[Summary]) -> pyplot.Figure:
    """Stacked bars of a trace's mean waiting, prefill and decoding time (Fig. 2)."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    bottom = np.zeros(len(summaries))
    for name in ("wait", "prefill", "decode"):
        values = np.asarray([getattr(s, name) or 0.0 for s in summaries])
        axis.bar([s.title for s in summaries], values, bottom=bottom, label=name)
        bottom += values
    axis.set_ylabel("seconds of a trace, mean")
    axis.tick_params(axis="x", rotation=30)
    axis.legend(fontsize="small")
    return figure


def by_memory(summaries: Sequence[Summary], memories: Sequence[str]) -> pyplot.Figure:
    """Latency and accuracy by the size of the KV pool (Table 3)."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    most = max(s.n for s in summaries)
    for title, theirs in _by_title([s for s in summaries if s.n in (1, most)]).items():
        places = [memories.index(s.memory) for s in theirs]
        left.plot(places, [s.latency.value for s in theirs], "o-", label=title)
        right.plot(places, [100 * s.accuracy.value for s in theirs], "o-", label=title)
    for axis, label in ((left, "latency of a question, s"), (right, "accuracy, %")):
        axis.set_xticks(range(len(memories)), memories, rotation=20)
        axis.set(xlabel="KV pool", ylabel=label)
    left.legend(fontsize="small")
    return figure


def _by_title(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    found: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        found[summary.title].append(summary)
    return dict(found)
