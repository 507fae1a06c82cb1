"""The methods on SGLang's real scheduler, with a virtual GPU under it.

Server, scheduler, radix cache, overlap loop and STEP's hooks are the real ones. The model plays the
groups' traces, and the seconds are the virtual GPU's; what the engine itself takes is not counted.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from step_sglang import protocol
from step_sglang.client.http import AsyncClient
from step_sglang.client.launch import running_server
from step_sglang.client.sampling import Sampling
from step_sglang.evaluation.methods import METHODS, MethodSettings
from step_sglang.evaluation.sampler import ServerSampler, grade
from step_sglang.evaluation.simulated import OutcomeWriter, SimulatedOutcome
from step_sglang.evaluation.simulation_setup import Job, Simulation, jobs_left
from step_sglang.evaluation.trial_result import ENDED, known_waits
from step_sglang.simulation.clock import Clock
from step_sglang.simulation.model import CLOCK_FILE, SPEED_FILE, Player, write_player
from step_sglang.simulation.played import PlayedGroup, in_units
from step_sglang.simulation.speed import Speed
from step_sglang.voting.answers import extract_boxed
from step_sglang.voting.verifier import AnswerVerifier

_LOG = "server.log"
_TIMEOUT = 3600.0  # real seconds without an answer


def environment(folder: Path, unit: int) -> dict[str, str]:
    """What makes a server's GPU a virtual one, and SGLang's reservations as coarse as tokens."""
    return {
        protocol.VIRTUAL_GPU_ENV: str(folder),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "step_sglang.patches.virtual",
        "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": str(max(1, 600 // unit)),
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": str(max(1, 4096 // unit)),
        "SGLANG_RETRACT_DECODE_STEPS": str(max(1, 20 // unit)),
    }


@contextmanager
def _in_environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Played:
    """A job, and where its groups stand in the player."""

    job: Job
    numbers: tuple[int, ...]


def run_virtual(
    simulation: Simulation,
    writer: OutcomeWriter,
    report: Callable[[Sequence[SimulatedOutcome]], None],
) -> None:
    """Simulate what the folder lacks, on one server per pool.

    Raises:
        SimulationError: the disk is full or fails.
        ServerError: a server does not start, or died; the outcomes so far stay.
    """
    unit = simulation.speed.unit
    groups: list[PlayedGroup] = []
    by_pool: dict[int, list[_Played]] = {pool: [] for pool in simulation.pools}
    for draw, n, numbers in simulation.batches():
        for auc in simulation.aucs:
            jobs = jobs_left(simulation, writer, draw, n, numbers, auc)
            if not jobs:
                continue
            places = tuple(range(len(groups), len(groups) + len(jobs[0].groups)))
            groups += [in_units(group, unit) for group in jobs[0].groups]
            for job in jobs:
                by_pool[job.pool].append(_Played(job, places))
    if not groups:
        return
    limit = max(1, simulation.source.limit // unit)
    prompt = max(group.prompt_tokens for group in groups)
    with tempfile.TemporaryDirectory() as folder:
        player = write_player(Path(folder), groups, limit + prompt + 64)
        simulation.speed.write(player.folder / SPEED_FILE)
        for pool, played in by_pool.items():
            if not played:
                continue
            together = max(sum(len(g.traces) for g in one.job.groups) for one in played)
            flags = [
                "--enable-step", "--step-scorer", str(player.scorer), "--enable-metrics",
                "--max-running-requests", str(max(256, together)),
                "--max-total-tokens", str(pool // unit),
            ]  # fmt: skip
            with (
                _in_environment(environment(player.folder, unit)),
                running_server(str(player.folder), flags, writer.folder / _LOG) as url,
            ):
                asyncio.run(
                    _run(url, player, groups, played, limit, simulation.speed, writer, report)
                )


async def _run(
    url: str,
    player: Player,
    groups: Sequence[PlayedGroup],
    played: Sequence[_Played],
    limit: int,
    speed: Speed,
    writer: OutcomeWriter,
    report: Callable[[Sequence[SimulatedOutcome]], None],
) -> None:
    unit, verifier = speed.unit, AnswerVerifier()
    clock = Clock(player.folder / CLOCK_FILE)
    try:
        async with AsyncClient(url, timeout=_TIMEOUT) as client:

            async def ask(one: _Played, number: int) -> SimulatedOutcome:
                group, method = groups[number], METHODS[one.job.method]
                asked = f"{number}/{one.job.pool}/{method.name}"
                sampler = ServerSampler(
                    client, list(player.prompts[number]), Sampling(0.0, 1.0, 1, limit),
                    MethodSettings(), extract_boxed, verifier, clock.now,
                    {protocol.PLAY_KEY: [number, asked]}, max(1, 512 // unit),
                )  # fmt: skip
                sample = await method.ask(sampler, len(group.traces))
                graded = grade(method, sample, group.gold, verifier)
                fates = [trace.fate for trace in graded.traces]
                waits = known_waits(graded.traces, sample.parts[-1].seconds)
                return SimulatedOutcome(
                    question=group.question,
                    method=method.name,
                    n=len(group.traces),
                    draw=group.draw,
                    pool=one.job.pool,
                    auc=one.job.auc,
                    correct=graded.correct,
                    seconds=sum(part.seconds for part in sample.parts) + speed.overhead,
                    tokens=unit * sum(trace.tokens for trace in graded.traces),
                    wait=sum(waits) / len(waits) if waits else 0.0,
                    pruned=fates.count("pruned"),
                    retracted=sum(trace.retractions for trace in graded.traces),
                    ended=sum(fates.count(fate) for fate in ENDED),
                )

            for one in played:
                await client.flush()
                found = await asyncio.gather(*(ask(one, number) for number in one.numbers))
                writer.add(found)
                report(found)
    finally:
        verifier.close()
