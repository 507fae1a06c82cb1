"""`step-sglang ask`: one question on the command line, with live progress, or a file of them."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from step_sglang.cli.common import (
    MODEL,
    OUTPUT,
    QUESTIONS,
    SAMPLING,
    SUFFIX_HELP,
    VOTING,
    err,
    out,
    progress_bar,
    seconds,
    warn,
)
from step_sglang.client.batch import Progress, ResultFile, ask_all, grades
from step_sglang.client.errors import ClientError
from step_sglang.client.http import Client
from step_sglang.client.result import Answer, Result, SolveProgress
from step_sglang.client.solve import DEFAULT_EFFORT, DEFAULT_N, DEFAULT_TIMEOUT, solve
from step_sglang.data.questions import Fields, load_questions
from step_sglang.errors import ServerError
from step_sglang.protocol import DEFAULT_VOTE
from step_sglang.voting.session import VoteStatus
from step_sglang.voting.suffix import is_reasoner

DEFAULT_URL = "http://127.0.0.1:30000"
NO_VOTE = 3  # exit status
_SHOWN = 5  # answers
_REASONER_QUESTION = re.compile(r"\d{1,2}(;[A-P][+*-]\d)+")


def ask(
    question: Annotated[str | None, typer.Argument(help="The question, one user message.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="Many questions instead: JSON lines with question and perhaps answer, or a set by "
            "name such as aime-25.",
            rich_help_panel=QUESTIONS,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Of --file: results as JSON lines; a stopped run goes on.",
            rich_help_panel=QUESTIONS,
        ),
    ] = Path("results.jsonl"),
    limit: Annotated[
        int | None, typer.Option(help="Of --file: the first so many.", rich_help_panel=QUESTIONS)
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Of --file: questions at a time.", rich_help_panel=QUESTIONS)
    ] = 8,
    retries: Annotated[
        int,
        typer.Option(
            help="Of --file: how often a question is asked again when its server is gone or full.",
            rich_help_panel=QUESTIONS,
        ),
    ] = 2,
    n: Annotated[int, typer.Option("-n", help="Traces.", rich_help_panel=VOTING)] = DEFAULT_N,
    url: Annotated[
        list[str],
        typer.Option(
            help="A server with --enable-step, or SGLang's router. Repeat for several.",
            rich_help_panel=MODEL,
        ),
    ] = [DEFAULT_URL],  # noqa: B006
    api_key: Annotated[
        str | None, typer.Option(envvar="STEP_SGLANG_API_KEY", rich_help_panel=MODEL)
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds of silence.", rich_help_panel=MODEL)
    ] = DEFAULT_TIMEOUT,
    vote: Annotated[
        str,
        typer.Option(help="calibrated, weighted, majority or best.", rich_help_panel=VOTING),
    ] = DEFAULT_VOTE,
    effort: Annotated[
        str,
        typer.Option(
            help="fast, balanced, thorough, or a number from 0 (fast) to 1 (thorough): how soon "
            "the vote ends, and how much memory it fills. The next four win over it.",
            rich_help_panel=VOTING,
        ),
    ] = DEFAULT_EFFORT,
    early: Annotated[
        str | None,
        typer.Option(
            help="End when the answer cannot change (exact), also when that is improbable "
            "(posterior), or never (off).",
            rich_help_panel=VOTING,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Of posterior: probability that the answer changes.", rich_help_panel=VOTING
        ),
    ] = None,
    shrink: Annotated[
        float | None,
        typer.Option(
            help="End the least promising traces once fewer settle the vote: probability that "
            "all would vote otherwise.",
            rich_help_panel=VOTING,
        ),
    ] = None,
    prune_at: Annotated[
        float | None,
        typer.Option(
            help="Share of the KV pool that the group may hold before its worst trace is pruned.",
            rich_help_panel=VOTING,
        ),
    ] = None,
    extract: Annotated[
        str, typer.Option(help="boxed, choice or number.", rich_help_panel=VOTING)
    ] = "boxed",
    suffix: Annotated[str | None, typer.Option(help=SUFFIX_HELP, rich_help_panel=VOTING)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Default: 0.6.", rich_help_panel=SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Default: 0.95.", rich_help_panel=SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Default: 20; -1 = off.", rich_help_panel=SAMPLING)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: up to the context.", rich_help_panel=SAMPLING)
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Also print the winning trace's reasoning.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the whole result as JSON; no progress.", rich_help_panel=OUTPUT
        ),
    ] = False,
) -> None:
    """Ask a running server one question, or a file of them: sample traces, vote, print the answer.

    Exit status 0: there is an answer; 3: no trace finished, or none has an answer; 1: an error. Of
    --file 0: every question that could be read has a result; 1: an error, and the same command
    goes on.
    """
    if (question is None) is (file is None):
        raise ClientError("give either a question or --file")
    sampling = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    options: dict[str, Any] = {
        "url": url, "vote": vote, "early": early, "threshold": threshold, "extract": extract,
        "shrink": shrink, "prune_at": prune_at, "effort": _effort(effort),
        "sampling": {key: value for key, value in sampling.items() if value is not None},
        "api_key": api_key, "timeout": timeout, "suffix": suffix,
    }  # fmt: skip
    if file is not None:
        _ask_file(file, output, limit, n, concurrency, retries, options)
        return
    assert question is not None
    if as_json:
        result = solve(question, n, **options)
        print(json.dumps(result.as_dict()))
    else:
        pool = _pool(url[0], api_key, question)
        with Live(console=err, transient=True, refresh_per_second=10) as live:
            result = solve(question, n, **options, on_progress=lambda p: live.update(_leaders(p)))
        _print(result, pool, show)
    if result.status is not VoteStatus.VOTED:
        raise typer.Exit(NO_VOTE)


def _ask_file(
    file: str,
    output: Path,
    limit: int | None,
    n: int,
    concurrency: int,
    retries: int,
    options: dict[str, Any],
) -> None:
    questions = load_questions(file, limit, fields=Fields(optional=True))
    warn(questions.name, questions.problems)
    kept = {k: v for k, v in options.items() if k not in ("url", "api_key", "timeout")}
    model = _model(options["url"], options["api_key"])
    results = ResultFile(output, {"model": model, "n": n, **kept})
    begun = len([job for job in questions.jobs if job.id in results.done])
    total = len(questions.jobs)
    if begun:
        err.print(f"{begun} of {total} questions have a result in {output}", highlight=False)
    done = begun
    problems: list[str] = []
    try:
        with progress_bar(total, "questions") as advance:
            advance(done, "")

            def on_result(progress: Progress) -> None:
                nonlocal done
                done += 1
                words = progress.problem or f"answer {progress.result and progress.result.answer}"
                advance(done, words.splitlines()[0][:60])
                if progress.problem:
                    problems.append(f"{progress.job.question[:60]!r}: {progress.problem}")

            missing = asyncio.run(
                ask_all(
                    questions.jobs,
                    n,
                    results,
                    concurrency=concurrency,
                    retries=retries,
                    on_result=on_result,
                    **options,
                )
            )
    finally:
        results.close()
    warn("", problems)
    found = [results.done[job.id] for job in questions.jobs if job.id in results.done]
    voted = sum(line["status"] == VoteStatus.VOTED.value for line in found)
    graded, anew = grades(questions.jobs, results)
    right = f", {sum(graded)} of {len(graded)} correct" if graded else ""
    if anew:
        problem = f"{anew} results are not graded by the answer that their question has now"
        warn("", (f"{problem}: what follows is, {output} stays as it is",))
    out.print(f"{len(found)} questions, {voted} with an answer{right}: {output}", highlight=False)
    if missing:
        raise ServerError(f"{missing} questions have no result: run the same command again")


def _model(urls: Sequence[str], api_key: str | None) -> str:
    """What the first server that answers serves; raises ServerError when none does."""
    for url in urls[:-1]:
        with suppress(ServerError), Client(url, api_key=api_key) as client:
            return client.model()
    with Client(urls[-1], api_key=api_key) as client:
        return client.model()


def _effort(text: str) -> str | float:
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _pool(url: str, api_key: str | None, question: str) -> int | None:
    """The server's KV pool in tokens; warns of a question that its model was not made for."""
    try:
        with Client(url, api_key=api_key) as client:
            info = client.info()
    except ServerError:
        return None  # solving will tell what is wrong
    if is_reasoner(str(info.get("model_path"))) and not _REASONER_QUESTION.fullmatch(question):
        warn(
            "",
            (
                "the server's model is the embedded reasoner, which knows chains of arithmetic "
                "modulo 13 such as 11;A*6;B*5;C+6;D+3;E-3;F*2;G-4;H+3 and nothing else: expect "
                "no sense",
            ),
        )
    pool = info.get("max_total_num_tokens")
    return pool if isinstance(pool, int) else None


