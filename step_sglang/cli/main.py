"""From questions to a trained scorer: collect, train, inspect, convert. Ask. Measure: bench."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from step_sglang.cli.ask import ask
from step_sglang.cli.bench import bench, replay, report
from step_sglang.config import unescape
from step_sglang.errors import ScorerError, ServerError, SourceError, StepError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
out = Console(soft_wrap=True)  # paths are not broken into lines
err = Console(stderr=True, soft_wrap=True)
for command in (ask, bench, report, replay):
    app.command()(command)
_DELIMITER_HELP = r"Text that ends a step; \n and \t are understood. Repeat for several."


def main() -> None:
    """Run the command; an error a user can meet is one message, not a stack."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that servers stop
    try:
        app(standalone_mode=True)
    except StepError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


@app.command()
def collect(
    source: Annotated[
        str,
        typer.Argument(
            help="Questions: a JSON-lines file, a Hugging Face data set, or reasoner:SPLIT. "
            "With --from-traces, the JSON-lines file of traces."
        ),
    ],
    store: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.")],
    server_flags: Annotated[
        list[str] | None,
        typer.Argument(help="After `--`: more flags for the server that is started."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model path or name, or `reasoner`. Default: what --url serves."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A running server; without it one is started and stopped.")
    ] = None,
    from_traces: Annotated[
        bool, typer.Option("--from-traces", help="Read existing traces: prefill only.")
    ] = False,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Traces per question (64).")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a data set.")] = None,
    question_field: Annotated[str, typer.Option()] = "question",
    answer_field: Annotated[str, typer.Option()] = "answer",
    text_field: Annotated[str, typer.Option()] = "text",
    suffix: Annotated[
        str | None,
        typer.Option(help=r"Appended to each question. Default: asks for \boxed{}."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0.6; reasoner 1.0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="0.95; reasoner 1.0.")] = None,
    top_k: Annotated[int | None, typer.Option(help="20; reasoner -1 (off).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="32768; reasoner 900.")] = None,
    delimiter: Annotated[list[str] | None, typer.Option(help=_DELIMITER_HELP)] = None,
    scope: Annotated[str, typer.Option(help="thinking: steps before </think>; or all.")] = (
        "thinking"
    ),
    dtype: Annotated[
        str, typer.Option(help="Of the stored states: float16, bfloat16, float32.")
    ] = "float16",
    top_logprobs: Annotated[
        int, typer.Option(min=0, help="Candidates per token for DeepConf's confidence; 0 = off.")
    ] = 20,
    confidence_window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a DeepConf group. 2048; reasoner 20.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 3600.0,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="Store texts and token ids too.")
    ] = False,
) -> None:
    """Sample traces from a server, grade them, store their hidden states. Resumable."""
    from step_sglang.client.http import served_model
    from step_sglang.client.sampling import Sampling
    from step_sglang.data.questions import Fields, load_questions, load_traces
    from step_sglang.training import collect as work
    from step_sglang.training.prompts import load_prompter
    from step_sglang.training.store import Writer
    from step_sglang.training.stored import DTYPES, StoreMeta

    _one_of("--dtype", dtype, tuple(DTYPES))
    _one_of("--scope", scope, ("thinking", "all"))
    names = Fields(question_field, answer_field, text_field)
    found = (
        load_traces(Path(source), n, names)
        if from_traces
        else load_questions(source, limit, split, config, names)
    )
    jobs = found.jobs[:limit]
    _warn(f"{found.name}: left out", found.problems)
    name, path = _model(model, url, source, served_model)
    ours = name == "reasoner"
    sampling = _given(
        Sampling(1.0, 1.0, -1, 900) if ours else Sampling(),
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    delimiters = tuple(unescape(text) for text in delimiter or ["\\n\\n"])
    if suffix is None:
        suffix = "" if ours else "\nPut the final answer within \\boxed{}."
    prompter = load_prompter(path, delimiters, scope == "all", suffix)
    measured = {} if from_traces else asdict(sampling)
    meta = StoreMeta(
        model=name,
        hidden_size=prompter.hidden_size,
        n=len(jobs[0].traces) if from_traces else n or 64,
        source=("traces " if from_traces else "") + found.name,
        sampling={**measured, "top_logprobs": top_logprobs, "suffix": suffix},
        delimiters=delimiters,
        think_end="</think>" if prompter.think_end is not None else None,
        dtype=dtype,
        confidence_window=confidence_window or (20 if ours else 2048),
    )
    settings = work.CollectSettings(sampling, top_logprobs, concurrency, timeout, keep_text)
    with Writer(store, meta) as writer:
        _warn("repaired", writer.repairs)
        left = sum(job.id not in writer.done for job in jobs)
        err.print(f"{len(jobs)} questions, {len(jobs) - left} in {store} already")
        if not left:
            return
        with _server(url, path, delimiters, scope == "all", server_flags or [], store) as address:
            try:
                with _bar(left) as advance:
                    done = work.collect(address, writer, jobs, prompter, settings, advance)
            except KeyboardInterrupt:
                kept = len(writer.done)
                err.print(f"stopped; {kept} questions are in {store}, run again to go on")
                raise SystemExit(130) from None
    _warn("refused", done.refused)
    share = done.correct / max(1, done.traces)
    out.print(f"{store}: {done.questions} questions, {done.traces} traces, {share:.1%} correct")


@app.command()
def train(
    store: Annotated[Path, typer.Argument(help="Folder of collected traces.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for scorer and figures.")],
    objective: Annotated[str, typer.Option(help="bce (the paper's) or pairwise.")] = "bce",
    test_store: Annotated[
        Path | None, typer.Option(help="Measure on this store instead of a share of STORE.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Share of questions.")] = 0.15,
    test: Annotated[float, typer.Option(help="Share of questions.")] = 0.15,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    patience: Annotated[int, typer.Option(min=1)] = 5,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    seed: Annotated[int, typer.Option()] = 0,
    memory_mb: Annotated[int, typer.Option(min=1, help="Of hidden states at a time.")] = 512,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    dtype: Annotated[
        str, typer.Option(help="Of W1 in the file: bfloat16, or float32, twice as long to read.")
    ] = "bfloat16",
    skip_bad_shards: Annotated[
        bool, typer.Option("--skip-bad-shards", help="Leave damaged shards out.")
    ] = False,
) -> None:
    """Train a scorer on a store; write it with its figures and plots."""
    import torch

    from step_sglang.training.fit import Epoch, Recipe
    from step_sglang.training.train import Shares, train_scorer

    torch.set_num_threads(threads)
    recipe = Recipe(
        objective=objective, learning_rate=learning_rate, epochs=epochs, patience=patience,
        seed=seed, memory_mb=memory_mb, dtype=dtype,
    )  # fmt: skip

    def show(number: int, epoch: Epoch) -> None:
        err.print(
            f"epoch {number:2}  loss {epoch.loss:.4f}  validation: step AUC {epoch.step_auc:.3f}, "
            f"within the question {epoch.within:.3f}",
            highlight=False,
        )

    trained = train_scorer(
        store, folder, recipe, Shares(validation, test), test_store, skip_bad_shards, show
    )
    _show_evaluation(trained.test, trained.linear_probe)
    out.print(f"kept epoch {trained.fitted.best_epoch}; wrote {trained.scorer}", highlight=False)


@app.command()
def inspect(
    scorer: Annotated[Path, typer.Argument(help="A scorer file.")],
    on: Annotated[
        Path | None, typer.Option(help="Measure it on all questions of this store.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a scorer was trained on, for which model, and its figures."""
    from step_sglang.scoring.scorer import load_scorer
    from step_sglang.training.train import evaluate_file, jsonable

    loaded = load_scorer(scorer)
    info: dict[str, Any] = {
        "model": loaded.info.model,
        "hidden_size": loaded.hidden_size,
        "weights": str(loaded.w1.dtype).removeprefix("torch."),
        "delimiters": list(loaded.info.delimiters),
        "think_end": loaded.info.think_end,
        "training": loaded.info.training,
    }
    evaluation = evaluate_file(scorer, on) if on else None
    if as_json:
        print(json.dumps({**info, "measured": jsonable(evaluation)}, indent=2))
        return
    for key, value in info.items():
        shown = json.dumps(value, indent=2) if isinstance(value, dict) else repr(value)
        out.print(f"{key}: {shown if value else 'unknown'}", highlight=False, markup=False)
    if evaluation is not None:
        _show_evaluation(evaluation, None)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The reference's .pt file, or a scorer of ours.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    model: Annotated[str, typer.Option(help="The model the scorer was trained for.")],
    delimiter: Annotated[list[str] | None, typer.Option(help=_DELIMITER_HELP)] = None,
    think_end: Annotated[str | None, typer.Option(help="Token that ends the thinking.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET.")] = False,
) -> None:
    """Convert the reference implementation's scorer to our format."""
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
    try:
        save_scorer(replace(scorer, info=info), target)
    except Exception as error:
        raise ScorerError(f"cannot write {target}: {error}") from error
    out.print(f"wrote {target}: hidden size {scorer.hidden_size}, for {model}", highlight=False)


def _model(model: str | None, url: str | None, source: str, served_model: Any) -> tuple[str, str]:
    """The model's name and where its tokenizer is."""
    from step_sglang.reasoner import model_path

    if model is None and url is not None:
        served = served_model(url)
        model = "reasoner" if Path(served).resolve() == model_path().resolve() else served
    if model is None and source.startswith("reasoner:"):
        model = "reasoner"
    if model is None:
        raise SourceError("give --model, the model to sample from, or --url, a running server")
    return model, str(model_path()) if model == "reasoner" else model


@contextmanager
def _server(
    url: str | None,
    path: str,
    delimiters: tuple[str, ...],
    scope_all: bool,
    flags: list[str],
    store: Path,
) -> Iterator[str]:
    """The URL of the user's server, or of one that is started now and stopped at the end."""
    from step_sglang.client.launch import capture_flags, running_server

    if url is not None:
        yield url
        return
    log = store / "server.log"
    with ExitStack() as stack:
        with err.status("starting the server ..."):
            more = [*capture_flags(delimiters, scope_all), *flags]
            address = stack.enter_context(running_server(path, more, log))
        try:
            yield address
        except ServerError as error:
            raise ServerError(f"{error}. Its log: {log}") from error


def _given(sampling: Any, **options: Any) -> Any:
    return replace(sampling, **{k: v for k, v in options.items() if v is not None})


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SourceError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")


def _warn(title: str, lines: tuple[str, ...], shown: int = 5) -> None:
    for line in lines[:shown]:
        err.print(f"{title}: {line}", style="yellow", highlight=False, markup=False)
    if len(lines) > shown:
        err.print(f"{title}: {len(lines) - shown} more", style="yellow", highlight=False)


@contextmanager
def _bar(questions: int) -> Iterator[Any]:
    from step_sglang.training.collect import CollectProgress as Step

    bar = Progress(
        TextColumn("{task.completed}/{task.total} questions"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )
    with bar:
        task = bar.add_task("", total=questions, rate="")

        def advance(step: Step) -> None:
            seconds = bar.tasks[0].elapsed or 1e-9
            rate = f"{step.traces / seconds:.1f} traces/s, {step.correct / step.traces:.0%} correct"
            bar.update(task, completed=step.questions, rate=rate)

        yield advance


def _show_evaluation(test: Any, linear_probe: Any) -> None:
    table = Table("AUC within the question", *(f"{f:.0%}" for f in (0.25, 0.5, 0.75, 1.0)))
    rows = dict(test.ranking)
    if linear_probe is not None:
        rows["logistic regression"] = linear_probe.ranking["running mean"]
    for name, at in rows.items():
        cells = [
            f"{r.auc_within.value:.3f} [{r.auc_within.low:.3f}, {r.auc_within.high:.3f}]"
            for r in at.values()
        ]
        table.add_row(name, *cells)
    out.print(table)
    votes = Table("vote", "accuracy", "minus self-consistency")
    for name, vote in test.votes.items():
        lead = f"{vote.lead.value:+.1%} [{vote.lead.low:+.1%}, {vote.lead.high:+.1%}]"
        votes.add_row(name, f"{vote.accuracy.value:.1%}", lead)
    out.print(votes)
    pooled = test.ranking["running mean"][1.0].auc.value
    out.print(
        f"{test.questions} test questions ({test.mixed_questions} with both kinds), {test.traces} "
        f"traces, {test.accuracy:.1%} correct; pooled AUC {test.step_auc:.3f} of a step, "
        f"{pooled:.3f} of a trace",
        highlight=False,
    )
    if test.traces_without_steps:
        err.print(f"{test.traces_without_steps} traces have no step and are not ranked")
