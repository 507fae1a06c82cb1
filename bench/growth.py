"""How many questions a scorer needs, and what labels by vote are worth: docs/training.md.

    python bench/growth.py TRAIN TEST [--seeds 4] [--questions 8 16 32 ...] [--agreement .3 .5 .7]

TRAIN and TEST are stores of different questions (`bench/reasoner_store.py`). Scorers are trained on
parts of TRAIN, with its true labels or labelled by the traces' vote, and ranked on TEST against
the true labels: AUC of the running mean within the question, mean over the seeds. After each share
of agreement the same questions with their true labels.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from step_sglang.training.data import build_labels, score_steps
from step_sglang.training.fit import Recipe, fit
from step_sglang.training.metrics import running_means
from step_sglang.training.reader import Reader
from step_sglang.training.signals import auc_by_question, own_fraction
from step_sglang.training.voted import VotedReader


class Part(Reader):
    """Some questions of a store, with their true labels."""

    def __init__(self, folder: Path, shards: Sequence[int]) -> None:
        super().__init__(folder)
        self._shards = {shard: self._shards[shard] for shard in shards}


FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


def figures(reader: Reader, tested: Reader, count: int, seeds: Sequence[int]) -> list[float]:
    """Mean over seeds; every seed draws its own questions and holds 15 % of them out."""
    table = build_labels(tested, tested.shards)
    rows = []
    for seed in seeds:
        shards = list(reader.shards)
        random.Random(seed).shuffle(shards)
        held = max(2, round(0.15 * count))
        train, validation = shards[held:count], shards[:held]
        network = fit(reader, train, validation, Recipe(seed=seed)).network
        means = running_means(table, score_steps(tested, tested.shards, network))
        moments = [own_fraction(table, f) for f in FRACTIONS]
        rows.append([np.nanmean(auc_by_question(table, m, m.pick(means))) for m in moments])
    return [float(v) for v in np.mean(rows, axis=0)]


def main() -> None:
    """Train, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--questions", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--agreement", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader, tested = Reader(options.train), Reader(options.test)
    seeds = range(options.seeds)
    print(f"{'':44}", *(f"{f:>6.0%}" for f in FRACTIONS))

    def show(name: str, found: Reader, count: int) -> None:
        values = figures(found, tested, count, seeds)
        print(f"{name:44}", *(f"{v:6.3f}" for v in values), flush=True)

    for count in options.questions:
        if count <= len(reader.shards):
            show(f"{count} questions", reader, count)
    for agreement in options.agreement:
        voted = VotedReader(options.train, agreement)
        pairs = [
            (true, label)
            for shard in voted.shards
            for true, label in zip(reader.traces(shard), voted.traces(shard), strict=True)
        ]
        right = np.mean([true.correct == label.correct for true, label in pairs])
        winners = {label.question_id: true.correct for true, label in pairs if label.correct}
        kept = len(voted.shards)
        print(
            f"vote >= {agreement:.0%}: {kept} of {len(reader.shards)} questions "
            f"({kept / len(reader.shards):.0%}), the vote is right in "
            f"{np.mean(list(winners.values())):.0%}, {right:.1%} of the labels are"
        )
        show("  its labels", voted, kept)
        show("  true labels of the same", Part(options.train, voted.shards), kept)


if __name__ == "__main__":
    main()
