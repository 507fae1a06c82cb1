"""`step-sglang bench`, `report` and `replay` on the command line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from step_sglang import __version__
from step_sglang.evaluation.errors import BenchError

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_QUESTION_SEED = 2  # reasoner questions that neither its card (0) nor the demo (1) has looked at


def bench(
    dataset: Annotated[
        str,
        typer.Option(
            help="aime-25, hmmt-24, hmmt-25, gpqa-diamond, a JSON-lines file of question and "
            "answer, a Hugging Face data set, or reasoner:test."
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")],
    server_flags: Annotated[
        list[str] | None, typer.Argument(help="After `--`: more flags for the servers.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "cot,sc,slim-sc,deepconf,step-paper,step"
    ),
    n: Annotated[str, typer.Option("--n", help="Traces per question; comma-separated.")] = "64",
    repeats: Annotated[int, typer.Option(min=1, help="Of everything.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions.")] = None,
    shard: Annotated[
        str, typer.Option(help="K/M: only every M-th question, for processes side by side.")
    ] = "1/1",
    url: Annotated[
        str | None, typer.Option(help="A running server; without it they are started and stopped.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model path or name, or `reasoner`.")] = None,
    scorer: Annotated[Path | None, typer.Option(help="The model's scorer.")] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="KV pool in tokens, comma-separated, or auto: a quarter of SC's traces at their "
            "mean length."
        ),
    ] = None,
    mem_fraction: Annotated[
        str | None, typer.Option(help="Instead: shares of memory, comma-separated.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of JSON-lines files of the named data sets.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "train",
    question_field: Annotated[str, typer.Option()] = "question",
    answer_field: Annotated[str, typer.Option()] = "answer",
    question_seed: Annotated[int, typer.Option(help="Of reasoner questions.")] = _QUESTION_SEED,
    suffix: Annotated[
        str | None, typer.Option(help=r"Appended to each question. Default: asks for \boxed{}.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0.6; Phi-4 0.8; reasoner 1.0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="0.95; reasoner 1.0.")] = None,
    top_k: Annotated[int | None, typer.Option(help="20; Phi-4 50; reasoner -1 (off).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="32768; reasoner 900.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a DeepConf group. 2048; reasoner 20.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=1, help="DeepConf's warm-up traces.")] = 16,
    slim_delay: Annotated[
        int | None, typer.Option(help="Steps before Slim-SC compares a trace. 20; reasoner 5.")
    ] = None,
    slim_similarity: Annotated[float, typer.Option(help="Slim-SC's threshold.")] = 0.95,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Also sample complete traces in a large pool and keep all of them, for `replay`.",
        ),
    ] = False,
    watch: Annotated[
        float, typer.Option(help="Seconds between two looks at the pool; 0 = none.")
    ] = 0.5,
    timeout: Annotated[float, typer.Option(help="Seconds without an answer.")] = 3600.0,
) -> None:
    """Measure methods side by side on one engine: accuracy, tokens, latency. Resumable."""
    from step_sglang.data.questions import REASONER, Fields, load_questions
    from step_sglang.evaluation.methods import RECORD, MethodSettings, methods_named
    from step_sglang.evaluation.pilot import measured_lengths
    from step_sglang.evaluation.profiles import profile_of
    from step_sglang.evaluation.results import ResultWriter
    from step_sglang.evaluation.run import Bench, Plan, blocks

    chosen = methods_named(methods) if methods else ()
    if record:
        chosen = (*chosen, RECORD)
    if not chosen:
        raise BenchError("--methods names none, and without --record there is nothing to do")
    sizes = _numbers("--n", n)
    fields = Fields(question_field, answer_field)
    endless = dataset.startswith(f"{REASONER}:")
    # All of a set, so that it is the same set whatever the limit is.
    found = load_questions(
        dataset, limit if endless else None, split,
        fields=fields, seed=question_seed, data_dir=data_dir,
    )  # fmt: skip
    for problem in found.problems[:5]:
        err.print(f"{found.name}: left out: {problem}", style="yellow", markup=False)
    jobs = found.jobs[:limit]
    name, path = _model(model, url, dataset)
    profile = profile_of(name)
    sampling = replace(
        profile.sampling,
        **_given(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens),
    )
    settings = MethodSettings(
        window=window or profile.window,
        warmup=warmup,
        similarity=slim_similarity,
        delay=profile.delay if slim_delay is None else slim_delay,
    )
    asked = suffix if suffix is not None else ("" if profile.bare else _SUFFIX)
    served_model = _served(path, scorer, profile, server_flags or [])
    memories = _memories(pool, mem_fraction, url, max(sizes), profile, shard)
    plan = Plan(
        jobs=_shard(shard, jobs),
        methods=chosen,
        ns=sizes,
        repeats=repeats,
        memories=memories or (),
        sampling=sampling,
        settings=settings,
        suffix=asked,
        watch_interval=watch,
        timeout=timeout,
    )
    meta = {
        "model": name,
        "dataset": dataset,
        "question_seed": question_seed if endless else None,
        "questions": None if endless else _fingerprint(found.jobs),
        "split": split,
        "fields": [question_field, answer_field],
        "package": __version__,
        "sampling": asdict(sampling),
        "settings": asdict(settings),
        "suffix": asked,
        "scorer": served_model.scorer if scorer else None,
        "server_flags": list(server_flags or []),
    }
    refused: tuple[str, ...] = ()
    with ResultWriter(folder, meta) as writer:
        if memories is None:
            lengths = measured_lengths(served_model, jobs, sampling, asked, folder)
            plan = replace(plan, memories=_quarter(lengths, max(sizes)))
        for repair in writer.repairs:
            err.print(f"repaired: {repair}", style="yellow", markup=False)
        left = sum(len(block.trials) for block in blocks(plan, writer.done))
        err.print(
            f"{len(plan.jobs)} questions, {', '.join(m.name for m in chosen)}: {left} runs to do, "
            f"{len(writer.done)} in {folder} already",
            highlight=False,
        )
        if left:
            running = max(256, *sizes)
            serve = _servers(url, served_model, running, folder)
            try:
                with _bar(left) as report_one:
                    refused = Bench(plan, writer, serve, report_one).run()
            except KeyboardInterrupt:
                err.print(
                    f"stopped; {len(writer.done)} results are in {folder}, run again to go on"
                )
                raise SystemExit(130) from None
    if methods and (writer.done or not refused):
        report([folder])
    if refused:
        shown = "".join(f"\n  {one}" for one in refused[:20])
        raise BenchError(f"the server refused {len(refused)} runs, which were left out:{shown}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `bench`, such as shards.")],
    target: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: the first.")
    ] = None,
    against: Annotated[str, typer.Option(help="The method that others are compared with.")] = "sc",
) -> None:
    """Make tables and plots of results; several folders count as one."""
    from step_sglang.evaluation.methods import methods_named
    from step_sglang.evaluation.report import write_report

    (reference,) = methods_named(against)[:1]
    written = write_report(folders, target or folders[0], reference)
    for problem in written.problems[:5]:
        err.print(problem, style="yellow", markup=False)
    out.print(written.markdown, markup=False, highlight=False)
    out.print(f"wrote {', '.join(str(file) for file in written.files)}", highlight=False)


def replay(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `bench --record`.")],
    pool: Annotated[str, typer.Option(help="KV tokens, comma-separated.")],
    policies: Annotated[str, typer.Option(help="Comma-separated; none is SC.")] = (
        "none,fair,paper,random,longest"
    ),
    votes: Annotated[str, typer.Option(help="weighted, majority, best.")] = "weighted,majority",
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Traces of a group. Default: as recorded.")
    ] = None,
    page: Annotated[int, typer.Option(min=1, help="KV tokens of a page.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Evaluate pruning policies and votes on recorded traces, in a model of the memory."""
    from step_sglang.evaluation.cost_model import fit_cost_model
    from step_sglang.evaluation.replay import predict, split_groups
    from step_sglang.evaluation.traces import load_groups
    from step_sglang.voting.verifier import AnswerVerifier

    recorded = list(
        load_groups(folders, lambda text: err.print(text, style="yellow", markup=False))
    )
    groups = split_groups(recorded, n)
    pruned = sum(not group.whole for group in recorded)
    if pruned:
        err.print(f"left out: {pruned} groups in which a trace did not end by itself")
    cost_model = fit_cost_model(recorded)
    verifier = AnswerVerifier()
    try:
        found = list(
            predict(
                groups, _names(policies), _names(votes), _numbers("--pool", pool), cost_model,
                page, verifier,
            )
        )  # fmt: skip
    finally:
        verifier.close()
    if as_json:
        for one in found:
            print(json.dumps(asdict(one)))
        return
    err.print(
        f"{len(groups)} groups of {len(groups[0].traces)} traces; a decode step takes "
        f"{cost_model.base * 1e3:.2f} ms + {cost_model.per_trace * 1e3:.3f} ms a trace + "
        f"{cost_model.per_token * 1e6:.2f} µs a token",
        highlight=False,
    )
    table = Table(
        "pool", "policy", "vote", "accuracy, %", "tokens", "pruned", "retracted", "steps",
        "waiting, %", "seconds",
    )  # fmt: skip
    for one in found:
        table.add_row(
            str(one.pool), one.policy, one.vote,
            f"{100 * one.accuracy.value:.1f} ± {100 * one.accuracy.error:.1f}",
            f"{one.tokens:.0f}", f"{one.pruned:.1f}", f"{one.retracted:.1f}", f"{one.steps:.0f}",
            f"{100 * one.wait_share:.0f}", f"{one.seconds:.2f}",
        )  # fmt: skip
    out.print(table)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise BenchError(f"{flag} takes integers such as 16,64, not {text!r}")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _shard(text: str, jobs: Any) -> Any:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise BenchError(f"--shard is K/M with K from 1 to M, such as 1/2, not {text!r}")
    return tuple(enumerate(jobs))[int(match[1]) - 1 :: int(match[2])]


