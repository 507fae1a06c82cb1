"""How every plot of this package looks: one colour per method, labels beside lines, two files.

A signal has the colour of the method that goes by it. The colours are told apart also by readers
who see few colours (after Okabe and Ito).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_STEP, _SC, _DEEPCONF, _SLIM, _OTHER = "#D55E00", "#0072B2", "#AA4499", "#009E73", "#666666"
_COLOURS = {
    # methods, by their titles
    "STEP": _STEP,
    "STEP (paper policy)": "#E69F00",
    "STEP, ends early": "#8A3B00",
    "STEP, ends when certain": "#B35900",
    "STEP, calibrated vote": "#7F2704",
    "STEP, effort balanced": "#F28E2B",
    "STEP, effort fast": "#FFBE7D",
    "STEP, refilled": "#E15759",
    "STEP, refilled from any": "#FF9D9A",
    "Gambit's rule": "#B07AA1",
    "SC, ends early": "#003F73",
    "SC, ends when certain": "#4D9DD0",
    "SC": _SC,
    "CoT": _OTHER,
    "DeepConf-low": _DEEPCONF,
    "DeepConf-high": "#CC79A7",
    "Slim-SC (diversity)": _SLIM,
    "Slim-SC (random)": "#66C2A5",
    "random victim": "#56B4E9",
    "random victim, effort balanced": "#8CD0F5",
    "random victim, effort fast": "#B5E2FA",
    "longest victim": "#999933",
    # signals
    "running mean": _STEP,
    "mean log-probability": _SC,
    "lowest group confidence": _DEEPCONF,
    "minus length": "#999933",
    # where a trace's time goes
    "wait": "#333333",
    "prefill": "#888888",
    "decode": "#CCCCCC",
}
_FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}


def colour(name: str) -> str:
    """Of a method's title or a signal's name; gray for one that nobody knows."""
    return _COLOURS.get(name, _OTHER)


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of so many inches and its axes, with the package's fonts."""
    pyplot.rcParams.update(_FONT)
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), **options)
    return figure, axes


@dataclass(frozen=True)
class Label:
    """Words beside a point of an axis, in the units of its data."""

    x: float
    y: float
    text: str
    colour: str
    error: float = 0.0  # half of the bar through the point


def put_labels(
    axis: pyplot.Axes,
    labels: Sequence[Label],
    size: float = 8.0,
    sides: Sequence[str] = ("right", "left"),
) -> None:
    """Write labels beside their points, where none touches another, a point or its bar.

    To the right at the point's height if that is free, else as near as possible, on the left too.
    Call it after all is drawn and the limits stand.
    """
    axis.figure.canvas.draw()
    scale = axis.figure.dpi / 72  # pixels of a point
    frame = axis.get_window_extent()
    height, gap = 1.3 * size * scale, 6 * scale
    bars = [
        _Box(x, x, low, high)
        for label in labels
        for (x, low), (_, high) in [
            axis.transData.transform(
                [(label.x, label.y - label.error), (label.x, label.y + label.error)]
            )
        ]
    ]
    taken = list(bars)
    order = sorted(range(len(labels)), key=lambda i: -labels[i].y)
    for label, bar in ((labels[i], bars[i]) for i in order):
        x, y = axis.transData.transform((label.x, label.y))
        width = 0.56 * size * scale * len(label.text)
        best = min(
            (
                (abs(shift) + (side == "left") * height / 2, side, shift)
                for side in sides
                for step in range(-80, 81)
                if _is_free(
                    _Box.beside(x, y + (shift := step * height / 4), width, height, gap, side),
                    [box for box in taken if box is not bar],
                    frame,
                )
            ),
            default=(0.0, "right", 0.0),
        )
        _, side, shift = best
        box = _Box.beside(x, y + shift, width, height, gap, side)
        taken.append(box)
        axis.annotate(
            label.text, (label.x, label.y), fontsize=size, color=label.colour, va="center",
            ha="left" if side == "right" else "right",
            xytext=((gap if side == "right" else -gap) / scale, shift / scale),
            textcoords="offset points",
            arrowprops=None if abs(shift) < height
            else {"arrowstyle": "-", "color": label.colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


@dataclass(frozen=True)
class _Box:
    """A rectangle on the canvas; pixels."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def beside(cls, x: float, y: float, width: float, height: float, gap: float, side: str) -> _Box:
        left = x + gap if side == "right" else x - gap - width
        return cls(left, left + width, y - height / 2, y + height / 2)

    def touches(self, other: _Box) -> bool:
        apart = self.right < other.left or other.right < self.left
        return not (apart or self.high < other.low or other.high < self.low)


def _is_free(box: _Box, taken: Sequence[_Box], frame: Any) -> bool:
    inside = box.left >= frame.x0 and box.low >= frame.y0 and box.high <= frame.y1
    return inside and box.right <= frame.x1 + 2 and not any(map(box.touches, taken))


def label_line_ends(axis: pyplot.Axes, labels: Sequence[Label], size: float = 8.0) -> None:
    """Name lines at their right ends, one under the other, with room made for the longest."""
    low, high = axis.get_xlim()
    longest = max((len(label.text) for label in labels), default=0)
    inches = axis.get_position().width * axis.figure.get_size_inches()[0]
    needed = 0.6 * size / 72 * longest
    axis.set_xlim(low, low + (high - low) * inches / max(0.3 * inches, inches - needed))
    put_labels(axis, labels, size, ("right",))


def save(figure: pyplot.Figure, file: Path) -> list[Path]:
    """Write ``file`` (a PNG) and the same as a PDF, and close the figure."""
    files = [file, file.with_suffix(".pdf")]
    for each in files:
        figure.savefig(each, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return files
