"""SC, STEP and its controls on SGLang's real scheduler, with a virtual GPU under it: simulated.

    python bench/virtual_gpu.py TRACES.json.gz --questions 12 13 --unit 16

Nothing here was timed on a GPU, and the scores are invented: every line says "simulated". Server,
scheduler, radix cache, overlap loop and STEP's hooks are the real ones. The model plays traces of
recorded lengths and answers, and the seconds are those of a roofline (`step_sglang/simulation/`).
What the engine itself takes on the host is not counted.

The file (gzipped JSON) holds "questions", each with "traces": lists that begin with the trace's
number of tokens and its answer, a number: 0 is the right one, -1 none.

Tokens are counted in units of `--unit`: lengths, the pool and SGLang's reservations are divided by
it, and a decode step takes as long as so many real ones. 1 is exact, and that many times slower.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from step_sglang import protocol
from step_sglang.client.http import AsyncClient
from step_sglang.client.launch import running_server
from step_sglang.client.sampling import Sampling
from step_sglang.errors import StepError, nearest
from step_sglang.evaluation.methods import METHODS, Method, MethodSettings
from step_sglang.evaluation.sampler import ServerSampler, grade
from step_sglang.simulation.clock import Clock
from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.gpu import gpu_named, kv_pool, network_named, step_time
from step_sglang.simulation.model import CLOCK_FILE, SPEED_FILE, Player, write_player
from step_sglang.simulation.played import PlayedGroup, check_fit, in_units
from step_sglang.simulation.speed import Speed
from step_sglang.simulation.synthetic import Ranking, drawn, read_lengths, scored
from step_sglang.voting.answers import extract_boxed
from step_sglang.voting.verifier import AnswerVerifier

# The others need token confidences or texts, which traces that are played do not have.
PLAYABLE = ("sc", "sc-early", "sc-exact", "random", "longest", "step", "step-early", "step-exact")


@dataclass(frozen=True)
class Run:
    """One method on one question."""

    question: str
    method: str
    seconds: float  # simulated
    correct: bool
    tokens: int
    wait: float  # simulated seconds of a trace, mean
    retracted: int
    fates: dict[str, int]


def methods_of(names: Sequence[str]) -> list[Method]:
    for name in names:
        if name not in PLAYABLE:
            raise SimulationError(
                f"{name[:40]!r} cannot be simulated{nearest(name, PLAYABLE)}; "
                f"there are {', '.join(PLAYABLE)}"
            )
    return [METHODS[name] for name in names]


def groups_of(options: argparse.Namespace) -> list[PlayedGroup]:
    """The groups, in real tokens."""
    questions = read_lengths(options.file)
    numbers = options.questions or range(len(questions))
    beyond = [number for number in numbers if not 0 <= number < len(questions)]
    if beyond:
        raise SimulationError(
            f"{options.file} has questions 0 to {len(questions) - 1}, and no {beyond[0]}"
        )
    ranking = Ranking(options.auc, options.grown)
    found = []
    for number in numbers:
        source = np.random.default_rng([options.seed, number])
        name, traces = questions[number]
        chosen = drawn(traces, options.n, source)
        found.append(
            scored(
                name, options.seed, chosen, ranking, options.prompt_tokens,
                options.max_new_tokens, options.step_tokens, source,
            )
        )  # fmt: skip
    return found


def environment(folder: Path, unit: int) -> dict[str, str]:
    """What makes the server's GPU a virtual one, and SGLang's reservations as coarse as tokens."""
    return {
        protocol.VIRTUAL_GPU_ENV: str(folder),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "step_sglang.patches.virtual",
        "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": str(max(1, 600 // unit)),
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": str(max(1, 4096 // unit)),
        "SGLANG_RETRACT_DECODE_STEPS": str(max(1, 20 // unit)),
    }


async def measure(
    url: str, player: Player, groups: Sequence[PlayedGroup], options: argparse.Namespace
) -> list[Run]:
    """Every method on every question, one after the other."""
    unit = options.unit
    clock = Clock(player.folder / CLOCK_FILE)
    sampling = Sampling(0.0, 1.0, 1, max(1, options.max_new_tokens // unit))
    verifier = AnswerVerifier()
    found = []
    try:
        async with AsyncClient(url, timeout=3600.0) as client:
            for number, group in enumerate(groups):
                for method in methods_of(options.methods):
                    await client.flush()
                    asked = f"{number}/{method.name}"
                    sampler = ServerSampler(
                        client, list(player.prompts[number]), sampling, MethodSettings(),
                        extract_boxed, verifier, clock.now,
                        {protocol.PLAY_KEY: [number, asked]}, max(1, 512 // unit),
                    )  # fmt: skip
                    sample = await method.ask(sampler, len(group.traces))
                    graded = grade(method, sample, group.gold, verifier)
                    run = Run(
                        question=group.question,
                        method=method.name,
                        seconds=sum(part.seconds for part in sample.parts),
                        correct=graded.correct,
                        tokens=unit * sum(trace.tokens for trace in graded.traces),
                        wait=float(np.mean([trace.wait or 0.0 for trace in graded.traces])),
                        retracted=sum(trace.retractions for trace in graded.traces),
                        fates=dict(Counter(trace.fate for trace in graded.traces)),
                    )
                    print(f"simulated: {json.dumps(run.__dict__)}", flush=True)
                    found.append(run)
    finally:
        verifier.close()
    return found


def simulate(options: argparse.Namespace) -> list[Run]:
    """Check everything, then start the server and measure.

    Raises:
        SimulationError: what was asked for cannot be simulated.
        ServerError: the server does not start.
    """
    gpu, network = gpu_named(options.gpu), network_named(options.model)
    methods_of(options.methods)
    pool = options.pool or kv_pool(gpu, network)
    groups = groups_of(options)
    check_fit(groups, pool)
    context = (options.prompt_tokens + options.max_new_tokens) // options.unit + 64
    small = [in_units(group, options.unit) for group in groups]
    print(
        f"simulated: {gpu.name}, {network.name}, pool {pool:,} tokens, unit {options.unit}, "
        f"n = {options.n}, scores that grow to a within-question AUC of {options.auc:g} at "
        f"{options.grown:g} of the mean length"
    )
    with tempfile.TemporaryDirectory() as folder:
        player = write_player(Path(folder) / "player", small, context)
        Speed(step_time(gpu, network), options.unit).write(player.folder / SPEED_FILE)
        os.environ.update(environment(player.folder, options.unit))
        flags = ["--enable-step", "--step-scorer", str(player.scorer), "--enable-metrics"]
        flags += ["--max-running-requests", str(max(256, options.n))]
        flags += ["--max-total-tokens", str(pool // options.unit)]
        with running_server(str(player.folder), flags, Path(folder) / "server.log") as url:
            return asyncio.run(measure(url, player, small, options))


def table(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """A line per method."""
    lines = ["|  | method | right | seconds | wait of a trace, s | tokens | pruned | retracted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in names:
        own = [run for run in runs if run.method == name]
        right, pruned = sum(r.correct for r in own), [r.fates.get("pruned", 0) for r in own]
        lines.append(
            f"| simulated | {METHODS[name].title} | {right} of {len(own)} | "
            f"{np.mean([r.seconds for r in own]):.0f} | {np.mean([r.wait for r in own]):.0f} | "
            f"{np.mean([r.tokens for r in own]):.0f} | {np.mean(pruned):.1f} | "
            f"{np.mean([r.retracted for r in own]):.1f} |"
        )
    return lines


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, nargs="+", help="by number; default: all")
    parser.add_argument("--methods", nargs="+", default=["sc", "random", "longest", "step"])
    parser.add_argument("-n", type=int, default=64, help="traces of a question")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--pool", type=int, help="KV tokens; default: what fits beside the model")
    parser.add_argument("--auc", type=float, default=0.70, help="within a question")
    parser.add_argument("--grown", type=float, default=0.5, help="of the mean length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unit", type=int, default=16, help="tokens")
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--max-new-tokens", type=int, default=43_008)
    parser.add_argument("--step-tokens", type=int, default=128, help="of a step")
    options = parser.parse_args(arguments)
    for name in ("n", "unit", "prompt_tokens", "max_new_tokens", "step_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    return options


def main() -> None:
    """Simulate and print the table."""
    options = parsed()
    print(f"simulated: python {shlex.join(sys.argv)}")
    try:
        runs = simulate(options)
    except StepError as error:
        sys.exit(f"error: {error}")
    print("\n".join(table(runs, options.methods)))


if __name__ == "__main__":
    main()
