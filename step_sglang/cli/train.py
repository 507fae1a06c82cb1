"""`step-sglang train`: a scorer from a store, with its figures and plots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from step_sglang.cli.common import OUTPUT, QUESTIONS, RECIPE, RUNNING, err, out, warn


def train(
    store: Annotated[Path, typer.Argument(help="Folder of collected traces.")],
    folder: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for scorer and figures.", rich_help_panel=OUTPUT),
    ],
    test_store: Annotated[
        Path | None,
        typer.Option(
            help="Measure on this store instead of a share of STORE.", rich_help_panel=QUESTIONS
        ),
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of questions.", rich_help_panel=QUESTIONS)
    ] = 0.15,
    test: Annotated[
        float, typer.Option(help="Share of questions.", rich_help_panel=QUESTIONS)
    ] = 0.15,
    labels: Annotated[
        str,
        typer.Option(
            help="answers, or vote: a trace is right if it has the answer that its question's "
            "traces agree on, for questions that nobody has answered. Then measure on a "
            "--test-store with true answers.",
            rich_help_panel=QUESTIONS,
        ),
    ] = "answers",
    agreement: Annotated[
        float,
        typer.Option(
            help="With --labels vote: the least share of a question's traces that must agree.",
            rich_help_panel=QUESTIONS,
        ),
    ] = 0.5,
    objective: Annotated[
        str, typer.Option(help="bce (the paper's) or pairwise.", rich_help_panel=RECIPE)
    ] = "bce",
    epochs: Annotated[
        int, typer.Option(min=1, help="At most so many.", rich_help_panel=RECIPE)
    ] = 20,
    patience: Annotated[
        int,
        typer.Option(min=1, help="Epochs without a better one.", rich_help_panel=RECIPE),
    ] = 5,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.", rich_help_panel=RECIPE)] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of split and order.", rich_help_panel=RECIPE)] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of W1 in the file: bfloat16, or float32, twice as long to read.",
            rich_help_panel=OUTPUT,
        ),
    ] = "bfloat16",
    memory_mb: Annotated[
        int,
        typer.Option(min=1, help="Of hidden states at a time.", rich_help_panel=RUNNING),
    ] = 512,
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch.", rich_help_panel=RUNNING)
    ] = os.cpu_count() or 1,
    skip_bad_shards: Annotated[
        bool,
        typer.Option(
            "--skip-bad-shards", help="Leave damaged shards out.", rich_help_panel=RUNNING
        ),
    ] = False,
) -> None:
    """Train a scorer on a store; write it with its figures and plots."""
    import torch

    from step_sglang.cli.evaluation import show_evaluation
    from step_sglang.training.calibrate import BY_VOTE
    from step_sglang.training.fit import Epoch, Recipe
    from step_sglang.training.index import read_meta
    from step_sglang.training.train import Shares, train_scorer
    from step_sglang.training.voted import Labels, labels_of

    torch.set_num_threads(threads)
    recipe = Recipe(
        objective=objective, learning_rate=learning_rate, epochs=epochs, patience=patience,
        seed=seed, memory_mb=memory_mb, dtype=dtype,
    )  # fmt: skip

    def show(number: int, epoch: Epoch) -> None:
        err.print(
            f"epoch {number:2}  loss {epoch.loss:.4f}  validation: step AUC {epoch.step_auc:.3f}, "
            f"within the question {epoch.within:.3f}",
            highlight=False,
        )

    trained = train_scorer(
        store, folder, recipe, Shares(validation, test), test_store, skip_bad_shards, show,
        Labels(labels, agreement),
    )  # fmt: skip
    voted = "vote" in (labels, labels_of(read_meta(store)).source)
    if voted and test_store is None:
        warn("", ("the figures are against the traces' own vote: true ones need --test-store",))
    if voted and trained.calibration is not None:
        warn("", (BY_VOTE,))
    warn("", show_evaluation(trained.test, trained.linear_probe))
    out.print(f"kept epoch {trained.fitted.best_epoch}; wrote {trained.scorer}", highlight=False)
