"""`step-sglang simulate`: methods at the scale of a GPU that nobody has here, in simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from step_sglang.cli.common import (
    MEMORY,
    METHODS,
    MODEL,
    OUTPUT,
    QUESTIONS,
    RUNNING,
    err,
    numbers,
    out,
    progress_bar,
    warn,
)
from step_sglang.errors import SourceError

if TYPE_CHECKING:
    from step_sglang.evaluation.simulated import SimulatedOutcome
    from step_sglang.evaluation.simulation_setup import SimulateOptions

SCORES = "Invented scores"


def simulate(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A gzipped JSON file of lengths and answers; folders of `bench --record`; or "
            "`generator`, lengths of a published distribution."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the outcomes.", rich_help_panel=OUTPUT)
    ],
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200 or b200.", rich_help_panel=MODEL)
    ] = "h100",
    model: Annotated[
        str,
        typer.Option(help="qwen3-4b, qwen3-8b, phi-4 or qwen3-30b-a3b.", rich_help_panel=MODEL),
    ] = "qwen3-8b",
    recorded_speed: Annotated[
        bool,
        typer.Option(
            "--recorded-speed",
            help="Instead: steps take as long as in these folders: in timed trials, else recorded.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    step_time: Annotated[
        float, typer.Option(help="Factor on the time of every pass.", rich_help_panel=MODEL)
    ] = 1.0,
    attention_time: Annotated[
        float,
        typer.Option(help="Factor on the time that attended tokens take.", rich_help_panel=MODEL),
    ] = 1.0,
    pool: Annotated[
        str | None,
        typer.Option(
            help="KV tokens, comma-separated. Default: what fits beside the model.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: sc, sc-early, sc-exact, random, random-balanced, random-fast, "
            "longest, step, step-early, step-exact, step-balanced, step-fast.",
            rich_help_panel=METHODS,
        ),
    ] = "sc,sc-early,random,longest,step,step-early,step-balanced,step-fast",
    n: Annotated[
        str,
        typer.Option("--n", help="Traces per question; comma-separated.", rich_help_panel=METHODS),
    ] = "64",
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many. Default: all.", rich_help_panel=QUESTIONS),
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, help="Questions that come together.", rich_help_panel=QUESTIONS)
    ] = 1,
    draws: Annotated[
        int,
        typer.Option(min=1, help="Of traces and scores, a question.", rich_help_panel=QUESTIONS),
    ] = 1,
    seed: Annotated[int, typer.Option(rich_help_panel=QUESTIONS)] = 0,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of a question.", rich_help_panel=QUESTIONS)
    ] = 150,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Traces are cut there.", rich_help_panel=QUESTIONS)
    ] = 38_912,
    auc: Annotated[
        str,
        typer.Option(
            help="How often a right trace's score beats a wrong one's of its question; "
            "comma-separated.",
            rich_help_panel=SCORES,
        ),
    ] = "0.7",
    grown: Annotated[
        float,
        typer.Option(
            help="At this share of the mean length; from chance at the beginning. 0: at once.",
            rich_help_panel=SCORES,
        ),
    ] = 0.5,
    step_tokens: Annotated[
        int, typer.Option(min=1, help="Of a step.", rich_help_panel=SCORES)
    ] = 128,
    scheduler: Annotated[
        str,
        typer.Option(
            help="model: a model of SGLang's, seconds a question; sglang: the real one, minutes.",
            rich_help_panel=RUNNING,
        ),
    ] = "model",
    unit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that count as one. Default: 1; with the real scheduler 16.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
) -> None:
    """Simulate methods on a virtual GPU: lengths of real traces, simulated time. Resumable."""
    from step_sglang.evaluation.simulation_setup import SimulateOptions

    options = SimulateOptions(
        sources=tuple(sources), gpu=gpu, model=model,
        pools=() if pool is None else numbers("--pool", pool), ns=numbers("--n", n),
        methods=methods, aucs=_aucs(auc), grown=grown, questions=questions, draws=draws,
        at_once=at_once, seed=seed, scheduler=scheduler, unit=unit, step_time=step_time,
        attention_time=attention_time, prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens, step_tokens=step_tokens, recorded_speed=recorded_speed,
    )  # fmt: skip
    _run(options, folder)


def _aucs(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise SourceError(f"--auc takes numbers such as 0.6,0.7, not {text!r}") from None


def _run(options: SimulateOptions, folder: Path) -> None:
    """Simulate what the folder lacks, and show the report."""
    from step_sglang.evaluation.simulated import OutcomeWriter
    from step_sglang.evaluation.simulation_setup import SGLANG, run_modelled, set_up
    from step_sglang.evaluation.virtual import run_virtual

    simulation = set_up(options)
    warn("", simulation.problems)
    if simulation.step_times is not None:
        _say(simulation.step_times)
    with OutcomeWriter(folder, simulation.meta) as writer:
        before = len(writer.done)
        _say(
            f"simulated: {simulation.questions} questions, {simulation.total} outcomes; "
            f"{before} in {folder} already"
        )
        try:
            with progress_bar(simulation.total, "outcomes") as bar:

                def advance(found: Sequence[SimulatedOutcome]) -> None:
                    last = found[-1]
                    bar(
                        min(simulation.total, len(writer.done)),
                        f"simulated: draw {last.draw + 1}, question {last.question}, "
                        f"{last.method} n={last.n}: {last.seconds:.0f} s",
                    )

                run = run_virtual if simulation.scheduler == SGLANG else run_modelled
                run(simulation, writer, advance)
        except KeyboardInterrupt:
            _say(f"stopped; {len(writer.done)} outcomes are in {folder}, run again to go on")
            raise SystemExit(130) from None
    _show(folder)


def _show(folder: Path) -> None:
    from step_sglang.evaluation.simulation_report import write_report

    written = write_report(folder)
    console = out if out.is_terminal else Console(width=200)
    shown = RichTable(
        title=written.table.caption, title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in written.table.head:
        shown.add_column(name, overflow="fold", vertical="bottom")
    for row in written.table.rows:
        shown.add_row(*row)
    console.print(shown)
    out.print(written.note, markup=False, highlight=False)
    out.print(f"wrote {', '.join(str(file) for file in written.files)}", highlight=False)


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False)