def _model(model: str | None, url: str | None, dataset: str) -> tuple[str, str]:
    """The model's name, and its path."""
    from step_sglang.client.http import served_model
    from step_sglang.reasoner import model_path

    if model is None and url is not None:
        model = served_model(url)
    if model is None and dataset.startswith("reasoner:"):
        model = "reasoner"
    if model is None:
        raise BenchError("give --model, the model to measure, or --url, a running server")
    if model == "reasoner" or Path(model).resolve() == model_path().resolve():
        return "reasoner", str(model_path())
    return model, model


def _served(path: str, scorer: Path | None, profile: Any, flags: list[str]) -> Any:
    from step_sglang.evaluation.serving import Model

    if scorer is not None and not scorer.exists():
        raise BenchError(f"there is no scorer {scorer}")
    return Model(path, profile.scorer if scorer is None else str(scorer), tuple(flags))


def _memories(
    pool: str | None,
    mem_fraction: str | None,
    url: str | None,
    n: int,
    profile: Any,
    shard: str,
) -> Any:
    """What the servers shall have; None: a pool of which nobody knows yet how large it is."""
    from step_sglang.evaluation.pilot import known_lengths
    from step_sglang.evaluation.serving import parse_pool_sizes

    if url is not None and (pool or mem_fraction):
        raise BenchError("--pool and --mem-fraction are for servers that are started, not --url")
    if pool != "auto":
        return parse_pool_sizes(pool, mem_fraction)
    if mem_fraction:
        raise BenchError("--pool and --mem-fraction exclude each other")
    lengths = known_lengths(profile)
    if lengths is not None:
        return _quarter(lengths, n)
    if re.fullmatch(r"0*1/0*1", shard) is None:
        raise BenchError(
            "every shard would measure a --pool auto of its own: give --pool in tokens, such as "
            "what a run without --shard says"
        )
    return None


