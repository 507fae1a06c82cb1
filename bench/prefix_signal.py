"""Does the score of a prefix tell how its continuations will do? On the embedded reasoner.

    python bench/prefix_signal.py --questions 80 --out FILE [--model reasoner-dwelling]

Samples 16 traces of a question, cuts each at the step boundary after 25, 50 and 75 % of its steps,
and continues every prefix 8 times. Printed are, for each depth, the correlation of the running mean
of the step scores up to the boundary with the share of right continuations, within the question,
and how the continuations of the best-scored prefix do beside those of all prefixes and beside new
traces. Nothing is pruned and nothing timed. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from resumed import reported, resumed
from scored_traces import ScoredTrace, TraceSource

from step_sglang.reasoner import NAME, NAME_DWELLING, Question, questions

DEPTHS = (0.25, 0.5, 0.75)  # of a trace's steps
_TOGETHER = 8  # questions


def prefixes_of(
    source: TraceSource, asked: list[Question], traces: int, continuations: int
) -> list[dict[str, Any]]:
    """Sample traces of these questions, and continuations of their prefixes."""
    first = source.sample([(q, ScoredTrace()) for q in asked for _ in range(traces)])
    owners = [q for q in asked for _ in range(traces)]
    cut = [
        (number, depth, trace.until(trace.positions[max(1, round(depth * steps)) - 1]))
        for number, trace in enumerate(first)
        if (steps := len(trace.positions))
        for depth in DEPTHS
    ]
    children = source.sample(
        [(owners[number], prefix) for number, _, prefix in cut for _ in range(continuations)]
    )
    rows = [
        {
            "question": q.question,
            "right": [source.answer(t) == q.answer for t in first[i * traces : (i + 1) * traces]],
            "prefixes": {str(depth): [] for depth in DEPTHS},
        }
        for i, q in enumerate(asked)
    ]
    for i, (number, depth, prefix) in enumerate(cut):
        own = children[i * continuations : (i + 1) * continuations]
        answer = owners[number].answer
        rows[number // traces]["prefixes"][str(depth)].append(
            {
                "score": float(np.mean(prefix.scores)),
                "share": float(np.mean([source.answer(child) == answer for child in own])),
                "ended_right": source.answer(first[number]) == answer,
                "tokens": len(prefix.tokens),
            }
        )
    return rows


def correlation(groups: list[list[dict[str, float]]]) -> float:
    """Pearson's, of score and share, each less its question's mean."""
    x = np.concatenate([_centred([p["score"] for p in g]) for g in groups])
    y = np.concatenate([_centred([p["share"] for p in g]) for g in groups])
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / norm) if norm else 0.0


def _centred(values: list[float]) -> np.ndarray:
    return np.asarray(values) - np.mean(values)


def report(rows: list[dict[str, Any]]) -> str:
    """The figures by depth, with 95 % bootstrap intervals over questions."""
    lines = []
    draws = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    new = np.array([np.mean(row["right"]) for row in rows])
    for depth in DEPTHS:
        groups = [row["prefixes"][str(depth)] for row in rows]
        best = np.array([max(g, key=lambda p: p["score"])["share"] for g in groups])
        every = np.array([np.mean([p["share"] for p in g]) for g in groups])

        def shown(values: np.ndarray) -> str:
            low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
            return f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

        several = [correlation([groups[i] for i in draw]) for draw in draws[:500]]
        low, high = np.percentile(several, (2.5, 97.5))
        lines.append(
            f"| {100 * depth:.0f} % | {correlation(groups):.3f} [{low:.3f}, {high:.3f}] | "
            f"{100 * new.mean():.1f} | {100 * every.mean():.1f} | {100 * best.mean():.1f} | "
            f"{shown(best - every)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--traces", type=int, default=16)
    parser.add_argument("--continuations", type=int, default=8)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", choices=[NAME, NAME_DWELLING], default=NAME)
    parser.add_argument("--seed", type=int, default=7, help="of the questions, and of the sampling")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a question")
    parser.add_argument("--report", action="store_true", help="only show what --out has")
    args = parser.parse_args()
    if args.report:
        show(reported(args.out))
        return
    asked = questions(args.split, args.questions, args.seed)
    names = ("traces", "continuations", "split", "model", "seed")
    settings = {name: getattr(args, name) for name in names}
    rows = resumed(args.out, settings)[: len(asked)]
    source = TraceSource(args.model, args.seed + len(rows))
    with args.out.open("a") as out:
        for first in range(len(rows), len(asked), _TOGETHER):
            part = asked[first : min(first + _TOGETHER, len(asked))]
            found = prefixes_of(source, part, args.traces, args.continuations)
            out.write("".join(json.dumps(row) + "\n" for row in found))
            out.flush()
            rows += found
            print(f"{len(rows)} of {len(asked)} questions", flush=True)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("| depth | correlation | new traces | all prefixes | best prefix | best - all |")
    print("|---|---|---|---|---|---|")
    print(report(rows))


if __name__ == "__main__":
    main()
