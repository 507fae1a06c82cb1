"""Lets the methods take turns on the questions, each on the kind of server that it needs.

Within a repeat, the methods that share a server answer each question in turn, each with an empty
radix cache, and the order rotates from question to question: neither a slow moment of the machine
nor a warm cache favours a method. Methods that need another server form a block of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from step_sglang.client.http import AsyncClient
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Job
from step_sglang.errors import RequestRefused, ServerError
from step_sglang.evaluation.methods import RECORD, Method, MethodSettings
from step_sglang.evaluation.results import ResultWriter
from step_sglang.evaluation.sampler import ServerSampler, grade
from step_sglang.evaluation.serving import PoolSize, ServerHandle, Serving
from step_sglang.evaluation.traces import recorded_group, stated_calibration, write_group
from step_sglang.evaluation.trial_result import TrialKey, TrialResult
from step_sglang.evaluation.watch import PoolWatch
from step_sglang.voting.answers import extractor_named
from step_sglang.voting.verifier import AnswerVerifier


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    jobs: tuple[tuple[int, Job], ...]  # each with its place among the questions of all shards
    methods: tuple[Method, ...]
    ns: tuple[int, ...]
    repeats: int
    memories: tuple[PoolSize, ...]
    sampling: Sampling
    settings: MethodSettings = field(default_factory=MethodSettings)
    suffix: str = ""  # appended to every question
    watch_interval: float = 0.5  # seconds; 0 = do not watch the pool
    timeout: float = 3600.0  # seconds without anything from the server


@dataclass(frozen=True)
class Trial:
    """One method on one question."""

    job: Job
    method: Method
    n: int
    repeat: int
    memory: PoolSize

    @property
    def key(self) -> TrialKey:
        """What identifies its result."""
        return TrialKey(self.job.id, self.method.name, self.n, self.repeat, self.memory.name)


@dataclass(frozen=True)
class Block:
    """Trials on one server, in order."""

    serving: Serving
    trials: tuple[Trial, ...]


def blocks(plan: Plan, done: frozenset[TrialKey]) -> list[Block]:
    """The trials that are left, in order. Methods without STEP share the server of one with it."""
    policies = list(dict.fromkeys(m.policy for m in plan.methods if m.policy is not None))
    home = "fair" if "fair" in policies else (policies[0] if policies else None)
    kinds: list[str | None] = [*policies] or [None]
    found = []
    for repeat in range(plan.repeats):
        for memory in (*plan.memories, None):
            for policy in kinds:
                methods = [
                    m
                    for m in plan.methods
                    if (m.policy or home) == policy and m.ample == (memory is None)
                ]
                trials = tuple(
                    trial
                    for trial in _trials(plan, methods, repeat, memory or PoolSize())
                    if trial.key not in done
                )
                if trials:
                    found.append(Block(Serving(policy, memory or PoolSize()), trials))
    return found


def _trials(
    plan: Plan, methods: Sequence[Method], repeat: int, memory: PoolSize
) -> Iterator[Trial]:
    for place, job in plan.jobs:
        kinds = [(m, n) for m in methods for n in _sizes(m, plan.ns)]
        first = (place + repeat) % max(1, len(kinds))
        for method, n in [*kinds[first:], *kinds[:first]]:
            yield Trial(job, method, n, repeat, memory)


def _sizes(method: Method, ns: Sequence[int]) -> Sequence[int]:
    if method.single:
        return [1]
    return [max(ns)] if method.ample else ns


@dataclass
class Bench:
    """Runs a plan. ``serve`` starts (or checks) a server; ``report`` is called with each result."""

    plan: Plan
    writer: ResultWriter
    serve: Callable[[Serving], AbstractContextManager[ServerHandle]]
    report: Callable[[TrialResult], None] = lambda result: None
    verifier: AnswerVerifier = field(default_factory=AnswerVerifier)

    def run(self) -> tuple[str, ...]:
        """Run every trial that is left; returns a line for each that the server refused.

        A refused question, such as one too long for the model, has no result; the next run asks it
        again.

        Raises:
            ServerError: a server does not start, died or failed; results written so far stay.
            BenchError: the server is not what the methods need, or the disk fails.
        """
        refused: list[str] = []
        try:
            for block in blocks(self.plan, self.writer.done):
                with self.serve(block.serving) as live:
                    self.writer.check_pool(block.serving.memory.name, live.pool)
                    refused += asyncio.run(self._block(live, block))
        except ServerError as error:
            raise ServerError(
                f"{error}. {len(self.writer.done)} results are in {self.writer.folder} and stay; "
                "run the same command again to go on"
            ) from error
        finally:
            self.verifier.close()
        return tuple(refused)

    async def _block(self, live: ServerHandle, block: Block) -> list[str]:
        refused = []
        async with AsyncClient(live.url, self.plan.timeout) as client:
            for trial in block.trials:
                try:
                    result = await self._run(client, live, trial)
                except RequestRefused as error:
                    refused.append(
                        f"{trial.method.name} n={trial.n}, {trial.job.question[:60]!r}: {error}"
                    )
                    continue
                self.writer.add(result)
                self.report(result)
        return refused

    async def _run(self, client: AsyncClient, live: ServerHandle, trial: Trial) -> TrialResult:
        plan, job = self.plan, trial.job
        extract = extractor_named(job.extract)
        prompt = await client.render([{"role": "user", "content": job.question + plan.suffix}])
        sampler = ServerSampler(
            client, prompt, plan.sampling, plan.settings, extract, self.verifier
        )
        await client.flush()
        started = time.time()
        with PoolWatch(live.url, plan.watch_interval) as watch:
            asked = await trial.method.ask(sampler, trial.n)
        latency = sum(part.seconds for part in asked.parts)  # not what grading takes
        graded = grade(trial.method, asked, job.answer, self.verifier)
        if trial.method is RECORD:
            # As SGLang cuts it to what a request may have.
            limit = min(plan.sampling.max_new_tokens, live.longest - len(prompt) - 1)
            kept = recorded_group(job, trial.repeat, len(prompt), limit, latency, asked, graded)
            write_group(self.writer.folder, kept)
        return TrialResult(
            question=job.id,
            method=trial.method.name,
            n=trial.n,
            repeat=trial.repeat,
            memory=trial.memory.name,
            pool=live.pool,
            gold=job.answer,
            answer=graded.answer,
            correct=graded.correct,
            latency=latency,
            phases=tuple(part.seconds for part in asked.parts),
            threshold=asked.threshold,
            started=started,
            traces=graded.traces,
            usage=watch.usage,
            calibration=stated_calibration(asked.traces),
        )
