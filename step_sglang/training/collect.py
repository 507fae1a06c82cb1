"""Fills a store from a server: samples, grades and writes one question after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from step_sglang.client.http import AsyncClient
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import GivenTrace, Job
from step_sglang.errors import RequestRefused, ServerError
from step_sglang.training.confidence import token_signals
from step_sglang.training.errors import UnusableTrace
from step_sglang.training.grade import graded
from step_sglang.training.prompts import Prompter
from step_sglang.training.store import Writer
from step_sglang.training.stored import Steps, StoredQuestion, StoredTrace, StoreMeta
from step_sglang.training.wire import (
    CapturedTrace,
    generate_body,
    prefill_body,
    read_generated,
    read_prefilled,
)

Part = TypeVar("Part")
_SAMPLES_PER_REQUEST = 8  # bounds one answer: 20 candidates per token are a lot of JSON
_REFUSALS = 8  # so many before the first success, and it is the server, not the questions
_UNUSABLE = 8  # so many, and more than there are usable ones: likewise


@dataclass(frozen=True)
class CollectSettings:
    """How to sample."""

    sampling: Sampling
    top_logprobs: int = 20  # candidates per token for DeepConf's confidence; 0 = do not measure
    concurrency: int = 4  # questions at a time
    timeout: float = 3600.0  # seconds for one request
    keep_text: bool = False  # store the text and the token ids too


@dataclass(frozen=True)
class CollectProgress:
    """Totals of this run, after one more question."""

    questions: int  # added
    traces: int
    correct: int


@dataclass(frozen=True)
class Collected:
    """What a run added, and a line for each question that it could not add."""

    questions: int
    traces: int
    correct: int
    refused: tuple[str, ...]  # by the server
    unusable: tuple[str, ...] = ()  # a trace of theirs is


def collect(
    url: str,
    writer: Writer,
    jobs: Sequence[Job],
    prompter: Prompter,
    settings: CollectSettings,
    report: Callable[[CollectProgress], None] = lambda progress: None,
) -> Collected:
    """Collect every question that the store lacks.

    Raises:
        ServerError: the server died, or does not return what is needed; complete questions stay.
        StoreError: the disk is full or fails; complete questions stay.
    """
    return asyncio.run(_Collector(writer, prompter, settings, report).run(url, jobs))


class _Collector:
    def __init__(
        self,
        writer: Writer,
        prompter: Prompter,
        settings: CollectSettings,
        report: Callable[[CollectProgress], None],
    ) -> None:
        self._writer, self._prompter, self._settings = writer, prompter, settings
        self._report = report
        self._questions = self._traces = self._correct = 0
        self._refused: list[str] = []
        self._unusable: list[str] = []

    async def run(self, url: str, jobs: Sequence[Job]) -> Collected:
        left = iter([job for job in jobs if job.id not in self._writer.done])

        async def worker(client: AsyncClient) -> None:
            for job in left:  # shared: every worker takes the next
                await self._collect(client, job)

        async with AsyncClient(url, self._settings.timeout) as client:
            workers = [
                asyncio.create_task(worker(client)) for _ in range(self._settings.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            except ServerError as error:
                kept = len(self._writer.done)
                raise ServerError(
                    f"{error}. {kept} questions in {self._writer.folder} are complete and stay; "
                    "run the same command again to go on"
                ) from error
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self._refused and not self._questions:
            raise ServerError(f"the server refuses every question. {self._refused[0]}")
        if self._unusable and not self._questions:
            raise ServerError(f"no question is usable. {self._unusable[0]}")
        return Collected(
            self._questions, self._traces, self._correct,
            tuple(self._refused), tuple(self._unusable),
        )  # fmt: skip

    async def _collect(self, client: AsyncClient, job: Job) -> None:
        try:
            captures = await (
                self._prefill(client, job) if job.traces else self._sample(client, job)
            )
            result = assemble(job, captures, self._prompter, self._writer.meta, self._settings)
        except UnusableTrace as error:
            self._unusable.append(f"{error}: {job.question[:60]!r}")
            if len(self._unusable) >= max(_UNUSABLE, self._questions + 1):
                raise ServerError(f"most questions are not usable. {error}") from error
            return
        except RequestRefused as error:  # too long for the model, for one
            self._refused.append(f"{error}: {job.question[:60]!r}")
            if len(self._refused) >= _REFUSALS and not self._questions:
                raise ServerError(f"the server refuses every question. {error}") from error
            return
        self._writer.add(result)
        self._questions += 1
        self._traces += len(result.traces)
        self._correct += sum(trace.correct for trace in result.traces)
        self._report(CollectProgress(self._questions, self._traces, self._correct))

    async def _sample(self, client: AsyncClient, job: Job) -> list[CapturedTrace]:
        prompt, n = self._prompter.prompt(job.question), self._writer.meta.n
        sizes = [min(_SAMPLES_PER_REQUEST, n - i) for i in range(0, n, _SAMPLES_PER_REQUEST)]
        top = self._settings.top_logprobs

        async def part(size: int) -> list[CapturedTrace]:
            body = generate_body(prompt, size, self._settings.sampling, top)
            return read_generated(await client.generate(body), size, top)

        return [
            capture for found in await _together(part(size) for size in sizes) for capture in found
        ]

    async def _prefill(self, client: AsyncClient, job: Job) -> list[CapturedTrace]:
        prompt: Sequence[int] = job.prompt or self._prompter.prompt(job.question)
        top = self._settings.top_logprobs

        async def part(trace: GivenTrace) -> CapturedTrace:
            output = trace.tokens or self._prompter.output(job.question, trace.text)
            if not output:  # nothing but the <think> that the template writes already
                raise UnusableTrace("a trace has no token")
            answer = await client.generate(prefill_body(prompt, output, top))
            return read_prefilled(answer, trace.text, output, top, trace.finish)

        return await _together(part(trace) for trace in job.traces)


def assemble(
    job: Job,
    captures: Sequence[CapturedTrace],
    prompter: Prompter,
    meta: StoreMeta,
    settings: CollectSettings,
) -> StoredQuestion:
    """Grade the traces of one question and cut their signals at the boundaries.

    Raises:
        UnusableTrace: the hidden state of a step is missing, or not finite.
        ServerError: the captures do not fit the tokenizer.
    """
    traces: list[StoredTrace] = []
    hidden = [torch.empty(0, meta.hidden_size)]
    for sample, capture in enumerate(captures):
        keep = prompter.keep(capture.tokens, capture.positions)
        positions = capture.positions[keep]
        signals = token_signals(capture.logprobs, capture.confidences, meta.confidence_window)
        extracted, correct = _judged(job, sample, capture)
        lowest = signals.lowest_confidence
        traces.append(
            StoredTrace(
                question_id=job.id,
                sample=sample,
                question=job.question,
                answer=job.answer,
                extracted=extracted,
                correct=correct,
                num_tokens=len(capture.tokens),
                finish=capture.finish,
                shard=0,
                first_row=0,
                steps=Steps(
                    positions.astype(np.int32),
                    signals.mean_logprob[positions].astype(np.float32),
                    lowest[positions].astype(np.float32),
                ),
                mean_logprob=_last(signals.mean_logprob),
                lowest_confidence=_last(lowest),
                text=capture.text if settings.keep_text else None,
                tokens=capture.tokens if settings.keep_text else None,
            )
        )
        kept = capture.hidden[torch.from_numpy(keep)].float()
        finite = torch.isfinite(kept).all(dim=1)
        if not bool(finite.all()):
            raise UnusableTrace(
                f"{int((~finite).sum())} of the {len(kept)} hidden states of a trace are not "
                "finite (NaN or infinity)"
            )
        hidden.append(kept)
    widths = {part.shape[1] for part in hidden}
    if len(widths) != 1:
        raise ServerError(
            f"the server's hidden states are {sorted(widths - {meta.hidden_size})} wide, "
            f"{meta.model}'s are {meta.hidden_size}: it serves another model"
        )
    return StoredQuestion(tuple(traces), torch.cat(hidden))


def _judged(job: Job, sample: int, capture: CapturedTrace) -> tuple[str | None, bool]:
    """A trace's answer and label: by the vote that was recorded with it, or by the gold answer."""
    given = job.traces[sample] if job.traces else None
    if given is not None and given.agrees is not None:
        return given.extracted, given.agrees
    return graded(capture.text, capture.finish, job.answer, job.extract)


def _last(values: NDArray[np.float64]) -> float | None:
    return float(values[-1]) if len(values) and not np.isnan(values[-1]) else None


async def _together(parts: Iterable[Coroutine[Any, Any, Part]]) -> list[Part]:
    """Await all at once; when one fails, the others are cancelled, not left running."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
