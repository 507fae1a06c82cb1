"""Self-consistency and STEP, each with and without speculative decoding, on the embedded reasoner.

Two servers stand beside each other, one of them with drafts by NGRAM, with the same pool and seed.
Each question is asked of both, as ordinary samples (SC) and as a group that is pruned (STEP), in
changing order and with what NGRAM has learned thrown away before each. Prints the latency of a
question, the accept length (tokens that a verify pass commits) and what is right, and every pair of
methods with an interval over the questions.

    python bench/speculation.py --questions 12
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from step_sglang.reasoner import Question, model_path, questions, scorer_path  # noqa: E402
from step_sglang.voting.answers import equivalent, extract_boxed  # noqa: E402
from step_sglang.voting.tally import Ballot, tally, weight_of  # noqa: E402
from tests.server.launch import Server, serve  # noqa: E402

NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens")
METHODS = {  # whether it drafts, and whether it prunes
    "SC": (False, False),
    "SC + NGRAM": (True, False),
    "STEP": (False, True),
    "STEP + NGRAM": (True, True),
}
PAIRS = (
    ("SC + NGRAM", "SC"),
    ("STEP", "SC"),
    ("STEP + NGRAM", "STEP"),
    ("STEP + NGRAM", "SC + NGRAM"),
    ("STEP + NGRAM", "SC"),
)


@dataclass(frozen=True)
class Asked:
    """One question, asked one way."""

    seconds: float
    right: bool
    tokens: int
    accept_length: float  # NaN without drafts
    pruned: int
    retractions: int


def ask(server: Server, question: Question, options: argparse.Namespace, *, step: bool) -> Asked:
    """Send one question's samples, and vote on their answers."""
    requests.post(f"{server.url}/flush_cache", timeout=60).raise_for_status()
    rendered = requests.post(
        f"{server.url}/v1/tokenize",
        json={"messages": [{"role": "user", "content": question.question}]},
        timeout=60,
    ).json()
    sent = time.perf_counter()
    traces = server.generate(
        input_ids=rendered["tokens"],
        sampling_params={
            "n": options.n,
            "temperature": 1.0,
            "max_new_tokens": options.max_new_tokens,
            "skip_special_tokens": False,
            "custom_params": {"step": {} if step else False},
        },
    )
    seconds = time.perf_counter() - sent
    infos = [trace["meta_info"] for trace in traces]
    ballots = [
        Ballot(answer, weight_of(info["step"]["score"], "weighted") if step else 1.0)
        for trace, info in zip(traces, infos, strict=True)
        if not (step and info["step"]["pruned"])
        and (answer := extract_boxed(trace["text"])) is not None
    ]
    tallies = tally(ballots)
    drafted = [info for info in infos if info.get("spec_verify_ct")]
    passes = sum(info["spec_verify_ct"] for info in drafted)
    return Asked(
        seconds,
        bool(tallies) and equivalent(tallies[0].answer, question.answer),
        sum(info["completion_tokens"] for info in infos),
        sum(info["completion_tokens"] for info in drafted) / passes if passes else float("nan"),
        sum(bool(step and info["step"]["pruned"]) for info in infos),
        sum(info["num_retractions"] for info in infos),
    )


def row(method: str, found: list[Asked]) -> str:
    """One line of the table."""
    return (
        f"{method:>14}{statistics.median(one.seconds for one in found):10.2f}"
        f"{statistics.median(one.accept_length for one in found):9.2f}"
        f"{sum(one.right for one in found):7} of {len(found):<4}"
        f"{statistics.mean(one.tokens for one in found):9.0f}"
        f"{statistics.mean(one.pruned for one in found):8.1f}"
        f"{sum(one.retractions for one in found):8}"
    )


def ratio(method: list[float], reference: list[float], seed: int) -> str:
    """The median over questions of the paired ratio, and its interval."""
    ratios = np.asarray(method) / np.asarray(reference)
    rng = np.random.default_rng(seed)
    draws = np.median(ratios[rng.integers(0, len(ratios), (10_000, len(ratios)))], axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("-n", type=int, default=64, help="traces of each")
    parser.add_argument("--pool", type=int, default=2400, help="KV tokens")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=900)
    parser.add_argument("--seed", type=int, default=1, help="of the questions and the servers")
    options = parser.parse_args()

    found: dict[str, list[Asked]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            drafts: stack.enter_context(
                serve(
                    model_path(),
                    *("--enable-step", "--step-scorer", str(scorer_path())),
                    *("--max-total-tokens", str(options.pool)),
                    *("--max-running-requests", str(options.n)),
                    *("--random-seed", str(options.seed)),
                    # SGLang decodes with drafts on a CPU in this loop alone: both shall.
                    "--disable-overlap-schedule",
                    *((*NGRAM, str(options.draft_tokens)) if drafts else ()),
                    log=Path(folder) / f"drafts-{drafts}.log",
                    SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY="0",
                )
            )
            for drafts in (False, True)
        }
        for drafts, step in METHODS.values():
            ask(servers[drafts], questions("train", 1)[0], options, step=step)  # warm up
        for number, question in enumerate(questions("test", options.questions, options.seed)):
            for place in range(len(METHODS)):
                method = list(METHODS)[(place + number) % len(METHODS)]
                drafts, step = METHODS[method]
                found[method].append(ask(servers[drafts], question, options, step=step))
                print(f"{number} {method}: {found[method][-1]}", file=sys.stderr, flush=True)
    print(
        f"{options.questions} questions, {options.n} samples each, pool of {options.pool} tokens: "
        f"{' '.join(sys.argv)}"
    )
    print(
        f"{'':>14}{'median s':>10}{'accept':>9}{'right':>14}{'tokens':>9}{'pruned':>8}{'retr.':>8}"
    )
    for method in METHODS:
        print(row(method, found[method]))
    seconds = {method: [one.seconds for one in found[method]] for method in METHODS}
    for method, reference in PAIRS:
        print(
            f"latency of {method} over {reference}: "
            f"{ratio(seconds[method], seconds[reference], options.seed)}"
        )
    lengths = {method: [one.accept_length for one in found[method]] for method in METHODS}
    print(
        "accept length of STEP + NGRAM over SC + NGRAM: "
        f"{ratio(lengths['STEP + NGRAM'], lengths['SC + NGRAM'], options.seed)}"
    )


if __name__ == "__main__":
    main()
