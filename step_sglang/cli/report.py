"""`step-sglang report`: tables and plots of measured results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from step_sglang.cli.common import out, warn


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `bench`, such as shards.")],
    target: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: the first.")
    ] = None,
    against: Annotated[str, typer.Option(help="The method that others are compared with.")] = "sc",
    scorer: Annotated[
        Path | None,
        typer.Option(help="A scorer file: its calibration counts where the results state none."),
    ] = None,
) -> None:
    """Make tables and plots of results; several folders count as one."""
    show_report(folders, target or folders[0], against, scorer)


def show_report(
    folders: list[Path], target: Path, against: str = "sc", scorer: Path | None = None
) -> None:
    """Write the report, and print its tables."""
    from step_sglang.evaluation.methods import methods_named
    from step_sglang.evaluation.report import write_report
    from step_sglang.evaluation.votes import stated_by

    (reference,) = methods_named(against)[:1]
    written = write_report(folders, target, reference, stated_by(scorer))
    warn("", written.problems)
    out.print(written.heading, markup=False, highlight=False)
    # A pipe has no width that cells would have to fit in.
    console = out if out.is_terminal else Console(width=200)
    for table in written.tables:
        shown = RichTable(
            title=table.caption, title_justify="left", box=SIMPLE_HEAD, pad_edge=False
        )
        for name in table.head:
            shown.add_column(name, overflow="fold", vertical="bottom")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    warn("", written.warnings)
    out.print(f"wrote {', '.join(str(file) for file in written.files)}", highlight=False)
