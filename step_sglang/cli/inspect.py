"""`step-sglang inspect`: what a scorer file says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from step_sglang import files
from step_sglang.cli.common import OUTPUT, out, warn
from step_sglang.errors import ScorerError


def inspect(
    scorer: Annotated[
        str,
        typer.Argument(help="A scorer file, the folder of `train`, or org/name on the Hub."),
    ],
    on: Annotated[
        Path | None, typer.Option(help="Measure it on all questions of this store.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)
    ] = False,
    card: Annotated[
        Path | None,
        typer.Option(help="Write its model card to this file.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Show what a scorer was trained on, for which model, and its figures."""
    from step_sglang.cli.evaluation import show_evaluation
    from step_sglang.scoring.locate import locate_scorer
    from step_sglang.scoring.scorer import load_scorer
    from step_sglang.training.card import card_text
    from step_sglang.training.reader import Reader
    from step_sglang.training.train import evaluate_scorer, jsonable
    from step_sglang.training.trained_on import KEY, trained_on
    from step_sglang.training.voted import labels_of

    file = Path(locate_scorer(scorer, ""))
    loaded = load_scorer(file)
    info: dict[str, Any] = {
        "model": loaded.info.model,
        "revision": loaded.info.revision,
        "hidden_size": loaded.hidden_size,
        "weights": str(loaded.w1.dtype).removeprefix("torch."),
        "delimiters": list(loaded.info.delimiters),
        "think_end": loaded.info.think_end,
        "calibration": (
            None if loaded.info.calibration is None else loaded.info.calibration.as_json()
        ),
        "training": {name: v for name, v in loaded.info.training.items() if name != KEY},
    }
    evaluation = None
    if on is not None:
        reader = Reader(on)
        evaluation = evaluate_scorer(loaded, reader, file)
        if labels_of(reader.meta).source == "vote":
            warn("", (f"the figures on {on} are against its traces' own vote, not true answers",))
        if shared := trained_on(loaded.info.training, reader):
            among = f"{shared} of the {len(reader.shards)} questions in {on}"
            warn("", (f"the scorer was trained on {among}: the figures flatter it",))
    if card is not None:
        try:
            files.write(card, card_text(loaded).encode())
        except OSError as error:
            raise ScorerError(f"cannot write {card}: {error.strerror}") from error
    if as_json:
        print(json.dumps({**info, "measured": jsonable(evaluation)}, indent=2))
        return
    table = Table("scorer", str(file), title_justify="left")
    for name, value in _rows(info):
        table.add_row(name, value)
    out.print(table)
    if loaded.info.training.get("test"):
        out.print(_ranking(loaded.info.training["test"]))
    if evaluation is not None:
        warn("", show_evaluation(evaluation, None))


def _rows(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    training = dict(info["training"])
    test = training.pop("test", {})
    for name, value in {**info, **training}.items():
        if name == "training":
            continue
        shown = value
        if name == "calibration" and value is None:
            shown = "none: votes weigh by trace score"
        elif isinstance(value, Mapping):
            shown = ", ".join(f"{key} {json.dumps(member)}" for key, member in value.items())
        elif isinstance(value, list):
            shown = ", ".join(map(repr, value))
        yield name.replace("_", " "), str(shown) if shown not in (None, "", {}) else "unknown"
    for name, value in test.items():
        if isinstance(value, float):
            yield f"test: {name.replace('_', ' ')}", f"{value:.3f}"
    for name, value in (test.get("vote_accuracy") or {}).items():
        yield f"test: vote, {name}", f"{value[0]:.1%}"


def _ranking(test: Mapping[str, Any]) -> Table:
    from step_sglang.training.card import in_order

    found = test.get("auc_within_question") or {}
    fractions = in_order(next(iter(found.values()), {}))
    table = Table("test: AUC within the question", *fractions)
    for name, at in found.items():
        table.add_row(name, *("-" if at[f][0] is None else f"{at[f][0]:.3f}" for f in fractions))
    return table
