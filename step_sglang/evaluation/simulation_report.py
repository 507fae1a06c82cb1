"""The table and the plots of a simulation. Every line and every plot says that it is simulated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from step_sglang.evaluation.methods import METHODS, REFERENCE
from step_sglang.evaluation.report import Table, markdown
from step_sglang.evaluation.simulated import SimulatedOutcome, read_outcomes
from step_sglang.evaluation.stats import Mean, Paired, compare, mean_of
from step_sglang.simulation.errors import SimulationError
from step_sglang.training.style import Label, colour, new_figure, put_labels, save

REPORT = "simulated.md"
_HEAD = (
    "", "KV pool", "n", "AUC", "method", "right, %", "right - SC, points", "seconds", "time / SC",
    "tokens", "wait of a trace, s", "pruned", "retracted", "ended early",
)  # fmt: skip
_NOTE = (
    "Simulated: nothing here was timed. Means over questions of the mean over draws. In brackets: "
    "95 % bootstrap intervals over questions, paired with SC in the same pool with as many traces. "
    "Votes are by the odds of recorded scores; invented ones have no calibration, and vote by "
    "trace score."
)


@dataclass(frozen=True)
class Row:
    """A method in one cell of the grid."""

    pool: int
    n: int
    auc: float | None
    method: str
    questions: int
    draws: float  # of a question, mean
    right: Mean
    seconds: Mean
    tokens: float
    wait: float
    pruned: float
    retracted: float
    ended: float
    right_gap: Paired | None  # against SC
    time_gap: Paired | None

    @property
    def title(self) -> str:
        """The method's name in tables."""
        return METHODS[self.method].title if self.method in METHODS else self.method


@dataclass(frozen=True)
class Reported:
    """What was written."""

    files: tuple[Path, ...]
    table: Table
    note: str


