"""Draws a training run: loss, ROC, ranking along the trace, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from sklearn.metrics import roc_curve

from step_sglang.training.evaluate import Evaluation, Scored
from step_sglang.training.fit import Fitted
from step_sglang.training.metrics import RUNNING_MEAN, Ranking, signals_at
from step_sglang.training.style import Label, colour, label_line_ends, new_figure, save

PLOTS = ("loss.png", "roc.png", "ranking.png", "reliability.png")  # each beside a PDF
_STEP, _TRACE = "#0072B2", "#D55E00"  # a step's score, a trace's
_PROBABILITY = "#009E73"  # that it is right
_NAMES = {RUNNING_MEAN: "STEP's trace score"}


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
        save(figure, folder / name)


def _loss(fitted: Fitted) -> pyplot.Figure:
    figure, (left, right) = new_figure(7, 2.8, 2)
    epochs = range(1, len(fitted.history) + 1)
    left.plot(epochs, [e.loss for e in fitted.history], ".-", color="#333333")
    left.set(xlabel="epoch", ylabel="training loss")
    lines = (
        ("step, pooled", [e.step_auc for e in fitted.history], _STEP),
        ("trace, within\nthe question", [e.within for e in fitted.history], _TRACE),
    )
    for name, values, shade in lines:
        right.plot(epochs, values, ".-", color=shade, label=name)
    right.set(xlabel="epoch", ylabel="AUC, validation questions")
    for axis in (left, right):
        axis.axvline(fitted.best_epoch, color="gray", linestyle=":")
        axis.xaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=8, frameon=False)
    figure.suptitle(f"epoch {fitted.best_epoch} (dotted) was kept", fontsize=9)
    figure.tight_layout()
    return figure


def _roc(scored: Scored, evaluation: Evaluation) -> pyplot.Figure:
    figure, axis = new_figure(3.5, 3.5)
    table = scored.table
    has = table.num_steps > 0
    final = signals_at(table, scored.scores, 1.0)[RUNNING_MEAN][has]
    pooled = evaluation.ranking[RUNNING_MEAN][1.0].auc.value
    for name, shade, correct, values in (
        (
            f"step score, AUC {evaluation.step_auc:.3f}",
            _STEP,
            table.correct[table.step_trace],
            None,
        ),
        (f"trace score, AUC {pooled:.3f}", _TRACE, table.correct[has], final),
    ):
        false, true, _ = roc_curve(correct, scored.scores if values is None else values)
        axis.plot(false, true, color=shade, label=name)
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axis.set(
        xlabel="false positive rate", ylabel="true positive rate", title="all questions pooled"
    )
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def draw_ranking(rankings: Mapping[str, Mapping[float, Ranking]]) -> pyplot.Figure:
    """AUC along the trace, within the question and pooled: the tables' figures, ties half."""
    figure, axes = new_figure(8, 3.2, 2, sharey=True)
    for title, name, axis in (
        ("within the question", "auc_within", axes[0]),
        ("all questions pooled", "auc", axes[1]),
    ):
        labels = []
        for signal, at in rankings.items():
            shade = colour(signal)
            estimates = [getattr(ranking, name) for ranking in at.values()]
            along = [100 * fraction for fraction in at]
            axis.plot(along, [e.value for e in estimates], "o-", color=shade, markersize=4)
            lows, highs = [e.low for e in estimates], [e.high for e in estimates]
            axis.fill_between(along, lows, highs, color=shade, alpha=0.12, linewidth=0)
            labels.append(Label(along[-1], estimates[-1].value, _NAMES.get(signal, signal), shade))
        axis.plot((25, 100), (0.5, 0.5), color="gray", linestyle=":")
        axis.set(title=title, xlabel="% of the trace's steps", xticks=(25, 50, 75, 100))
        figure.tight_layout()
        label_line_ends(axis, labels)
    axes[0].set_ylabel("AUC")
    figure.tight_layout()
    return figure


def _reliability(evaluation: Evaluation) -> pyplot.Figure:
    figure, axis = new_figure(3.5, 3.5)
    lines = [
        ("step score", _STEP, evaluation.step_calibration),
        ("trace score", _TRACE, evaluation.trace_calibration),
    ]
    if evaluation.weight_calibration is not None:
        lines.append(("calibrated trace score", _PROBABILITY, evaluation.weight_calibration))
    for name, shade, found in lines:
        if not found.count:
            continue
        sizes = 6 + 60 * np.asarray(found.count) / max(found.count)
        axis.plot(
            found.predicted, found.observed, "-", color=shade, label=f"{name}, ECE {found.ece:.3f}"
        )
        axis.scatter(found.predicted, found.observed, sizes, color=shade)
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":")
    axis.set(xlabel="score", ylabel="share of correct", xlim=(0, 1), ylim=(0, 1))
    axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure
