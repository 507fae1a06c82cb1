"""`step-sglang convert`: the reference implementation's scorer in our format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from step_sglang.cli.common import DELIMITER_HELP, out, warn
from step_sglang.config import unescape
from step_sglang.errors import ScorerError


def convert(
    source: Annotated[Path, typer.Argument(help="The reference's .pt file, or a scorer of ours.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    model: Annotated[str, typer.Option(help="The model the scorer was trained for.")],
    delimiter: Annotated[list[str] | None, typer.Option(help=DELIMITER_HELP)] = None,
    think_end: Annotated[str | None, typer.Option(help="Token that ends the thinking.")] = None,
    revision: Annotated[str | None, typer.Option(help="The commit of that model.")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A store of that model's traces, of questions that the scorer was not trained on: "
            "fits what a vote weighs them by."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET.")] = False,
) -> None:
    """Convert the reference implementation's scorer to our format, or change what a file states."""
    from step_sglang.scoring.scorer import load_scorer, save_scorer

    if target.suffix != ".safetensors":
        raise ScorerError(f"{target} must end in .safetensors")
    if target.exists() and not force:
        raise ScorerError(f"{target} exists; --force replaces it")
    scorer = load_scorer(source)
    info = replace(scorer.info, model=model)
    if delimiter:
        info = replace(info, delimiters=tuple(unescape(text) for text in delimiter))
    if think_end:
        info = replace(info, think_end=think_end)
    if revision:
        info = replace(info, revision=revision)
    if calibrate:
        from step_sglang.training.calibrate import calibration_on, doubts
        from step_sglang.training.index import read_meta

        fitted = calibration_on(replace(scorer, info=info), calibrate)
        warn("", doubts(scorer, fitted, read_meta(calibrate)))
        info = replace(info, calibration=fitted)
    try:
        save_scorer(replace(scorer, info=info), target)
    except Exception as error:
        raise ScorerError(f"cannot write {target}: {error}") from error
    out.print(f"wrote {target}: hidden size {scorer.hidden_size}, for {model}", highlight=False)
