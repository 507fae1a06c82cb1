"""`step-sglang collect`: traces with their hidden states, from a server into a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from step_sglang.cli.common import (
    DELIMITER_HELP,
    MODEL,
    QUESTIONS,
    RUNNING,
    SAMPLING,
    STORING,
    SUFFIX_HELP,
    err,
    given,
    one_of,
    out,
    progress_bar,
    resolve_model,
    warn,
)
from step_sglang.config import SCOPES, unescape
from step_sglang.errors import ServerError, SourceError

if TYPE_CHECKING:
    from step_sglang.training.setup import CollectOptions, CollectPlan


def collect(
    source: Annotated[
        str,
        typer.Argument(
            help="Questions: a JSON-lines file, a Hugging Face data set, or reasoner:SPLIT. "
            "With --from-traces, the JSON-lines file of traces, or a folder of such."
        ),
    ],
    store: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the store.", rich_help_panel=STORING)
    ],
    server_flags: Annotated[
        list[str] | None,
        typer.Argument(help="After `--`: more flags for the server that is started."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", min=1, help="Traces per question. Default: 64.", rich_help_panel=QUESTIONS
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many questions.", rich_help_panel=QUESTIONS)
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a data set.", rich_help_panel=QUESTIONS)
    ] = "train",
    config: Annotated[
        str | None, typer.Option(help="Configuration of a data set.", rich_help_panel=QUESTIONS)
    ] = None,
    question_field: Annotated[str, typer.Option(rich_help_panel=QUESTIONS)] = "question",
    answer_field: Annotated[str, typer.Option(rich_help_panel=QUESTIONS)] = "answer",
    no_answers: Annotated[
        bool,
        typer.Option(
            "--no-answers",
            help="The questions have none, as in use: `train --labels vote` does without.",
            rich_help_panel=QUESTIONS,
        ),
    ] = False,
    text_field: Annotated[str, typer.Option(rich_help_panel=QUESTIONS)] = "text",
    from_traces: Annotated[
        bool,
        typer.Option(
            "--from-traces",
            help="Read existing traces: prefill only.",
            rich_help_panel=QUESTIONS,
        ),
    ] = False,
    labels: Annotated[
        str,
        typer.Option(
            help="answers, or vote: with --from-traces, of the groups that a server with "
            "--step-sample kept, a trace is right if it gave the answer that its group agreed on.",
            rich_help_panel=QUESTIONS,
        ),
    ] = "answers",
    agreement: Annotated[
        float,
        typer.Option(
            help="With --labels vote: the least share of a group's traces that must agree.",
            rich_help_panel=QUESTIONS,
        ),
    ] = 0.5,
    suffix: Annotated[str | None, typer.Option(help=SUFFIX_HELP, rich_help_panel=QUESTIONS)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model path or name, or `reasoner`. Default: what --url serves.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="A running --step-capture server; without it one is started and stopped.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Of the model on the Hub: a branch, a tag or a commit. Default: what the server "
            "at --url was started with, else the main branch.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Default: 0.6; reasoner 1.0.", rich_help_panel=SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Default: 0.95; reasoner 1.0.", rich_help_panel=SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Default: 20; reasoner -1, off.", rich_help_panel=SAMPLING)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: 32768; reasoner 900.", rich_help_panel=SAMPLING)
    ] = None,
    delimiter: Annotated[
        list[str] | None,
        typer.Option(help=DELIMITER_HELP + r" Default: \n\n.", rich_help_panel=STORING),
    ] = None,
    scope: Annotated[
        str,
        typer.Option(help="thinking: steps before </think>; or all.", rich_help_panel=STORING),
    ] = "thinking",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the stored states: float16, bfloat16, float32.", rich_help_panel=STORING
        ),
    ] = "float16",
    top_logprobs: Annotated[
        int,
        typer.Option(
            min=0,
            help="Candidates per token for DeepConf's confidence; 0 = off.",
            rich_help_panel=STORING,
        ),
    ] = 20,
    confidence_window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a DeepConf group. Default: 2048; reasoner 20.",
            rich_help_panel=STORING,
        ),
    ] = None,
    keep_text: Annotated[
        bool,
        typer.Option("--keep-text", help="Store texts and token ids too.", rich_help_panel=STORING),
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions at a time.", rich_help_panel=RUNNING)
    ] = 4,
    timeout: Annotated[
        float, typer.Option(help="Seconds for one request.", rich_help_panel=RUNNING)
    ] = 3600.0,
) -> None:
    """Sample traces from a server, grade them, store their hidden states. Resumable."""
    from step_sglang.client.sampling import Sampling
    from step_sglang.data.questions import Fields
    from step_sglang.training.setup import REASONER_SAMPLING, CollectOptions, plan_collection
    from step_sglang.training.stored import DTYPES
    from step_sglang.training.voted import Labels
    from step_sglang.voting.suffix import is_reasoner

    one_of("--dtype", dtype, tuple(DTYPES))
    one_of("--scope", scope, SCOPES)
    name, path = resolve_model(model, url, source)
    flags = list(server_flags or [])
    options = CollectOptions(
        source=source,
        model=name,
        path=path,
        revision=_revision(revision, url, flags),
        from_traces=from_traces,
        n=n,
        limit=limit,
        split=split,
        config=config,
        fields=Fields(question_field, None if no_answers else answer_field, text_field),
        suffix=suffix,
        sampling=given(
            REASONER_SAMPLING if is_reasoner(name) else Sampling(),
            temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
        ),
        delimiters=tuple(unescape(text) for text in delimiter or ["\\n\\n"]),
        scope_all=scope == "all",
        dtype=dtype,
        top_logprobs=top_logprobs,
        confidence_window=confidence_window,
        concurrency=concurrency,
        timeout=timeout,
        keep_text=keep_text,
        labels=Labels(labels, agreement),
    )  # fmt: skip
    _run(plan_collection(options), options, store, url, flags)


def _revision(given: str | None, url: str | None, flags: list[str]) -> str | None:
    """The model's revision, for the tokenizer and the store too; raises SourceError."""
    said = _flag_value(flags, "--revision")
    if given is not None and said not in (None, given):
        raise SourceError(f"--revision is {given}, and after `--` it is {said}: give one of them")
    if url is None:
        return given or said
    from step_sglang.client.http import server_info

    served = None
    with suppress(ServerError):  # a router, or a server that does not answer: that is said later
        served = server_info(url).get("revision")
    if not isinstance(served, str):
        return given
    if given not in (None, served):
        warn("", (f"{url} was started with --revision {served}, and here it is {given}",))
    return given or served


