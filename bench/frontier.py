"""Where to prune, when to end, what shrinking adds: accuracy against time, simulated.

Every method of `shares.py` (whose model of lengths, scores, memory and time this is) at every share
of the pool: random and longest victims and STEP, each to the end, with the posterior end, and with
the posterior end and a vote that shrinks. `points` writes what was found, `table` and `plot` read
it; a run that was stopped goes on where it was. Every line and the plot say "simulated".

    python bench/frontier.py points TRACES.json.gz -o frontier.jsonl --growth 1
    python bench/frontier.py table frontier.jsonl
    python bench/frontier.py plot frontier.jsonl docs/frontier.png
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resumed import whole_lines
from shares import ALONE, Outcome, Row, add_options, lines, load, outcomes

from step_sglang.evaluation.stats import compare, mean_of
from step_sglang.training.style import Label, colour, label_line_ends, new_figure, save

SHARES = (1.0, 0.5, 0.25, 0.15)
VICTIMS = (("random victim", "random"), ("longest victim", "longest"), ("STEP", "fair"))
# Thresholds of the posterior end and of shrinking.
ENDS = ((0.01, 0.0), (0.05, 0.1), (0.1, 0.2))


def rows() -> list[Row]:
    """SC first, with which the others are compared."""
    table = list(ALONE)
    for share in SHARES:
        for name, policy in VICTIMS:
            table.append(Row(name, policy, "weighted", False, share))
            if policy == "longest":
                continue
            for threshold, shrink in ENDS if policy == "fair" else ENDS[:1]:
                ends = f"{name}, ends at {threshold:g}"
                ends += f", shrinks at {shrink:g}" if shrink else ""
                table.append(Row(ends, policy, "weighted", True, share, threshold, shrink))
    return table


def points(options: argparse.Namespace) -> None:
    """Simulate what the file lacks, a line per question and draw."""
    questions = load(options.file)
    if min(map(len, questions)) < options.n:
        sys.exit(f"a question has fewer than {options.n} traces")
    head = {"simulated": {k: v for k, v in vars(options).items() if isinstance(v, int | float)}}
    known = whole_lines(options.output)
    if known and known[0] != head:
        sys.exit(f"{options.output} is of other options: choose another file")
    done = {(line["question"], line["draw"]) for line in known[1:]}
    table = rows()
    with options.output.open("a") as sink:
        if not known:
            sink.write(json.dumps(head) + "\n")
        for draw in range(options.draws):
            for number, traces in enumerate(questions):
                if (number, draw) in done:
                    continue
                _, found = outcomes((number, traces, draw), options, table)
                line = {"question": number, "draw": draw, "found": [asdict(o) for o in found]}
                sink.write(json.dumps(line) + "\n")
                sink.flush()


def _values(file: Path) -> tuple[dict[str, Any], list[dict[str, list[Outcome]]]]:
    head, *found = whole_lines(file)
    values: list[dict[str, list[Outcome]]] = [defaultdict(list) for _ in rows()]
    for line in found:
        for index, outcome in enumerate(line["found"]):
            values[index][str(line["question"])].append(Outcome(**outcome))
    return head["simulated"], values


def table(options: argparse.Namespace) -> None:
    """Print every point."""
    head, values = _values(options.points)
    print(f"simulated: python {shlex.join(sys.argv)}; {json.dumps(head)}")
    print("\n".join(lines(values, rows())))


def plot(options: argparse.Namespace) -> None:
    """Accuracy less SC's over time of SC, a line per method through the shares of the pool."""
    head, values = _values(options.points)

    def by(index: int, name: str) -> dict[str, list[float]]:
        return {q: [getattr(o, name) for o in found] for q, found in values[index].items()}

    drawn = ("random victim", "longest victim", "STEP", "STEP, ends at 0.01",
             "STEP, ends at 0.1, shrinks at 0.2")  # fmt: skip
    styles = dict(zip(drawn, (":", ":", "-", "--", "-."), strict=True))
    figure, axis = new_figure(6.5, 3.8)
    labels = []
    every = rows()
    for name in drawn:
        places = [i for i, row in enumerate(every) if row.name == name]
        times, gaps = [], []
        for index in places:
            time = compare(by(index, "seconds"), by(0, "seconds"))
            assert time is not None
            times.append(time.ratio.value)
            gap = mean_of(by(index, "right")).value - mean_of(by(0, "right")).value
            gaps.append(100 * gap)
        own = colour("STEP" if name.startswith("STEP") else name)
        axis.plot(times, gaps, styles[name], marker="o", markersize=4, color=own)
        labels.append(Label(times[0], gaps[0], name, own))
    axis.axhline(0, color="#BBBBBB", linewidth=0.8)
    label_line_ends(axis, labels)
    axis.set_xlabel("time of a question / self-consistency's, simulated")
    axis.set_ylabel("right - self-consistency's, points")
    shares = ", ".join(f"{share:g}" for share in SHARES)
    axis.set_title(
        f"simulated, {head['draws']} draws; along a line the share of the pool: {shares}",
        fontsize=8,
    )
    for file in save(figure, options.image):
        print(file)


def main() -> None:
    """Simulate, or show what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("points")
    add_options(one)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.set_defaults(run=points)
    two = commands.add_parser("table")
    two.add_argument("points", type=Path)
    two.set_defaults(run=table)
    three = commands.add_parser("plot")
    three.add_argument("points", type=Path)
    three.add_argument("image", type=Path)
    three.set_defaults(run=plot)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
