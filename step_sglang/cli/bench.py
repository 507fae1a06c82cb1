"""`step-sglang bench`: methods side by side on one engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from step_sglang.cli.common import (
    MEMORY,
    METHODS,
    MODEL,
    OUTPUT,
    QUESTIONS,
    RUNNING,
    SAMPLING,
    SCORER_HELP,
    SUFFIX_HELP,
    err,
    numbers,
    progress_bar,
    resolve_model,
    warn,
)
from step_sglang.cli.report import show_report
from step_sglang.evaluation.errors import BenchError

if TYPE_CHECKING:
    from step_sglang.evaluation.setup import BenchOptions
    from step_sglang.evaluation.trial_result import TrialResult


def bench(
    dataset: Annotated[
        str,
        typer.Option(
            help="aime-25, hmmt-24, hmmt-25, gpqa-diamond, a JSON-lines file of question and "
            "answer, a Hugging Face data set, or reasoner:test.",
            rich_help_panel=QUESTIONS,
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel=OUTPUT)
    ],
    server_flags: Annotated[
        list[str] | None, typer.Argument(help="After `--`: more flags for the servers.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many questions.", rich_help_panel=QUESTIONS),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of JSON-lines files of the named data sets.", rich_help_panel=QUESTIONS
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a Hugging Face data set.", rich_help_panel=QUESTIONS)
    ] = "train",
    question_field: Annotated[str, typer.Option(rich_help_panel=QUESTIONS)] = "question",
    answer_field: Annotated[str, typer.Option(rich_help_panel=QUESTIONS)] = "answer",
    question_seed: Annotated[
        int, typer.Option(help="Of reasoner questions.", rich_help_panel=QUESTIONS)
    ] = 2,
    suffix: Annotated[str | None, typer.Option(help=SUFFIX_HELP, rich_help_panel=QUESTIONS)] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: cot, sc, sc-early, sc-exact, slim-sc (slim-sc-diversity), "
            "slim-sc-random, deepconf (deepconf-low), deepconf-high, random, random-balanced, "
            "random-fast, longest, step-paper, step, step-early, step-exact, step-balanced, "
            "step-fast, step-refill, step-refill-random, gambit.",
            rich_help_panel=METHODS,
        ),
    ] = "cot,sc,sc-early,slim-sc,deepconf,random,longest,step-paper,step,step-early",
    n: Annotated[
        str,
        typer.Option("--n", help="Traces per question; comma-separated.", rich_help_panel=METHODS),
    ] = "64",
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a DeepConf group. Default: 2048; reasoner 20.",
            rich_help_panel=METHODS,
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=1, help="DeepConf's warm-up traces.", rich_help_panel=METHODS)
    ] = 16,
    tau: Annotated[
        float,
        typer.Option(
            "--deepconf-tau",
            min=0,
            max=1,
            help="Share of the vote at which DeepConf stops sampling; 0 = it samples all traces.",
            rich_help_panel=METHODS,
        ),
    ] = 0.95,
    slim_delay: Annotated[
        int | None,
        typer.Option(
            help="Steps before Slim-SC compares a trace. Default: 20; reasoner 5.",
            rich_help_panel=METHODS,
        ),
    ] = None,
    slim_similarity: Annotated[
        float, typer.Option(help="Slim-SC's threshold.", rich_help_panel=METHODS)
    ] = 0.95,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Also sample complete traces in a large pool and keep all of them, for `replay`.",
            rich_help_panel=METHODS,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model path or name, or `reasoner`.", rich_help_panel=MODEL),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help=f"The model's scorer: {SCORER_HELP}. Default: the reasoner's own.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server; without it they are started and stopped.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="KV pool in tokens, comma-separated, or auto: a quarter of SC's traces at their "
            "mean length.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    mem_fraction: Annotated[
        str | None,
        typer.Option(help="Instead: shares of memory, comma-separated.", rich_help_panel=MEMORY),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Default: 0.6; Phi-4 0.8; reasoner 1.0.", rich_help_panel=SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Default: 0.95; reasoner 1.0.", rich_help_panel=SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Default: 20; Phi-4 50; reasoner -1, off.", rich_help_panel=SAMPLING),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: 32768; reasoner 900.", rich_help_panel=SAMPLING)
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Of everything.", rich_help_panel=RUNNING)
    ] = 1,
    shard: Annotated[
        str,
        typer.Option(
            help="K/M: only every M-th question, for processes side by side.",
            rich_help_panel=RUNNING,
        ),
    ] = "1/1",
    watch: Annotated[
        float,
        typer.Option(
            help="Seconds between two looks at the pool; 0 = none.", rich_help_panel=RUNNING
        ),
    ] = 0.5,
    timeout: Annotated[
        float, typer.Option(help="Seconds without an answer.", rich_help_panel=RUNNING)
    ] = 3600.0,
) -> None:
    """Measure methods side by side on one engine: accuracy, tokens, latency. Resumable."""
    from step_sglang.evaluation.setup import BenchOptions

    name, path = resolve_model(model, url, dataset, BenchError)
    options = BenchOptions(
        dataset=dataset, model=name, path=path, methods=methods, ns=numbers("--n", n),
        repeats=repeats, limit=limit, shard=shard, url=url, scorer=scorer,
        server_flags=tuple(server_flags or ()), pool=pool, mem_fraction=mem_fraction,
        data_dir=data_dir, split=split, question_field=question_field, answer_field=answer_field,
        question_seed=question_seed, suffix=suffix, temperature=temperature, top_p=top_p,
        top_k=top_k, max_new_tokens=max_new_tokens, window=window, warmup=warmup,
        tau=tau, slim_delay=slim_delay, slim_similarity=slim_similarity, record=record,
        watch=watch, timeout=timeout,
    )  # fmt: skip
    _run(options, folder)


def _run(options: BenchOptions, folder: Path) -> None:
    """Measure what the folder lacks, and show the report."""
    from step_sglang.evaluation.machine import remember_machine
    from step_sglang.evaluation.results import ResultWriter
    from step_sglang.evaluation.setup import measure, num_left, set_up, with_pool

    setup = set_up(options, _say)
    warn("", setup.problems)
    refused: tuple[str, ...] = ()
    with ResultWriter(folder, setup.meta) as writer:
        warn("repaired", writer.repairs)
        plan = with_pool(setup, folder, _say)
        remember_machine(folder, options.url)
        left = num_left(plan, writer)
        methods = ", ".join(method.name for method in plan.methods)
        _say(
            f"{len(plan.jobs)} questions, {methods}: {left} runs to do, {len(writer.done)} in "
            f"{folder} already"
        )
        if left:
            before = len(writer.done)
            try:
                with progress_bar(left, "runs") as bar:

                    def advance(result: TrialResult) -> None:
                        verdict = "right" if result.correct else "wrong"
                        bar(
                            len(writer.done) - before,
                            f"repeat {result.repeat + 1}, {result.method} n={result.n}: "
                            f"{verdict}, latency {result.latency:.1f} s",
                        )

                    refused = measure(setup, plan, writer, advance, _say)
            except KeyboardInterrupt:
                _say(f"stopped; {len(writer.done)} results are in {folder}, run again to go on")
                raise SystemExit(130) from None
    if setup.has_methods and (writer.done or not refused):
        show_report([folder], folder)
    if refused:
        shown = "".join(f"\n  {one}" for one in refused[:20])
        raise BenchError(f"the server refused {len(refused)} runs, which were left out:{shown}")


def _say(text: str) -> None:
    err.print(text, markup=False, highlight=False)