def _flag_value(flags: list[str], name: str) -> str | None:
    """What a flag of the server is set to; the last one wins there."""
    found = None
    for place, flag in enumerate(flags):
        if flag == name and place + 1 < len(flags):
            found = flags[place + 1]
        elif flag.startswith(f"{name}="):
            found = flag.partition("=")[2]
    return found


def _run(
    plan: CollectPlan, options: CollectOptions, store: Path, url: str | None, flags: list[str]
) -> None:
    """Fill the store with what it lacks, and say what was done."""
    from step_sglang.training.collect import CollectProgress, collect
    from step_sglang.training.store import Writer

    warn("", plan.problems)
    with Writer(store, plan.meta) as writer:
        warn("repaired", writer.repairs)
        left = sum(job.id not in writer.done for job in plan.jobs)
        err.print(f"{len(plan.jobs)} questions, {len(plan.jobs) - left} in {store} already")
        if not left:
            return
        with (
            _server(url, options, flags, store) as at,
            progress_bar(left, "questions") as bar,
        ):

            def advance(done: CollectProgress) -> None:
                bar(done.questions, f"{done.correct / done.traces:.0%} correct")

            try:
                done = collect(at, writer, plan.jobs, plan.prompter, plan.settings, advance)
            except KeyboardInterrupt:
                kept = len(writer.done)
                err.print(f"stopped; {kept} questions are in {store}, run again to go on")
                raise SystemExit(130) from None
    warn("refused", done.refused)
    warn("left out", done.unusable)
    share = done.correct / max(1, done.traces)
    out.print(f"{store}: {done.questions} questions, {done.traces} traces, {share:.1%} correct")


@contextmanager
def _server(
    url: str | None, options: CollectOptions, flags: list[str], store: Path
) -> Iterator[str]:
    """The URL of the user's server, or of one that is started now and stopped at the end."""
    from step_sglang.client.launch import capture_flags, running_server

    if url is not None:
        yield url
        return
    log = store / "server.log"
    with ExitStack() as stack:
        with err.status("starting the server ..."):
            more = [*capture_flags(options.delimiters, options.scope_all), *flags]
            if options.revision is not None:
                more += ["--revision", options.revision]
            address = stack.enter_context(running_server(options.path, more, log))
        try:
            yield address
        except ServerError as error:
            raise ServerError(f"{error}. Its log: {log}") from error
