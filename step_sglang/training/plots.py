"""Draws a training run: loss, ROC, ranking accuracy along the trace, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from sklearn.metrics import roc_curve

from step_sglang.training.evaluate import Evaluation, Scored
from step_sglang.training.fit import Fitted
from step_sglang.training.metrics import RUNNING_MEAN, Ranking, signals_at

PLOTS = ("loss.png", "roc.png", "ranking.png", "reliability.png")
_COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:gray")


def draw_all(folder: Path, fitted: Fitted, scored: Scored, evaluation: Evaluation) -> None:
    """Write the four figures of :data:`PLOTS` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = (
        _loss(fitted),
        _roc(scored, evaluation),
        draw_ranking(evaluation.ranking),
        _reliability(evaluation),
    )
    for name, figure in zip(PLOTS, drawn, strict=True):
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)


def _loss(fitted: Fitted) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(6, 4))
    epochs = range(1, len(fitted.history) + 1)
    axis.plot(epochs, [e.loss for e in fitted.history], "k.-", label="training loss")
    axis.set(xlabel="epoch", ylabel="loss")
    right = axis.twinx()
    right.plot(epochs, [e.step_auc for e in fitted.history], ".-", label="step AUC")
    right.plot(epochs, [e.within for e in fitted.history], ".-", label="within-question AUC")
    right.set_ylabel("on validation questions")
    right.axvline(fitted.best_epoch, color="gray", linestyle=":", label="kept")
    right.legend(handles=[*axis.lines, *right.lines], fontsize="small")
    return figure


def _roc(scored: Scored, evaluation: Evaluation) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(5, 5))
    table = scored.table
    has = table.num_steps > 0
    final = signals_at(table, scored.scores, 1.0)[RUNNING_MEAN][has]
    pooled = evaluation.ranking[RUNNING_MEAN][1.0].auc.value
    for label, correct, values in (
        (f"step score, AUC {evaluation.step_auc:.3f}", table.correct[table.step_trace], None),
        (f"trace score, AUC {pooled:.3f}", table.correct[has], final),
    ):
        false, true, _ = roc_curve(correct, scored.scores if values is None else values)
        axis.plot(false, true, label=label)
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title="pooled")
    axis.legend(fontsize="small")
    return figure


def draw_ranking(rankings: Mapping[str, Mapping[float, Ranking]]) -> pyplot.Figure:
    """Ranking accuracy along the trace, within the question and pooled."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for title, name, axis in (
        ("within the question", "pairs_within", axes[0]),
        ("pooled", "pairs", axes[1]),
    ):
        for colour, (signal, at) in zip(_COLOURS, rankings.items(), strict=False):
            estimates = [getattr(ranking, name) for ranking in at.values()]
            along = [100 * fraction for fraction in at]
            axis.plot(along, [e.value for e in estimates], "o-", color=colour, label=signal)
            lows, highs = [e.low for e in estimates], [e.high for e in estimates]
            axis.fill_between(along, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axis.axhline(0.5, color="gray", linestyle=":")
        axis.set(title=title, xlabel="% of the trace's steps")
    axes[0].set_ylabel("pairs ranked correctly")
    axes[0].legend(fontsize="small")
    return figure


def _reliability(evaluation: Evaluation) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(5, 5))
    for label, found in (
        ("step score", evaluation.step_calibration),
        ("trace score", evaluation.trace_calibration),
    ):
        sizes = 10 + 90 * np.asarray(found.count) / max(found.count)
        axis.plot(found.predicted, found.observed, "-", label=f"{label}, ECE {found.ece:.3f}")
        axis.scatter(found.predicted, found.observed, sizes)
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axis.set(xlabel="score", ylabel="share of correct", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize="small")
    return figure
