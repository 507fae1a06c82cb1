"""Compares the training objectives on one store: the same splits by question, several seeds.

    python bench/objectives.py STORE [--seeds 8]

Each seed holds out its own questions. Figures are the AUC of the running mean within the question
on the held-out ones; the logistic regression is the linear probe to beat. STORE must not
hold questions that a published figure is measured on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from step_sglang.training.evaluate import Evaluation
from step_sglang.training.fit import Recipe
from step_sglang.training.metrics import FRACTIONS, RUNNING_MEAN
from step_sglang.training.train import Shares, train_scorer

LINEAR_PROBE = "logistic regression"


def within(found: Evaluation) -> list[float]:
    return [found.ranking[RUNNING_MEAN][f].auc_within.value for f in FRACTIONS]


def main() -> None:
    """Train with every objective on every seed's split and print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--objective", nargs="+", default=["bce", "pairwise"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, list[list[float]]] = {
        name: [] for name in (*options.objective, LINEAR_PROBE)
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for objective in options.objective:
                recipe = Recipe(objective, seed=seed)
                trained = train_scorer(options.store, Path(folder), recipe, Shares(0.2, 0.2))
                figures[objective].append(within(trained.test))
            figures[LINEAR_PROBE].append(within(trained.linear_probe))
            shown = {name: [round(v, 3) for v in rows[-1]] for name, rows in figures.items()}
            print(f"seed {seed}: {shown}", flush=True)
    print(f"{'mean over seeds at':20}", *(f"{f:>7.0%}" for f in FRACTIONS))
    for name, rows in figures.items():
        print(
            f"{name:20}", *(f"{statistics.mean(column):7.3f}" for column in zip(*rows, strict=True))
        )
    first, *others = options.objective
    for name in others:
        leads = [
            [a - b for a, b in zip(x, y, strict=True)]
            for x, y in zip(figures[name], figures[first], strict=True)
        ]
        print(f"{name} minus {first}:")
        for fraction, column in zip(FRACTIONS, zip(*leads, strict=True), strict=True):
            spread = statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0
            print(f"  {fraction:4.0%} {statistics.mean(column):+.4f}, standard error {spread:.4f}")


if __name__ == "__main__":
    main()
