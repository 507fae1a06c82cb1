"""Draws an evaluation: accuracy against latency, where the time goes, the effect of the memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from step_sglang.evaluation.ranking import Rankings
from step_sglang.evaluation.summary import Summary
from step_sglang.training.plots import draw_ranking
from step_sglang.training.style import (
    Label,
    colour,
    label_line_ends,
    new_figure,
    put_labels,
    save,
)

LATENCY, BREAKDOWN, MEMORY = "latency.png", "breakdown.png", "memory.png"
RANKING = "ranking.png"  # Fig. 5


def draw_all(
    folder: Path, summaries: Sequence[Summary], rankings: Rankings | None = None
) -> list[Path]:
    """Write the plots that the results allow, as PNG and PDF; returns their files."""
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
    return [file for name, figure in drawn for file in save(figure, folder / name)]


def accuracy_against_latency(summaries: Sequence[Summary]) -> pyplot.Figure:
    """Accuracy over latency, one line per method through its numbers of traces (Fig. 4)."""
    figure, axis = new_figure(5.5, 3.6)
    labels = []
    sizes = {s.n for s in summaries if s.n > 1}
    for title, theirs in _by_title(summaries).items():
        axis.errorbar(
            [s.latency.value for s in theirs],
            [100 * s.accuracy.value for s in theirs],
            yerr=[100 * np.nan_to_num(s.accuracy.error) for s in theirs],
            fmt="o-", capsize=2, markersize=5, color=colour(title),
        )  # fmt: skip
        for s in theirs:
            text = title if s is theirs[-1] else ""
            if len(sizes) > 1 and s.n > 1:
                text = f"{text} n={s.n}".strip()
            if text:
                error = float(np.nan_to_num(100 * s.accuracy.error))
                place = s.latency.value, 100 * s.accuracy.value
                labels.append(Label(*place, text, colour(title), error))
    axis.set(xlabel="latency of a question, s", ylabel="accuracy, %")
    axis.set_xlim(0, 1.08 * axis.get_xlim()[1])
    traces = f"{sizes.pop()} traces a question, " if len(sizes) == 1 else ""
    pool = f"KV pool: {summaries[0].memory}"
    axis.set_title(f"{traces}{pool}; bars: standard error", fontsize=9)
    figure.tight_layout()
    put_labels(axis, labels)
    return figure


def breakdown(summaries: Sequence[Summary]) -> pyplot.Figure:
    """Stacked bars of a trace's mean waiting, prefill and decoding time (Fig. 2)."""
    figure, axis = new_figure(5.5, 0.7 + 0.35 * len(summaries))
    titles = [s.title for s in summaries]
    left = np.zeros(len(summaries))
    for name in ("wait", "prefill", "decode"):
        values = np.asarray([getattr(s, name) or 0.0 for s in summaries])
        axis.barh(titles, values, left=left, label=name, color=colour(name), height=0.65)
        left += values
    axis.invert_yaxis()
    axis.set_xlabel("time of a trace, mean, s")
    axis.legend(
        fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0
    )
    figure.tight_layout()
    return figure


def by_memory(summaries: Sequence[Summary], memories: Sequence[str]) -> pyplot.Figure:
    """Latency and accuracy by the size of the KV pool (Table 3)."""
    figure, axes = new_figure(8, 3.2, 2)
    most = max(s.n for s in summaries)
    shown = _by_title([s for s in summaries if s.n in (1, most)])
    for axis, name, scale, words in (
        (axes[0], "latency", 1, "latency of a question, s"),
        (axes[1], "accuracy", 100, "accuracy, %"),
    ):
        labels = []
        for title, theirs in shown.items():
            places = [memories.index(s.memory) for s in theirs]
            values = [scale * getattr(s, name).value for s in theirs]
            axis.plot(places, values, "o-", color=colour(title), markersize=4)
            labels.append(Label(places[-1], values[-1], title, colour(title)))
        axis.set_xticks(range(len(memories)), memories, rotation=20)
        axis.set(xlabel="KV pool", ylabel=words)
        figure.tight_layout()
        label_line_ends(axis, labels)
    return figure


def _by_title(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    found: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        found[summary.title].append(summary)
    return dict(found)
