"""Many questions at once on the embedded reasoner: all groups at once, or as many as keep a vote.

One server per limit (`--step-max-groups`) stands beside the others, with the same pool and seed;
they take turns, round by round, in changing order, on the same new questions. Prints, per limit:
questions right, how long a question took and all of them, how many groups ran at once (from each
trace's time in the queue), traces that finished, and tokens.

    python bench/bursts.py --questions 32 -n 8 --pool 8192
    python bench/bursts.py --questions 8 -n 64 --pool 16384
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from step_sglang.evaluation.stats import compare  # noqa: E402
from step_sglang.reasoner import Question, model_path, questions, scorer_path  # noqa: E402
from step_sglang.voting.answers import equivalent, extract_boxed  # noqa: E402
from step_sglang.voting.tally import Ballot, tally, weight_of  # noqa: E402
from tests.server.launch import Server, serve  # noqa: E402


@dataclass(frozen=True)
class Answered:
    """One question of a burst."""

    right: bool
    finished: int  # traces
    tokens: int
    began: float  # seconds after the burst began
    ended: float


def ask(
    server: Server, question: Question, options: argparse.Namespace, started: float
) -> Answered:
    """Send one question as one group."""
    rendered = requests.post(
        f"{server.url}/v1/tokenize",
        json={"messages": [{"role": "user", "content": question.question}]},
        timeout=60,
    ).json()
    sent = time.perf_counter() - started
    traces: list[dict[str, Any]] = server.generate(
        input_ids=rendered["tokens"],
        sampling_params={
            "n": options.n,
            "temperature": 1.0,
            "max_new_tokens": options.max_new_tokens,
            "skip_special_tokens": False,
        },
    )
    ended = time.perf_counter() - started
    kept = [trace for trace in traces if not trace["meta_info"]["step"]["pruned"]]
    tallies = tally(
        [
            Ballot(answer, weight_of(trace["meta_info"]["step"]["score"], "weighted"))
            for trace in kept
            if (answer := extract_boxed(trace["text"])) is not None
        ]
    )
    return Answered(
        bool(tallies) and equivalent(tallies[0].answer, question.answer),
        len(kept),
        sum(trace["meta_info"]["completion_tokens"] for trace in traces),
        sent + min(trace["meta_info"]["queue_time"] for trace in traces),
        ended,
    )


def burst(server: Server, asked: Sequence[Question], options: argparse.Namespace) -> list[Answered]:
    """All questions at once."""
    requests.post(f"{server.url}/flush_cache", timeout=60).raise_for_status()
    found: list[Answered | None] = [None] * len(asked)
    started = time.perf_counter()

    def run(place: int) -> None:
        found[place] = ask(server, asked[place], options, started)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in found if answer is not None]


def at_once(answers: Sequence[Answered]) -> float:
    """Groups that ran at once, averaged over the burst."""
    busy = sum(answer.ended - answer.began for answer in answers)
    return busy / max(answer.ended for answer in answers)


def row(limit: str, bursts: list[list[Answered]]) -> str:
    """One line of the table."""
    answers = [answer for answers in bursts for answer in answers]
    latencies = sorted(answer.ended for answer in answers)
    return (
        f"{limit:>7}{sum(a.right for a in answers):8} of {len(answers):<5}"
        f"{statistics.mean(latencies):9.1f}{latencies[int(len(latencies) * 0.9)]:8.1f}"
        f"{statistics.mean(max(a.ended for a in burst) for burst in bursts):8.1f}"
        f"{statistics.mean(map(at_once, bursts)):10.1f}"
        f"{statistics.mean(a.finished for a in answers):10.1f}"
        f"{min(a.finished for a in answers):6}"
        f"{sum(a.tokens for a in answers) / len(bursts):10.0f}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=32, help="at once")
    parser.add_argument("-n", type=int, default=8, help="traces of each")
    parser.add_argument("--pool", type=int, default=8192, help="KV tokens")
    parser.add_argument("--max-new-tokens", type=int, default=900)
    parser.add_argument("--limits", nargs="+", default=["off", "auto"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="of the questions and the servers")
    options = parser.parse_args()

    asked = questions("test", options.questions * options.rounds, seed=options.seed)
    bursts: dict[str, list[list[Answered]]] = {limit: [] for limit in options.limits}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            limit: stack.enter_context(
                serve(
                    model_path(),
                    *("--enable-step", "--step-scorer", str(scorer_path()), "--enable-metrics"),
                    *("--max-total-tokens", str(options.pool)),
                    *("--max-running-requests", str(options.questions * options.n)),
                    *("--step-max-groups", limit, "--random-seed", str(options.seed)),
                    log=Path(folder) / f"{limit}.log",
                    SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY="0",
                )
            )
            for limit in options.limits
        }
        for server in servers.values():  # warm up
            burst(server, questions("train", 2, seed=options.seed), options)
        for number in range(options.rounds):
            some = asked[number * options.questions :][: options.questions]
            order = list(servers) if number % 2 else list(reversed(servers))
            for limit in order:
                bursts[limit].append(burst(servers[limit], some, options))
    print(
        f"{options.questions} questions at once, {options.n} traces each, pool of {options.pool} "
        f"tokens, {options.rounds} bursts: {' '.join(sys.argv)}"
    )
    print(
        f"{'limit':>7}{'right':>16}{'s mean':>9}{'90 %':>8}{'burst':>8}{'at once':>10}"
        f"{'finished':>10}{'least':>6}{'tokens':>10}"
    )
    for limit in options.limits:
        print(row(limit, bursts[limit]))
    right = {
        limit: {
            question.question: [float(answer.right)]
            for question, answer in zip(asked, chain(*found), strict=True)
        }
        for limit, found in bursts.items()
    }
    for limit in options.limits[1:]:
        paired = compare(right[limit], right[options.limits[0]])
        assert paired is not None
        gain = paired.difference
        print(
            f"{limit} against {options.limits[0]}: {100 * gain.value:+.1f} points "
            f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], p = {paired.p_value:.3g}"
        )


if __name__ == "__main__":
    main()
