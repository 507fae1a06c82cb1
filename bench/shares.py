"""How large a part of the KV pool groups should fill, and what ending early adds: a simulation.

Real lengths and answers, simulated memory and time, invented scores. Every line says "simulated":
nothing here was timed. The model of the scheduler and the policy are those of `step-sglang replay`;
prompts take no room.

The file (gzipped JSON) holds "questions", each with "traces": lists that begin with the trace's
number of tokens and its answer, a number: 0 is the right one, -1 none.

Scores: the log-odds of a trace's score are `gap * (x - gap / 2)`, x drawn from a normal
distribution of deviation 1 and mean `gap` for a right trace, 0 for a wrong one; `gap` is chosen so
that a right trace beats a wrong one with probability `--auc`. Without `--growth` they do not change
along the trace. With `--growth G` the probability rises in a line from one half to `--auc` until G
of the mean length of the question's traces, so that shorter traces never reach it, and the noise in
x is that of a sum of independent steps. Every draw also takes other traces of each question. A
method sees the same traces and scores as the others.

Tokens are counted in units of `--unit`, in which a decode step is `--unit` decode steps.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.replay import is_right, simulate
from step_sglang.evaluation.stats import compare, mean_of
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace
from step_sglang.voting.early_stopping import DEFAULT_THRESHOLD
from step_sglang.voting.session import VoteRules


@dataclass(frozen=True)
class Row:
    """A method, and how much of the pool its groups may fill."""

    name: str
    policy: str
    vote: str
    early: bool
    share: float = 1.0
    threshold: float = DEFAULT_THRESHOLD  # of the early end
    shrink: float = 0.0

    @property
    def rules(self) -> VoteRules:
        """By which a group ends."""
        rule = "posterior" if self.early else "off"
        return VoteRules(self.vote, rule, self.threshold, self.shrink)


ALONE = (Row("SC", "none", "majority", False), Row("SC, ends early", "none", "majority", True))
SHARED = (
    ("random victim", "random", False),
    ("longest victim", "longest", False),
    ("STEP", "fair", False),
    ("STEP, ends early", "fair", True),
)


def rows(shares: list[float]) -> list[Row]:
    """SC prunes nothing, so it has the whole pool."""
    pruning = [Row(n, p, "weighted", e, s) for s in shares for n, p, e in SHARED]
    return [*ALONE, *pruning]


def group(
    question: int, traces: list[Any], draw: int, options: argparse.Namespace
) -> RecordedGroup:
    """Traces of a question with invented scores, in units of tokens."""
    source = random.Random(f"{options.seed}/{question}/{draw}")
    plateau = options.growth * sum(t[0] for t in traces) / len(traces) / options.unit

    def trace(tokens: int, answer: int) -> RecordedTrace:
        length = max(1, round(tokens / options.unit))
        right = answer == 0
        scores = trace_scores(length, right, options.auc, plateau, source)
        means = np.asarray([0.0, *scores]) * np.arange(length + 1)
        return RecordedTrace(
            fate="finished",
            answer=None if answer < 0 else str(answer),
            correct=right,
            score=scores[-1],
            times=(0.0,) * length,
            confidences=(),
            positions=tuple(range(length)),
            step_scores=tuple(np.diff(means).tolist()),
            text="",
        )

    chosen = source.sample(traces, options.n)
    limit = options.max_new_tokens // options.unit
    recorded = tuple(trace(tokens, answer) for tokens, answer, *_ in chosen)
    return RecordedGroup(str(question), draw, "0", 0, limit, 0.0, recorded)


def trace_scores(
    length: int, right: bool, auc: float, plateau: float, source: random.Random
) -> list[float]:
    """The trace score after every step, 1 to ``length``; ``plateau``: the step of the full AUC."""
    steps = 1 if plateau <= 1 else min(length, math.ceil(plateau))
    walk, found = 0.0, []
    for step in range(1, steps + 1):
        walk += source.gauss(0.0, 1.0)
        now = 0.5 + (auc - 0.5) * min(1.0, step / plateau) if plateau > 1 else auc
        gap = math.sqrt(2) * NormalDist().inv_cdf(now)
        x = walk / math.sqrt(step) + (gap if right else 0.0)
        found.append(1 / (1 + math.exp(-gap * (x - gap / 2))))
    return found + found[-1:] * (length - steps)


def clock(options: argparse.Namespace) -> CostModel:
    """Seconds of a step of the model, which stands for ``unit`` decode steps."""
    unit = options.unit
    return CostModel(
        base=unit * options.base_ms * 1e-3,
        per_trace=unit * options.trace_us * 1e-6,
        per_token=unit * unit * options.token_ns * 1e-9,
        overhead=0.0,
    )


@dataclass(frozen=True)
class Outcome:
    """Of one method on one question in one draw."""

    right: float
    seconds: float
    tokens: float
    pruned: int


def outcomes(
    job: tuple[int, list[Any], int], options: argparse.Namespace, table: list[Row]
) -> tuple[int, list[Outcome]]:
    """Every method on one question in one draw."""
    question, traces, draw = job
    one = group(question, traces, draw, options)
    found = []
    for row in table:
        pool = options.pool // options.unit
        fate = simulate(
            one, row.policy, pool, clock(options), seed=draw, rules=row.rules,
            prune_at=row.share, unit=options.unit,
        )  # fmt: skip
        right = float(is_right(fate, row.vote))
        found.append(Outcome(right, fate.seconds, fate.tokens * options.unit, fate.pruned))
    return question, found


def lines(values: list[dict[str, list[Outcome]]], table: list[Row]) -> Iterator[str]:
    """The table, a line per method and share."""

    def by(index: int, name: str) -> dict[str, list[float]]:
        return {q: [getattr(o, name) for o in found] for q, found in values[index].items()}

    yield (
        "|  | share of the pool | method | right, % | right - SC, points | seconds | time / SC | "
        "tokens | pruned |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for index, row in enumerate(table):
        gap = ratio = ""
        if index:
            right = compare(by(index, "right"), by(0, "right"))
            time = compare(by(index, "seconds"), by(0, "seconds"))
            assert right is not None and time is not None
            d, r = right.difference, time.ratio
            gap = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            ratio = f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
        share = "1, not pruned" if row.policy == "none" else f"{row.share:g}"
        yield (
            f"| simulated | {share} | {row.name} | "
            f"{100 * mean_of(by(index, 'right')).value:.1f} | {gap} | "
            f"{mean_of(by(index, 'seconds')).value:.0f} | {ratio} | "
            f"{mean_of(by(index, 'tokens')).value:.0f} | "
            f"{mean_of(by(index, 'pruned')).value:.1f} |"
        )


def load(file: Path) -> list[list[Any]]:
    """The traces of every question; exits with a line where the file is not what it should be."""
    try:
        data = json.loads(gzip.decompress(file.read_bytes()))
        found = [question["traces"] for question in data["questions"]]
        sound = found and all(
            isinstance(t[0], int) and t[0] > 0 and isinstance(t[1], int) for q in found for t in q
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        sys.exit(f"{file} cannot be read as traces: {error}")
    if not sound:
        sys.exit(f"{file} holds no questions, or a trace without length and answer")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the simulation is of: traces, scores, memory and time."""
    parser.add_argument("file", type=Path)
    parser.add_argument("-n", type=int, default=64, help="traces of a question")
    parser.add_argument("--pool", type=int, default=360_000, help="KV tokens")
    parser.add_argument("--auc", type=float, default=0.70, help="within a question")
    parser.add_argument(
        "--growth", type=float, default=0.0, help="share of the mean length at which it is reached"
    )
    parser.add_argument("--draws", type=int, default=10, help="of traces and scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unit", type=int, default=64, help="tokens")
    parser.add_argument("--max-new-tokens", type=int, default=38_912)
    # A roofline for a model of 8 billion parameters in bf16 on an 80 GB card; not measured.
    parser.add_argument("--base-ms", type=float, default=6.1, help="of a decode step")
    parser.add_argument("--trace-us", type=float, default=20.0, help="more for each trace")
    parser.add_argument("--token-ns", type=float, default=55.0, help="more for each token attended")


def main() -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    questions = load(options.file)
    if min(map(len, questions)) < options.n:
        parser.error(f"a question has fewer than {options.n} traces")
    if not 0.5 < options.auc < 1:
        parser.error("--auc is above 0.5 and below 1")
    print(f"simulated: python {shlex.join(sys.argv)}")
    jobs = [(q, t, d) for d in range(options.draws) for q, t in enumerate(questions)]
    table = rows(options.shares)
    values: list[dict[str, list[Outcome]]] = [defaultdict(list) for _ in table]
    with ProcessPoolExecutor(options.processes) as pool:
        for question, found in pool.map(
            partial(outcomes, options=options, table=table), jobs, chunksize=4
        ):
            for index, outcome in enumerate(found):
                values[index][str(question)].append(outcome)
    print(
        f"simulated: {len(questions)} questions, {options.draws} draws, n = {options.n}, pool "
        f"{options.pool:,} tokens, scores of within-question AUC {options.auc:.2f}; in brackets "
        "95 % bootstrap intervals over questions, paired"
    )
    print("\n".join(lines(values, table)))


if __name__ == "__main__":
    main()
