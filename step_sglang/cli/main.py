"""STEP for SGLang: serve, ask, collect, train, bench."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer
from rich.markup import escape

from step_sglang import __version__
from step_sglang.cli.ask import ask
from step_sglang.cli.bench import bench
from step_sglang.cli.collect import collect
from step_sglang.cli.common import err, out
from step_sglang.cli.convert import convert
from step_sglang.cli.inspect import inspect
from step_sglang.cli.push import push
from step_sglang.cli.replay import replay
from step_sglang.cli.report import report
from step_sglang.cli.serve import serve
from step_sglang.cli.simulate import simulate
from step_sglang.cli.train import train
from step_sglang.cli.watch import watch
from step_sglang.errors import StepError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
for panel, commands in (
    ("Serve and ask", (serve, ask, watch)),
    ("Train a scorer", (collect, train, inspect, convert, push)),
    ("Compare methods", (bench, report, replay, simulate)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"step-sglang {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; an error a user can meet is one message, not a stack."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that servers stop
    try:
        app(standalone_mode=True)
    except StepError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
