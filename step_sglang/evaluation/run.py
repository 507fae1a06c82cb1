"""Lets the methods take turns on the questions, each on the kind of server that it needs.

Within a repeat, all methods of one server answer a question in turn, in an order that rotates from
question to question, each with an empty radix cache: a slow moment of the machine, or a warm cache,
favours nobody. Methods that need another server have a block of their own in every repeat.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import httpx

from step_sglang.answers import extractor_named
from step_sglang.client.sources import UrlSource
from step_sglang.evaluation.asking import Session, grade
from step_sglang.evaluation.methods import RECORD, Method, Settings
from step_sglang.evaluation.records import Key, RunResult
from step_sglang.evaluation.results import ResultWriter
from step_sglang.evaluation.serving import Live, Memory, Serving
from step_sglang.evaluation.traces import recorded_group, write_group
from step_sglang.evaluation.watch import PoolWatch
from step_sglang.judge import Judge
from step_sglang.toolchain.client import silence
from step_sglang.toolchain.errors import RequestRefused, ServerError
from step_sglang.toolchain.sources import Job
from step_sglang.toolchain.wire import Sampling

_FLUSH_TIMEOUT = 60.0  # seconds that a server may need to become idle


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    jobs: tuple[tuple[int, Job], ...]  # with their place among the questions of all shards
    methods: tuple[Method, ...]
    ns: tuple[int, ...]
    repeats: int
    memories: tuple[Memory, ...]
    sampling: Sampling
    settings: Settings = field(default_factory=Settings)
    suffix: str = ""  # of every question
    watch_interval: float = 0.5  # seconds; 0 = do not watch the pool
    timeout: float = 3600.0  # seconds without anything from the server


@dataclass(frozen=True)
class Turn:
    """One method on one question."""

    job: Job
    method: Method
    n: int
    repeat: int
    memory: Memory

    @property
    def key(self) -> Key:
        """Of its result."""
        return Key(self.job.id, self.method.name, self.n, self.repeat, self.memory.name)


@dataclass(frozen=True)
class Block:
    """Turns that follow each other on one server."""

    serving: Serving
    turns: tuple[Turn, ...]


def blocks(plan: Plan, done: frozenset[Key]) -> list[Block]:
    """What is left to do, in order. Methods that need no STEP share the server of one that does."""
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
                turns = tuple(
                    turn
                    for turn in _turns(plan, methods, repeat, memory or Memory())
                    if turn.key not in done
                )
                if turns:
                    found.append(Block(Serving(policy, memory or Memory()), turns))
    return found


def _turns(plan: Plan, methods: Sequence[Method], repeat: int, memory: Memory) -> Iterator[Turn]:
    for place, job in plan.jobs:
        kinds = [(m, n) for m in methods for n in _sizes(m, plan.ns)]
        first = (place + repeat) % max(1, len(kinds))
        for method, n in [*kinds[first:], *kinds[:first]]:
            yield Turn(job, method, n, repeat, memory)


def _sizes(method: Method, ns: Sequence[int]) -> Sequence[int]:
    if method.single:
        return [1]
    return [max(ns)] if method.ample else ns


@dataclass
class Bench:
    """Runs a plan. ``serve`` starts (or checks) a server of a kind; ``report`` hears of results."""

    plan: Plan
    writer: ResultWriter
    serve: Callable[[Serving], AbstractContextManager[Live]]
    report: Callable[[RunResult], None] = lambda result: None
    judge: Judge = field(default_factory=Judge)

    def run(self) -> tuple[str, ...]:
        """Do everything that is left; returns what the server refused, in words.

        A question that is refused, such as one too long for the model, is left out, and asked again
        by the next run.

        Raises:
            ServerError: a server does not start, died or failed; what is written stays.
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
            self.judge.close()
        return tuple(refused)

    async def _block(self, live: Live, block: Block) -> list[str]:
        refused = []
        source = UrlSource(live.url, self.plan.timeout, None)
        try:
            for turn in block.turns:
                try:
                    result = await self._turn(source, live, turn)
                except RequestRefused as error:
                    refused.append(
                        f"{turn.method.name} n={turn.n}, {turn.job.question[:60]!r}: {error}"
                    )
                    continue
                self.writer.add(result)
                self.report(result)
        finally:
            await source.close()
        return refused

    async def _turn(self, source: UrlSource, live: Live, turn: Turn) -> RunResult:
        plan, job = self.plan, turn.job
        extract = extractor_named(job.extract)
        prompt = await source.render([{"role": "user", "content": job.question + plan.suffix}])
        session = Session(source, prompt, plan.sampling, plan.settings, extract, self.judge)
        await asyncio.to_thread(flush, live.url)
        started = time.time()
        with PoolWatch(live.url, plan.watch_interval) as watch:
            asked = await turn.method.ask(session, turn.n)
        latency = sum(part.seconds for part in asked.parts)  # not what grading takes
        graded = grade(turn.method, asked, job.answer, self.judge)
        if turn.method is RECORD:
            # As SGLang cuts it to what a request may have.
            limit = min(plan.sampling.max_new_tokens, live.longest - len(prompt) - 1)
            kept = recorded_group(job, turn.repeat, len(prompt), limit, latency, asked, graded)
            write_group(self.writer.folder, kept)
        return RunResult(
            question=job.id,
            method=turn.method.name,
            n=turn.n,
            repeat=turn.repeat,
            memory=turn.memory.name,
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
        )


def flush(url: str) -> None:
    """Empty the radix cache, as soon as the server is idle; raises ServerError."""
    deadline = time.monotonic() + _FLUSH_TIMEOUT
    while True:
        try:
            answer = httpx.post(f"{url}/flush_cache", timeout=_FLUSH_TIMEOUT)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise silence(url, error) from error
        if answer.status_code == 200:
            return
        if time.monotonic() > deadline:
            raise ServerError(
                f"the server at {url} does not become idle, so its cache cannot be flushed: "
                f"{answer.text.strip()[:200]}"
            )
        time.sleep(0.1)
