"""`step-sglang replay`: policies and votes on recorded traces, without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from step_sglang.cli.common import MEMORY, OUTPUT, err, names, numbers, out, shares


def replay(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `bench --record`.")],
    pool: Annotated[str, typer.Option(help="KV tokens, comma-separated.", rich_help_panel=MEMORY)],
    policies: Annotated[
        str, typer.Option(help="Comma-separated: none (SC), fair (STEP), paper, random, longest.")
    ] = "none,fair,paper,random,longest",
    votes: Annotated[
        str, typer.Option(help="Comma-separated: weighted, calibrated, majority, best.")
    ] = "weighted,calibrated,majority",
    scorer: Annotated[
        Path | None,
        typer.Option(help="A scorer file: its calibration counts where the records state none."),
    ] = None,
    early: Annotated[
        str,
        typer.Option(help="When the vote ends a group; comma-separated: off, exact, posterior."),
    ] = "off",
    prune_at: Annotated[
        str,
        typer.Option(
            help="Shares of the pool that a group may fill, comma-separated; not for none and "
            "paper.",
            rich_help_panel=MEMORY,
        ),
    ] = "1",
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Traces of a group. Default: as recorded.")
    ] = None,
    page: Annotated[
        int, typer.Option(min=1, help="KV tokens of a page.", rich_help_panel=MEMORY)
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Evaluate pruning, votes and early ends on recorded traces, in a model of the memory."""
    from step_sglang.evaluation.fitted_prices import fitted_prices
    from step_sglang.evaluation.replay import calibrated_by, predict, split_groups
    from step_sglang.evaluation.traces import load_groups
    from step_sglang.evaluation.votes import stated_by
    from step_sglang.voting.verifier import AnswerVerifier

    def warn(text: str) -> None:
        err.print(text, style="yellow", markup=False)

    recorded = list(load_groups(folders, warn))
    groups = calibrated_by(split_groups(recorded, n), stated_by(scorer))
    pruned = sum(not group.whole for group in recorded)
    if pruned:
        err.print(f"left out: {pruned} groups in which a trace did not end by itself")
    fitted = fitted_prices(folders, recorded, warn)
    verifier = AnswerVerifier()
    try:
        pools = numbers("--pool", pool)
        found = list(
            predict(
                groups, names(policies), names(votes), pools, fitted.prices, page, verifier,
                names(early), shares("--prune-at", prune_at),
            )
        )  # fmt: skip
    finally:
        verifier.close()
    if as_json:
        for one in found:
            print(json.dumps(asdict(one)))
        return
    err.print(
        f"{len(groups)} groups of {len(groups[0].traces)} traces; {fitted.told}",
        markup=False, highlight=False,
    )  # fmt: skip
    out.print(_table(found))


def _table(found: Sequence[Any]) -> Table:
    table = Table(
        "pool", "share", "policy", "vote", "early end", "accuracy, %", "tokens", "pruned",
        "ended early", "retracted", "steps", "waiting, %", "seconds",
    )  # fmt: skip
    for one in found:
        table.add_row(
            str(one.pool), f"{one.prune_at:g}", one.policy, one.vote, one.early,
            f"{100 * one.accuracy.value:.1f} ± {100 * one.accuracy.error:.1f}",
            f"{one.tokens:.0f}", f"{one.pruned:.1f}", f"{one.cancelled:.1f}",
            f"{one.retracted:.1f}", f"{one.steps:.0f}", f"{100 * one.wait_share:.0f}",
            f"{one.seconds:.2f}",
        )  # fmt: skip
    return table