def _leaders(progress: SolveProgress) -> Table:
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


def _print(result: Result, pool: int | None, show: bool) -> None:
    if result.answers:
        out.print(_answers(result))
    fates = Counter(trace.fate.value for trace in result.traces)
    counts = ", ".join(f"{count} {fate}" for fate, count in fates.items())
    tokens = sum(trace.tokens for trace in result.traces)
    held = "" if pool is None else f"; KV pool of {pool}"
    early = ", ended early" if result.early else ""
    times = result.timing
    waited = "" if times.wait is None else f", a trace waited {seconds(times.wait)} (mean)"
    took = f"answered in {times.total:.1f} s{early}{waited}"
    out.print(f"{counts}; {tokens} tokens{held}; {took}", highlight=False)
    if all(trace.score is None for trace in result.traces):
        warn(
            "",
            (
                "no trace has a score: none has reached a step boundary (check the server's "
                "--step-delimiter, and that the prompt asks this model to reason)",
            ),
        )
    if result.status is not VoteStatus.VOTED:
        out.print(f"no answer: {result.message}", markup=False, highlight=False, style="bold red")
    if result.best is not None and (show or result.status is not VoteStatus.VOTED):
        partial = " (partial)" if result.status is VoteStatus.NO_FINISHED_TRACE else ""
        score = "-" if result.best.score is None else f"{result.best.score:.3f}"
        out.print(
            f"the best trace{partial}, score {score}:\n{result.best.text}\n",
            markup=False, highlight=False,
        )  # fmt: skip
    if result.status is VoteStatus.VOTED:
        out.print(f"answer: {result.answer}", markup=False, highlight=False, style="bold")


def _answers(result: Result) -> Table:
    """The leading answers: their share of the vote, how many traces, and those traces' scores."""
    table = Table("share", "traces", "mean score", "best score", "answer")
    total = sum(answer.weight for answer in result.answers) or 1.0
    for answer in result.answers[:_SHOWN]:
        mean, best = _scores(result, answer)
        table.add_row(
            f"{answer.weight / total:.0%}", str(len(answer.traces)), mean, best,
            escape(answer.answer),
        )  # fmt: skip
    return table


def _scores(result: Result, answer: Answer) -> tuple[str, str]:
    known = [s for index in answer.traces if (s := result.traces[index].score) is not None]
    if not known:
        return "-", "-"
    return f"{sum(known) / len(known):.3f}", f"{max(known):.3f}"
