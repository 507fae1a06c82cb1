"""Compares what to prune by and how to vote, on stored traces in a simulated pool.

    python bench/doubt.py TRAIN TEST [--seeds 3 | --scorer FILE] [--pool 0.3] [--out FILE.json]

TRAIN and TEST are stores of different questions (`bench/reasoner_store.py`). Every seed trains a
scorer on a part of TRAIN (or FILE is one, trained on no other part of it) and fits on the rest the
posterior that a trace ends right given its score, steps and length. All n traces of a question
start at once in a pool that holds a share of what they want together; the policy's own code prunes.
Simulated: no engine runs. Every method answers the same questions with the same traces; intervals
are paired bootstraps over them. The tables are in docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.replay import Rank, is_right, simulate
from step_sglang.evaluation.simulator import Request
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.calibrate import fit_calibration
from step_sglang.training.data import build_labels, score_steps
from step_sglang.training.evaluate import Scored
from step_sglang.training.fit import Recipe, ScorerNetwork, fit
from step_sglang.training.reader import Reader
from step_sglang.training.signals import certainty_scores, mean_estimate, running_signals
from step_sglang.training.split import split_questions
from step_sglang.training.table import Floats, TraceTable
from step_sglang.training.train import jsonable

ALL, RANDOM, LONGEST, FAIR = "nothing pruned", "random", "longest", "mean score (fair)"
VOTES = ("majority", "weighted", "calibrated")
AGAINST = (
    f"{ALL}, majority",
    f"{RANDOM}, weighted",
    f"{RANDOM}, calibrated",
    f"{FAIR}, weighted",
    f"no scorer: {RANDOM}, weighted",
)
Weight = Callable[[RecordedTrace], float]
_PRICES = CostModel(1.0, 0.0, 0.0, 0.0)  # every decode step alike: seconds are not reported


class Doubt:
    """The posterior that a trace ends right, and what it will still take.

    A logistic regression of the logit of the mean score, of that logit times the logarithm of the
    number of steps (a mean of few steps says less), and of the length relative to a mean trace's.
    """

    def __init__(self, table: TraceTable, scores: Floats) -> None:
        number = np.arange(len(scores)) - np.repeat(table.offsets[:-1], table.num_steps) + 1
        mean = running_signals(table, scores)["mean"]
        self.lengths = np.sort(table.num_tokens)
        self.typical = float(self.lengths.mean())
        rows = [
            self._inputs(m, int(k), t)
            for m, k, t in zip(mean, number, table.positions + 1, strict=True)
        ]
        self.model = LogisticRegression(C=10.0, max_iter=500)
        self.model.fit(rows, table.correct[table.step_trace])
        self.weights = self.model.coef_[0].tolist()
        self.bias = float(self.model.intercept_[0])

    def _inputs(self, mean: float, steps: int, tokens: float) -> list[float]:
        mean = min(max(mean, 1e-4), 1 - 1e-4)
        logit = math.log(mean / (1 - mean))
        far = math.log(max(tokens, 1) / self.typical)
        return [logit, logit * math.log(max(steps, 1)), far, far * logit]

    def posterior(self, mean: float | None, steps: int, tokens: float) -> float:
        """The probability that it ends right."""
        x = self._inputs(0.5 if mean is None else mean, steps, tokens)
        return 1 / (
            1 + math.exp(-self.bias - sum(a * b for a, b in zip(self.weights, x, strict=True)))
        )

    def of(self, trace: RecordedTrace) -> float:
        """The posterior of a trace that has finished."""
        return self.posterior(trace.score, len(trace.step_scores), trace.tokens)

    def left(self, tokens: int) -> float:
        """Tokens that a trace of this length still takes, at the mean."""
        longer = self.lengths[np.searchsorted(self.lengths, tokens, "right") :]
        return float(longer.mean() - tokens) if len(longer) else 0.2 * self.typical

    def by_posterior(self, request: Request) -> tuple[float, int]:
        """Rank by the posterior alone."""
        mean = request.score_sum / request.num_steps if request.num_steps else None
        return self.posterior(mean, request.num_steps, request.generated), 1

    def per_token(self, request: Request) -> tuple[float, int]:
        """Rank by the expected vote per KV token that it still takes."""
        return self.by_posterior(request)[0] / max(1.0, self.left(request.generated)), 1


def groups_of(
    reader: Reader, scores: Floats, calibration: TraceCalibration | None = None
) -> list[RecordedGroup]:
    """The stored questions as recorded groups, with these step scores."""
    pair = None if calibration is None else calibration.pair
    found, first = [], 0
    for shard in reader.shards:
        traces = []
        for trace in reader.traces(shard):
            mine = scores[first : first + trace.num_steps]
            first += trace.num_steps
            traces.append(
                RecordedTrace(
                    fate="finished",
                    answer=trace.extracted,
                    correct=trace.correct,
                    score=float(mine.mean()) if len(mine) else None,
                    times=(0.0,) * trace.num_tokens,
                    confidences=(),
                    positions=tuple(trace.steps.positions.tolist()),
                    step_scores=tuple(mine.tolist()),
                    text="",
                )
            )
        name = reader.traces(shard)[0].question_id
        found.append(RecordedGroup(name, 0, "", 0, 900, 0.0, tuple(traces), pair))
    return found


def weighed(groups: Sequence[RecordedGroup], weight: Weight) -> list[RecordedGroup]:
    """The same groups, whose traces weigh so in the vote."""
    return [replace(g, traces=tuple(replace(t, score=weight(t)) for t in g.traces)) for g in groups]


@dataclass
class Comparison:
    """The answers of every method: per seed and question whether it was right."""

    pool: float
    right: dict[str, list[list[bool]]] = field(default_factory=lambda: defaultdict(list))

    def run(
        self,
        name: str,
        seed: int,
        policy: str,
        groups: Sequence[RecordedGroup],
        rank: Rank | None = None,
        votes: Sequence[str] = ("weighted",),
    ) -> None:
        """Answer all questions by every vote over the same traces."""
        answers: dict[str, list[bool]] = {vote: [] for vote in votes}
        for number, group in enumerate(groups):
            wanted = sum(t.tokens for t in group.traces)
            longest = max(t.tokens for t in group.traces)
            pool = max(int(self.pool * wanted), longest + 4)
            ranks = None if rank is None else [rank] * len(group.traces)
            drawn = 1000 * seed + number
            outcome = simulate(group, policy, pool, _PRICES, seed=drawn, ranks=ranks)
            for vote in votes:
                answers[vote].append(is_right(outcome, vote))
        for vote, right in answers.items():
            self.right[f"{name}, {vote}"].append(right)

    def figures(self) -> dict[str, Any]:
        """Print and return every method's accuracy, and its leads over three others."""
        found: dict[str, Any] = {}
        mean = {name: np.mean(np.asarray(rows, float), 0) for name, rows in self.right.items()}
        for name, values in mean.items():
            leads = {
                other: mean_estimate(values - mean[other]) for other in AGAINST if other in mean
            }
            found[name] = {"accuracy": mean_estimate(values), "minus": leads}
            columns = (
                f"{100 * lead.value:+5.1f} [{100 * lead.low:+5.1f}, {100 * lead.high:+5.1f}]"
                for lead in leads.values()
            )
            print(f"{name:40} {100 * values.mean():5.1f} %  ", "  ".join(columns), flush=True)
        for name in (ALL, RANDOM, LONGEST, FAIR):
            gain = mean_estimate(mean[f"{name}, calibrated"] - mean[f"{name}, weighted"])
            found[f"{name}: calibrated minus weighted"] = gain
            shown = f"{100 * gain.value:+5.1f} [{100 * gain.low:+5.1f}, {100 * gain.high:+5.1f}]"
            print(f"{name}: calibrated minus weighted {shown}", flush=True)
        return found


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scorer", type=Path, help="instead of training one; the seed is 0")
    parser.add_argument("--pool", type=float, default=0.3, help="of the traces' tokens together")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader, tested = Reader(options.train), Reader(options.test)
    stated = None if options.scorer is None else load_scorer(options.scorer).info.calibration
    compared = Comparison(options.pool)
    sure = certainty_scores(tested, tested.shards)
    for seed in range(options.seeds if options.scorer is None else 1):
        split = split_questions(reader, 0.15, 0.0, seed)
        network = (
            fit(reader, split.train, split.validation, Recipe(seed=seed)).network
            if options.scorer is None
            else ScorerNetwork.from_scorer(load_scorer(options.scorer))
        )
        held = Scored(
            build_labels(reader, split.validation), score_steps(reader, split.validation, network)
        )
        doubt = Doubt(held.table, held.scores)
        calibration = stated if stated is not None else fit_calibration(held)
        print(f"calibration: {calibration}")
        groups = groups_of(tested, score_steps(tested, tested.shards, network), calibration)
        posterior = weighed(groups, doubt.of)
        run = partial(compared.run, seed=seed)
        for name, policy in ((ALL, "none"), (RANDOM, "random"), (LONGEST, "longest")):
            run(name, policy=policy, groups=groups, votes=VOTES)
        run(FAIR, policy="fair", groups=groups, votes=VOTES)
        for name, rank in (
            ("doubt: posterior", doubt.by_posterior),
            ("doubt: vote per token", doubt.per_token),
        ):
            run(name, policy="fair", groups=groups, rank=rank, votes=VOTES[1:])
        run(f"{FAIR}, by posterior", policy="fair", groups=posterior)
        if sure is not None:
            certain = groups_of(tested, sure)
            for name, policy in ((RANDOM, "random"), (LONGEST, "longest"), ("fair", "fair")):
                run(f"no scorer: {name}", policy=policy, groups=certain, votes=VOTES[:2])
        print(f"after seed {seed:2}{'':34} right     minus " + ", ".join(AGAINST))
        figures = compared.figures()
        if options.out is not None:
            options.out.write_text(json.dumps(jsonable(figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
