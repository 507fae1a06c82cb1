"""`step-sglang push`: a trained scorer on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from step_sglang.cli.common import err, out


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of `train`.")],
    repository: Annotated[str, typer.Argument(help="org/name; created unless it exists.")],
    private: Annotated[bool, typer.Option("--private", help="Where it is created.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "STEP scorer",
) -> None:
    """Upload a scorer with its card, figures and plots to the Hugging Face Hub."""
    from step_sglang.training.push import push_scorer

    out.print(push_scorer(folder, repository, private, message), highlight=False)
    err.print(f"serve with it: --step-scorer {repository}", highlight=False)
