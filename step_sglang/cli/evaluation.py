"""Shows a scorer's figures; `train` and `inspect --on` share it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from step_sglang.cli.common import err, out
from step_sglang.training.metrics import FEW_QUESTIONS, few_questions


def show_evaluation(test: Any, linear_probe: Any) -> tuple[str, ...]:
    """Print the tables; returns what a reader must be warned of."""
    table = Table("AUC within the question", *(f"{f:.0%}" for f in (0.25, 0.5, 0.75, 1.0)))
    rows = dict(test.ranking)
    if linear_probe is not None:
        rows["logistic regression"] = linear_probe.ranking["running mean"]
    for name, at in rows.items():
        table.add_row(name, *(r.auc_within.shown(".3f") for r in at.values()))
    out.print(table)
    votes = Table("vote", "accuracy", "minus self-consistency")
    for name, vote in test.votes.items():
        votes.add_row(name, f"{vote.accuracy.value:.1%}", vote.lead.shown("+.1%"))
    out.print(votes)
    pooled = test.ranking["running mean"][1.0].auc.value
    out.print(
        f"{test.questions} test questions ({test.mixed_questions} with both kinds), {test.traces} "
        f"traces, {test.accuracy:.1%} correct; pooled AUC {test.step_auc:.3f} of a step, "
        f"{pooled:.3f} of a trace",
        highlight=False,
    )
    if test.traces_without_steps:
        err.print(f"{test.traces_without_steps} traces have no step and are not ranked")
    if test.questions < FEW_QUESTIONS:
        return (few_questions(test.questions),)
    if test.mixed_questions < FEW_QUESTIONS:
        measured = few_questions(test.mixed_questions, " with right and wrong traces")
        return (f"AUC within the question is {measured}",)
    return ()
