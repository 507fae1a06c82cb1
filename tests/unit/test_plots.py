"""Plots say what the tables say, in one colour per method, with labels that do not overlap."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from step_sglang.evaluation.methods import METHODS
from step_sglang.training.metrics import Estimate, Ranking, rankings
from step_sglang.training.plots import draw_ranking
from step_sglang.training.style import Label, colour, label_line_ends, new_figure, put_labels, save
from step_sglang.training.table import build_table
from tests.training_samples import question


def ranking(auc: float, pairs: float) -> Ranking:
    one, other = Estimate(auc, auc, auc), Estimate(pairs, pairs, pairs)
    return Ranking(one, one, other, other, None)


def test_the_ranking_plot_counts_ties_as_the_tables_do() -> None:
    # Two of three pairs strictly in order and one tied: an AUC of .833.
    found = {"running mean": {0.5: ranking(0.833, 0.667), 1.0: ranking(0.9, 0.7)}}
    figure = draw_ranking(found)
    for axis in figure.axes:
        assert axis.lines[0].get_ydata().tolist() == [0.833, 0.9]
    pyplot.close(figure)


def test_the_ranking_plot_shades_no_interval_of_few_questions() -> None:
    rng = np.random.default_rng(0)
    # Of 12 questions one has right and wrong traces: pooled there is an interval, within it none.
    shares = [0.5, *[1.0, 0.0] * 5, 1.0]
    table = build_table(
        [question(f"q{i}", rng, share=share).traces for i, share in enumerate(shares)]
    )
    figure = draw_ranking(rankings(table, rng.random(len(table.positions))))
    within, pooled = ([shade.get_paths() for shade in axis.collections] for axis in figure.axes)
    assert len(within) == len(pooled) == 4
    assert not any(len(paths) for paths in within) and all(len(paths) for paths in pooled)
    pyplot.close(figure)


def test_every_method_has_a_colour_of_its_own() -> None:
    colours = [colour(method.title) for method in METHODS.values()]
    assert len(set(colours)) == len(colours)
    assert colour("running mean") == colour("STEP")
    assert colour("lowest group confidence") == colour("DeepConf-low")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at_ends", [False, True])
def test_labels_do_not_overlap(seed: int, at_ends: bool) -> None:
    draw = np.random.default_rng(seed)
    figure, axis = new_figure(5.5, 3.6)
    points = draw.uniform(0, 1, (6, 2)) * (1, 0.3 if seed % 2 else 1)
    if at_ends:
        points[:, 0] = 1.0
    axis.scatter(*points.T)
    axis.set(xlim=(0, 1.2), ylim=(-0.1, 1.1))
    labels = [Label(x, y, f"a method {i}", "black", 0.02) for i, (x, y) in enumerate(points)]
    (label_line_ends if at_ends else put_labels)(axis, labels)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without their lines
    assert len(boxes) == 6
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    pyplot.close(figure)


def test_a_plot_is_written_for_the_screen_and_for_print(tmp_path: Path) -> None:
    figure, _ = new_figure(2, 2)
    png, pdf = save(figure, tmp_path / "a.png")
    assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")
