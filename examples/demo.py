"""Watch STEP prune and vote, then compare it with self-consistency on the same server.

Starts a real SGLang server with the embedded reasoner and its scorer, on the CPU where there is no
GPU, in a KV pool that cannot hold all traces of a question. First one question is shown trace by
trace; then both methods answer the same questions in turn. Self-consistency is what the same
server does for a request that opts out: stock SGLang.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from step_sglang.cli.watch import write_page
from step_sglang.client.http import AsyncClient, Client, server_info
from step_sglang.client.launch import running_server
from step_sglang.live.events import decode
from step_sglang.live.known import Known
from step_sglang.protocol import DEFAULT_VOTE
from step_sglang.reasoner import Question, model_path, questions, scorer_path
from step_sglang.scoring.calibration import calibration_of
from step_sglang.voting.answers import equivalent, extract_boxed
from step_sglang.voting.tally import Ballot, Tally, tally, weight_of

console = Console(soft_wrap=False)


@dataclass(frozen=True)
class Answered:
    """One question answered by one method."""

    question: Question
    traces: list[dict[str, Any]]  # the last chunk of each
    seconds: float

    @property
    def infos(self) -> list[dict[str, Any]]:
        return [trace["meta_info"] for trace in self.traces]

    @property
    def pruned(self) -> int:
        return sum(is_pruned(trace) for trace in self.traces)

    @property
    def tokens(self) -> int:
        return sum(info["completion_tokens"] for info in self.infos)

    @property
    def tallies(self) -> list[Tally]:
        """Weighted by the odds of being right, or one vote each where there are no scores."""
        return tally(
            [
                Ballot(answer, weight(trace))
                for trace in self.traces
                if not is_pruned(trace) and (answer := extract_boxed(trace["text"])) is not None
            ]
        )

    @property
    def is_right(self) -> bool:
        tallies = self.tallies
        return bool(tallies) and equivalent(tallies[0].answer, self.question.answer)


def weight(trace: dict[str, Any]) -> float:
    step = trace["meta_info"].get("step")
    if step is None:
        return 1.0
    return weight_of(step["score"], DEFAULT_VOTE, calibration_of(step.get("calibration")))


def is_pruned(trace: dict[str, Any]) -> bool:
    return bool(trace["meta_info"].get("step", {}).get("pruned"))


async def answer(
    client: AsyncClient,
    question: Question,
    options: argparse.Namespace,
    step: bool,
    group: dict[str, Any] | None = None,
) -> Answered:
    """Stream n traces of one question as one group, with a progress line."""
    said = {"step": group} if step else {"step": False}
    body = {
        "input_ids": await client.render([{"role": "user", "content": question.question}]),
        "sampling_params": {
            "n": options.n,
            "temperature": 1.0,
            "max_new_tokens": options.max_new_tokens,
            "skip_special_tokens": False,
            "custom_params": said,
        },
    }
    last: dict[int, dict[str, Any]] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    started = time.perf_counter()
    with bar:
        task = bar.add_task("", total=options.n)
        async for chunk in client.stream(body):
            last[chunk["index"]] = chunk
            ended = sum(t["meta_info"]["finish_reason"] is not None for t in last.values())
            pruned = sum(is_pruned(t) for t in last.values())
            tokens = sum(t["meta_info"]["completion_tokens"] for t in last.values())
            bar.update(
                task,
                completed=ended,
                description=f"{'STEP' if step else 'self-consistency'}: {len(last) - ended} "
                f"running, {ended - pruned} finished, {pruned} pruned, {tokens} tokens",
            )
    seconds = time.perf_counter() - started
    return Answered(question, [last[index] for index in sorted(last)], seconds)


def show_question(found: Answered, pool: int, log: str) -> None:
    """Every trace's steps, score, tokens, fate and answer; the memory; the vote."""
    table = Table("trace", "steps", "score", "tokens", "fate", "answer")
    for index, trace in enumerate(found.traces):
        info = trace["meta_info"]
        step = info["step"]
        fate = "[red]pruned" if step["pruned"] else f"[green]{info['finish_reason']['type']}"
        score = "-" if step["score"] is None else f"{step['score']:.3f}"
        boxed = "" if step["pruned"] else extract_boxed(trace["text"]) or "none"
        tokens = str(info["completion_tokens"])
        table.add_row(str(index), str(step["num_steps"]), score, tokens, fate, boxed)
    console.print(table)

    used = [int(tokens) for tokens in re.findall(r"pool_used=(\d+)/", log)]
    freed = [int(tokens) for tokens in re.findall(r"tokens_freed=(\d+)", log)]
    peak = max((u + f for u, f in zip(used, freed, strict=True)), default=None)
    # The log of a server at --url is not here.
    memory = "" if peak is None else f", peak use {peak}"
    if not found.pruned:
        memory = ", never full"
    console.print(
        f"{len(found.traces)} traces, {found.tokens} tokens in {found.seconds:.1f} s; KV pool of "
        f"{pool}{memory}; {found.pruned} pruned, "
        f"{sum(info['num_retractions'] for info in found.infos)} retracted"
    )
    tallies = found.tallies
    total = sum(t.weight for t in tallies)
    for t in tallies[:4]:
        console.print(
            f"  answer {t.answer}: {t.count} trace{'s'[: t.count != 1]}, "
            f"{t.weight / total:.0%} of the weight"
        )
    if tallies:
        verdict = "right" if found.is_right else "wrong"
        console.print(f"[bold]vote: {tallies[0].answer}[/bold] ({verdict})\n")
    else:
        console.print("vote: no finished trace has an answer\n")


