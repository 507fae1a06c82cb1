"""Compares signals that could judge a trace: the table of docs/training.md.

    python bench/reasoner_store.py TRAIN --split scorer-train --questions 256 -n 32
    python bench/reasoner_store.py TEST --split scorer-validation --questions 96 -n 32
    python bench/signals.py TEST --scorer FILE                  # the signals of one scorer: seconds
    python bench/signals.py TEST --train TRAIN [--seeds 8] [--learned-seeds 3] [--out FILE.json]

Every seed splits TRAIN by question into training and validation questions (which choose the epoch,
the scale and the weights of the fusion). TEST only measures: nothing is chosen by it. Figures are
the AUC within the question, the mean over the seeds: at fractions of each trace's own steps, and
at fractions of the question's mean length in tokens, for the traces that still run. Intervals are
paired bootstraps over the test questions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from step_sglang.reasoner.task import progress
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.aggregators import Features, fit_judge, judge, load_sequences
from step_sglang.training.data import build_labels, score_steps
from step_sglang.training.fit import Recipe, ScorerNetwork, fit
from step_sglang.training.linear_probe import fit_linear_probe
from step_sglang.training.reader import Reader
from step_sglang.training.signals import (
    SIMILAR,
    CutPoint,
    auc_by_question,
    certainty_scores,
    mean_estimate,
    own_fraction,
    running_signals,
    same_tokens,
)
from step_sglang.training.split import split_questions
from step_sglang.training.table import Floats, TraceTable
from step_sglang.training.train import jsonable

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
OF_THE_MEAN = (0.25, 0.5, 1.0)
MEAN = "mean"
LEARNED = (
    ("MLP through its mean, bce", "mean of logits", "bce", Features()),
    ("MLP through its mean, early pairwise", "mean of logits", "early pairwise", Features()),
    ("GRU, bce", "GRU", "bce", Features()),
    ("GRU, early pairwise", "GRU", "early pairwise", Features()),
    ("GRU, bce, with position", "GRU", "bce", Features(position=True)),
    ("GRU, early pairwise, with siblings", "GRU", "early pairwise", Features(siblings=True)),
    ("attention, bce", "attention", "bce", Features()),
    ("attention, early pairwise, all", "attention", "early pairwise", Features(True, True)),
)


def oracle(reader: Reader, shards: tuple[int, ...]) -> Floats | None:
    """[S] whether the chain so far is free of slips, which only the task's author can tell."""
    found: list[float] = []
    for shard in shards:
        for trace in reader.traces(shard):
            if trace.text is None:
                return None
            found += [float(clean) for clean in progress(trace.question, trace.text)][
                : trace.num_steps
            ]
    return np.asarray(found)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("test", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scorer", type=Path, help="one that exists, of other questions")
    source.add_argument("--train", type=Path, help="store to train scorers on")
    parser.add_argument("--seeds", type=int, default=8, help="of the scorer and what it feeds")
    parser.add_argument("--learned-seeds", type=int, default=3, help="of the learned aggregators")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Train, rank, print."""
    options = arguments()
    torch.set_num_threads(1)
    tested = Reader(options.test, with_text=True)
    shards = tested.shards
    table = build_labels(tested, shards)
    moments = [own_fraction(table, f) for f in FRACTIONS]
    moments += [same_tokens(table, f) for f in OF_THE_MEAN]
    # Per signal and moment the AUC of every question and seed.
    found: dict[str, dict[str, list[Floats]]] = defaultdict(lambda: defaultdict(list))

    def rank(name: str, steps: Floats) -> None:
        for moment in moments:
            values = moment.pick(steps)
            found[name][moment.name].append(auc_by_question(table, moment, values))
            given = auc_by_question(table, moment, values, SIMILAR)
            found[f"{name}, given length"][moment.name].append(given)

    rank("minus length so far", -(table.positions + 1.0))
    rank("mean log-probability", table.step_mean_logprob)
    rank("DeepConf lowest group", table.step_lowest_confidence)
    sure = certainty_scores(tested, shards)
    if sure is not None:
        rank("no scorer: certainty", running_signals(table, sure)[MEAN])
    clean = oracle(tested, shards)
    if clean is not None:
        rank("oracle: no slip so far", clean)
    if options.scorer is not None:
        network = ScorerNetwork.from_scorer(load_scorer(options.scorer))
        for name, values in running_signals(table, score_steps(tested, shards, network)).items():
            rank(name, values)
        report(found, moments, options.out)
        return
    reader, sequences = Reader(options.train), load_sequences(tested, shards)
    for seed in range(options.seeds):
        split = split_questions(reader, 0.15, 0.0, seed)
        fitted = fit(reader, split.train, split.validation, Recipe(seed=seed))
        scores = score_steps(tested, shards, fitted.network)
        for name, values in running_signals(table, scores).items():
            rank(name, values)
        probe = fit_linear_probe(reader, split.train, seed)
        rank(
            "logistic regression",
            running_signals(table, score_steps(tested, shards, probe))[MEAN],
        )
        held = build_labels(reader, split.validation)
        rank(
            "mean and log-probability fused",
            fused(
                (held, score_steps(reader, split.validation, fitted.network)),
                (table, scores),
            ),
        )
        if seed < options.learned_seeds:
            train = load_sequences(reader, split.train)
            validation = load_sequences(reader, split.validation)
            for name, kind, loss, features in LEARNED:
                model, scale = fit_judge(kind, loss, features, train, validation, seed)
                rank(name, judge(model, scale, sequences))
        print(f"seed {seed} done", flush=True)
        report(found, moments, options.out)  # what is known so far, should it be stopped


def fused(held: tuple[TraceTable, Floats], new: tuple[TraceTable, Floats]) -> Floats:
    """[S] a logistic regression of the mean score, the log-probability and the number of steps."""

    def inputs(table: TraceTable, scores: Floats) -> Floats:
        number = np.arange(len(scores)) - np.repeat(table.offsets[:-1], table.num_steps) + 1
        mean = running_signals(table, scores)[MEAN]
        return np.stack([mean, table.step_mean_logprob, np.log(number)], axis=1)

    x = inputs(*held)
    spread = x.std(0)
    model = LogisticRegression(class_weight="balanced")
    model.fit(x / spread, held[0].correct[held[0].step_trace])
    values: Floats = model.decision_function(inputs(*new) / spread)
    return values


def report(
    found: dict[str, dict[str, list[Floats]]], moments: list[CutPoint], out: Path | None
) -> None:
    """Print every signal's figures, and its lead over the mean at 25 % with an interval."""

    def by_question(name: str, at: str) -> Floats:
        values: Floats = np.mean(found[name][at], axis=0)
        return values

    figures = {}
    heads = [moment.name.replace(" of the mean length", "*") for moment in moments]
    print(f"{'(*: of the mean length)':48}", *(f"{head:>8}" for head in heads), " lead at 25%")
    for name in found:
        at = {moment.name: mean_estimate(by_question(name, moment.name)) for moment in moments}
        given = ", given length" if name.endswith(", given length") else ""
        lead = mean_estimate(by_question(name, "25%") - by_question(MEAN + given, "25%"))
        figures[name] = {"auc": at, "lead over the mean at 25%": lead}
        print(
            f"{name:48}",
            *(f"{at[moment.name].value:8.3f}" for moment in moments),
            f" {lead.value:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]",
            flush=True,
        )
    if out is not None:
        out.write_text(json.dumps(jsonable(figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