def rows_of(outcomes: Sequence[SimulatedOutcome]) -> list[Row]:
    """A row per pool, number of traces, AUC and method."""
    cells: dict[tuple[int, int, float, str], list[SimulatedOutcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.pool, outcome.n, outcome.auc or 0.0, outcome.method].append(outcome)
    order = {name: place for place, name in enumerate(METHODS)}
    return [
        _row(cells[cell], cells.get((*cell[:3], REFERENCE), []))
        for cell in sorted(cells, key=lambda c: (*c[:3], order.get(c[3], len(order))))
    ]


def _row(own: Sequence[SimulatedOutcome], reference: Sequence[SimulatedOutcome]) -> Row:
    first = own[0]
    right, seconds = _by_question(own, _right), _by_question(own, _seconds)
    right_gap = time_gap = None
    if reference and first.method != REFERENCE:
        # Only draws that both have: they are of the same traces.
        both = {(o.question, o.draw) for o in own} & {(o.question, o.draw) for o in reference}
        ours, theirs = ([o for o in p if (o.question, o.draw) in both] for p in (own, reference))
        right_gap = compare(_by_question(ours, _right), _by_question(theirs, _right))
        time_gap = compare(_by_question(ours, _seconds), _by_question(theirs, _seconds))

    def mean(value: Callable[[SimulatedOutcome], float]) -> float:
        return mean_of(_by_question(own, value)).value

    return Row(
        pool=first.pool,
        n=first.n,
        auc=first.auc,
        method=first.method,
        questions=len(right),
        draws=len(own) / len(right),
        right=mean_of(right),
        seconds=mean_of(seconds),
        tokens=mean(lambda o: float(o.tokens)),
        wait=mean(lambda o: o.wait),
        pruned=mean(lambda o: float(o.pruned)),
        retracted=mean(lambda o: float(o.retracted)),
        ended=mean(lambda o: float(o.ended)),
        right_gap=right_gap,
        time_gap=time_gap,
    )


def _right(outcome: SimulatedOutcome) -> float:
    return float(outcome.correct)


def _seconds(outcome: SimulatedOutcome) -> float:
    return outcome.seconds


def _by_question(
    outcomes: Sequence[SimulatedOutcome], value: Callable[[SimulatedOutcome], float]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.question].append(value(outcome))
    return dict(found)


def table_of(rows: Sequence[Row], meta: Mapping[str, Any]) -> Table:
    """All rows, marked in their first column."""
    return Table(_caption(rows, meta), _HEAD, tuple(_cells(row) for row in rows))


def cells_of(rows: Sequence[Row], meta: Mapping[str, Any]) -> Table:
    """A line per pool, number of traces and AUC: what each method has over SC, of whose time."""
    methods = [m for m in dict.fromkeys(row.method for row in rows) if m != REFERENCE]
    title = {row.method: row.title for row in rows}
    cells: dict[tuple[int, int, float | None], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cells[row.pool, row.n, row.auc][row.method] = row

    def against(row: Row | None) -> str:
        if row is None or row.right_gap is None or row.time_gap is None:
            return ""
        gap, ratio = row.right_gap.difference.value, row.time_gap.ratio.value
        return f"{100 * gap:+.1f} / {ratio:.2f}"

    lines = []
    for (pool, n, auc), by_method in cells.items():
        sc = by_method.get(REFERENCE)
        lines.append((
            "simulated", str(meta["at_once"]), f"{pool:,}", str(n), _auc(auc),
            f"{100 * sc.right.value:.1f}, {sc.seconds.value:,.0f}" if sc else "",
            *(against(by_method.get(method)) for method in methods),
        ))  # fmt: skip
    head = ("", "at once", "KV pool", "n", "AUC", "SC: right %, s", *(title[m] for m in methods))
    caption = f"{_caption(rows, meta)}: right - SC in points / time over SC's"
    return Table(caption, head, tuple(lines))


def _auc(auc: float | None) -> str:
    return "recorded" if auc is None else f"{auc:g}"


def _caption(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    questions = max(row.questions for row in rows)
    draws = max(row.draws for row in rows)
    together = f"{meta['at_once']} at once" if meta["at_once"] > 1 else "one at a time"
    scheduler = "SGLang's scheduler" if meta["scheduler"] == "sglang" else "a model of it"
    return (
        f"Simulated: {meta['model']} on {meta['gpu']}, {scheduler}; {meta['source']}, {questions} "
        f"questions, {together}, {draws:.3g} draws"
    )


def _cells(row: Row) -> tuple[str, ...]:
    gap = ratio = ""
    if row.right_gap is not None and row.time_gap is not None:
        d, r = row.right_gap.difference, row.time_gap.ratio
        gap = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        ratio = f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
    seconds = row.seconds.value
    return (
        "simulated", f"{row.pool:,}", str(row.n), _auc(row.auc), row.title,
        f"{100 * row.right.value:.1f}", gap, f"{seconds:,.0f}" if seconds >= 100
        else f"{seconds:.2f}", ratio, f"{row.tokens:,.0f}", f"{row.wait:.0f}",
        f"{row.pruned:.1f}", f"{row.retracted:.1f}", f"{row.ended:.1f}",
    )  # fmt: skip


def draw(rows: Sequence[Row], meta: Mapping[str, Any], auc: float | None) -> Any:
    """Accuracy against simulated latency: a panel per pool, a line per method through its n."""
    chosen = [row for row in rows if row.auc == auc]
    pools = sorted({row.pool for row in chosen})
    figure, axes = new_figure(1.2 + 4.3 * len(pools), 3.8, len(pools))
    for axis, pool in zip(np.atleast_1d(axes), pools, strict=True):
        own = [row for row in chosen if row.pool == pool]
        several = len({row.n for row in own}) > 1
        labels = []
        for method in dict.fromkeys(row.method for row in own):
            line = sorted((row for row in own if row.method == method), key=lambda row: row.n)
            x = [row.seconds.value for row in line]
            y = [100 * row.right.value for row in line]
            shade = colour(line[0].title)
            axis.plot(x, y, "o-", markersize=4, linewidth=1, color=shade)
            text = line[-1].title + (f", n={line[-1].n}" if several else "")
            labels.append(Label(x[-1], y[-1], text, shade))
        axis.set_xscale("log")
        axis.set(xlabel="latency of a question, simulated s", ylabel="accuracy, %")
        scores = "recorded scores" if auc is None else f"an AUC of {auc:g}"
        axis.set_title(f"simulated, {pool:,} KV tokens, {scores}", fontsize=9)
        figure.tight_layout()
        put_labels(axis, labels)
    return figure


def write_report(folder: Path, target: Path | None = None) -> Reported:
    """Write the table and the plots of a folder's outcomes.

    Raises:
        SimulationError: there are none, or the disk fails.
    """
    meta, outcomes = read_outcomes(folder)
    rows = rows_of(outcomes)
    table = table_of(rows, meta)
    target = target or folder
    files = [target / REPORT]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for auc in dict.fromkeys(row.auc for row in rows):
            name = "simulated.png" if auc is None else f"simulated-auc-{auc:g}.png"
            files += save(draw(rows, meta, auc), target / name)
        plots = [file.name for file in files if file.suffix == ".png"]
        shown = "\n".join(f"![simulated: accuracy against latency]({name})\n" for name in plots)
        tables = [markdown(table)]
        if len({(row.pool, row.n, row.auc) for row in rows}) > 1:
            tables.append(markdown(cells_of(rows, meta)))
        text = "\n".join([*tables, f"{_NOTE}\n", shown])
        files[0].write_text(text, encoding="utf-8")
    except OSError as error:
        raise SimulationError(f"cannot write to {target}: {error.strerror}") from error
    return Reported(tuple(files), table, _NOTE)