def show_comparison(answered: dict[str, list[Answered]]) -> None:
    """Both methods over the same questions."""
    table = Table("", *answered)
    rows = {
        "questions right": lambda runs: f"{sum(r.is_right for r in runs)} of {len(runs)}",
        "tokens a question": lambda runs: f"{statistics.mean(r.tokens for r in runs):.0f}",
        "seconds a question": lambda runs: f"{statistics.mean(r.seconds for r in runs):.1f}",
        "mean wait of a trace, s": lambda runs: f"{statistics.mean(waits(runs)):.2f}",
        "longest wait, s": lambda runs: f"{max(waits(runs)):.2f}",
        "traces pruned a question": lambda runs: f"{statistics.mean(r.pruned for r in runs):.1f}",
        "retractions": lambda runs: str(sum(i["num_retractions"] for r in runs for i in r.infos)),
    }
    for name, value in rows.items():
        table.add_row(name, *(value(runs) for runs in answered.values()))
    console.print(table)
    one, other = (sum(r.seconds for r in runs) for runs in answered.values())
    console.print(f"STEP took {other / one:.0%} of the time of self-consistency.")


def waits(runs: list[Answered]) -> list[float]:
    """Seconds that each trace spent in the waiting queue, by the server's own clock."""
    return [info["queue_time"] for run in runs for info in run.infos]


async def answer_and_keep(
    client: AsyncClient, question: Question, options: argparse.Namespace, url: str
) -> Answered:
    """One question with STEP, and a page that replays how it was answered."""
    known, over = Known(), threading.Event()

    def look() -> None:
        with Client(url, timeout=30) as viewer:
            for update in viewer.feed():
                known.apply(decode(update))
                looking.set()
                if over.is_set():
                    return

    looking = threading.Event()
    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    await asyncio.to_thread(looking.wait, 10)
    # A name to know it by; its text may be shown, as nobody else asked anything here.
    named = {"group": question.question, "show_text": True}
    found = await answer(client, question, options, step=True, group=named)
    await asyncio.sleep(0.5)  # what happened last is told a moment later
    over.set()
    await asyncio.to_thread(looker.join, 10)
    write_page(options.page, known)
    return found


async def show_all(url: str, options: argparse.Namespace, log: Path | None) -> None:
    """One question trace by trace, then both methods on several."""
    asked = questions("test", max(1, options.questions), seed=1)
    async with AsyncClient(url, timeout=600) as client:
        console.print(f"\n[bold]{asked[0].question}[/bold]   (answer: {asked[0].answer})\n")
        found = await answer_and_keep(client, asked[0], options, url)
        text = "" if log is None else log.read_text(errors="replace")
        show_question(found, server_info(url)["max_total_num_tokens"], text)
        console.print(f"the page that replays it: {options.page.resolve()}\n", soft_wrap=True)
        answered: dict[str, list[Answered]] = {"self-consistency": [], "STEP": []}
        for number, question in enumerate(asked[: options.questions]):
            methods = list(answered) if number % 2 else list(reversed(answered))
            for method in methods:  # in turn, so that a slow moment hits both
                await client.flush()
                run = await answer(client, question, options, step=method == "STEP")
                answered[method].append(run)
                console.print(
                    f"question {number + 1} of {options.questions}, {method}: "
                    f"{'right' if run.is_right else 'wrong'}, {run.seconds:.1f} s"
                )
    if options.questions:
        show_comparison(answered)


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=32, help="traces (default 32)")
    parser.add_argument("--pool", type=int, default=2048, help="KV pool in tokens (default 2048)")
    parser.add_argument("--questions", type=int, default=6, help="to compare on (default 6)")
    parser.add_argument("--max-new-tokens", type=int, default=900)
    parser.add_argument(
        "--page", type=Path, default=Path("demo.html"), help="where the replay is written"
    )
    parser.add_argument(
        "--url",
        help="a server of the embedded reasoner with --enable-metrics, instead of a new one",
    )
    options = parser.parse_args()
    console.print(
        "The embedded reasoner, a model of one million parameters, answers arithmetic questions on "
        "this machine, first with STEP, then by self-consistency too. Two to four minutes."
    )
    if options.url:
        asyncio.run(show_all(options.url, options, None))
        return
    flags = ["--enable-step", "--step-scorer", str(scorer_path())]
    flags += ["--max-total-tokens", str(options.pool), "--max-running-requests", "256"]
    flags += ["--enable-metrics"]  # for the waiting times in the answers
    flags += ["--step-log", "each"]  # what the pool held when a trace was pruned is read there
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        console.print("[dim]sglang serve --model-path", model_path(), *flags)
        console.print("starting the server (half a minute on an idle machine) ...")
        with running_server(str(model_path()), flags, log) as url:
            asyncio.run(show_all(url, options, log))
    command = Path(sys.executable).with_name("step-sglang")
    console.print(f"\nServe the same model, and ask it: {command} serve reasoner", soft_wrap=True)


if __name__ == "__main__":
    main()
