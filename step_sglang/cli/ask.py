"""`step-sglang ask`: one question on the command line, with live progress."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from step_sglang.client.result import Result, SolveProgress
from step_sglang.client.solve import DEFAULT_N, DEFAULT_TIMEOUT, solve
from step_sglang.voting.early_stopping import DEFAULT_THRESHOLD
from step_sglang.voting.session import VoteStatus

DEFAULT_URL = "http://127.0.0.1:30000"
NO_VOTE = 3  # exit status
_SHOWN = 5  # answers


def ask(
    question: Annotated[str, typer.Argument(help="The question, one user message.")],
    n: Annotated[int, typer.Option("-n", help="Traces.")] = DEFAULT_N,
    url: Annotated[str, typer.Option(help="A server with --enable-step.")] = DEFAULT_URL,
    vote: Annotated[str, typer.Option(help="weighted, majority or best.")] = "weighted",
    early: Annotated[
        str,
        typer.Option(
            help="End when the answer cannot change (exact), also when that is improbable "
            "(posterior), or never (off)."
        ),
    ] = "exact",
    threshold: Annotated[
        float, typer.Option(help="Of posterior: probability that the answer changes.")
    ] = DEFAULT_THRESHOLD,
    extract: Annotated[str, typer.Option(help="boxed, choice or number.")] = "boxed",
    suffix: Annotated[
        str, typer.Option(help=r"Appended to the question, e.g. to ask for \boxed{}.")
    ] = "",
    temperature: Annotated[float | None, typer.Option(help="0.6.")] = None,
    top_p: Annotated[float | None, typer.Option(help="0.95.")] = None,
    top_k: Annotated[int | None, typer.Option(help="20; -1 = off.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Up to the context.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="STEP_SGLANG_API_KEY")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence.")] = DEFAULT_TIMEOUT,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole result as JSON; no progress.")
    ] = False,
) -> None:
    """Ask a running server one question: sample traces, vote, print the answer.

    Exit status 0: there is an answer; 3: no trace finished, or none has an answer; 1: an error.
    """
    out, err = Console(soft_wrap=True), Console(stderr=True)
    given = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    options: dict[str, Any] = {
        "url": url, "vote": vote, "early": early, "threshold": threshold, "extract": extract,
        "sampling": {key: value for key, value in given.items() if value is not None},
        "api_key": api_key, "timeout": timeout,
    }  # fmt: skip
    if as_json:
        result = solve(question + suffix, n, **options)
        print(json.dumps(result.as_dict()))
    else:
        with Live(console=err, transient=True, refresh_per_second=10) as live:
            result = solve(
                question + suffix,
                n,
                **options,
                on_progress=lambda p: live.update(_leaders_table(p)),
            )
        _show(result, out)
    if result.status is not VoteStatus.VOTED:
        raise typer.Exit(NO_VOTE)


def _leaders_table(progress: SolveProgress) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(
        f"{progress.running} running, {progress.finished} finished, {progress.pruned} pruned, "
        f"{progress.tokens} tokens"
    )
    total = sum(answer.weight for answer in progress.leaders) or 1.0
    for answer in progress.leaders[:_SHOWN]:
        table.add_row(
            f"{answer.weight / total:4.0%}  {len(answer.traces):3} traces  {escape(answer.answer)}"
        )
    return table


def _show(result: Result, out: Console) -> None:
    total = sum(answer.weight for answer in result.answers) or 1.0
    for answer in result.answers[:_SHOWN]:
        out.print(
            f"{answer.weight / total:4.0%}  {len(answer.traces):3} traces  {answer.answer}",
            markup=False, highlight=False,
        )  # fmt: skip
    fates: dict[str, int] = {}
    for trace in result.traces:
        fates[trace.fate.value] = fates.get(trace.fate.value, 0) + 1
    counts = ", ".join(f"{count} {fate}" for fate, count in fates.items())
    early = ", ended early" if result.early else ""
    out.print(f"{counts}; {result.timing.total:.1f} s{early}", highlight=False)
    if result.status is VoteStatus.VOTED:
        out.print(f"answer: {result.answer}", markup=False, highlight=False, style="bold")
        return
    out.print(f"no answer: {result.message}", markup=False, highlight=False, style="bold red")
    if result.best is not None:
        partial = " (partial)" if result.status is VoteStatus.NO_FINISHED_TRACE else ""
        out.print(f"the best trace{partial}:\n{result.best.text}", markup=False, highlight=False)