def _quarter(lengths: Any, n: int) -> Any:
    from step_sglang.evaluation.serving import PoolSize

    memory = PoolSize(tokens=lengths.quarter(n))
    err.print(f"--pool auto is {memory.name}", highlight=False)
    return (memory,)


def _fingerprint(jobs: Any) -> str:
    """Of all questions and answers, in their order."""
    digest = hashlib.sha256(json.dumps([(job.question, job.answer) for job in jobs]).encode())
    return digest.hexdigest()[:16]


def _servers(url: str | None, model: Any, running: int, folder: Path) -> Any:
    from step_sglang.evaluation.serving import Serving, probe_server, served

    @contextmanager
    def serve(serving: Serving) -> Iterator[Any]:
        if url is not None:
            yield probe_server(url, serving.policy)
            return
        err.print(f"starting a server: {serving.policy or 'stock'}, {serving.memory.name}")
        with served(serving, model, running, folder / "server.log") as live:
            yield live

    return serve


@contextmanager
def _bar(turns: int) -> Iterator[Any]:
    bar = Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[last]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )
    with bar:
        task = bar.add_task("", total=turns, last="")

        def advance(result: Any) -> None:
            verdict = "right" if result.correct else "wrong"
            last = (
                f"repeat {result.repeat + 1}, {result.method} n={result.n}: {verdict}, "
                f"{result.latency:.1f} s"
            )
            bar.update(task, advance=1, last=last)
            if not err.is_terminal:
                done = int(bar.tasks[0].completed)
                print(f"{done}/{turns} {last}", file=err.file, flush=True)

        yield advance
