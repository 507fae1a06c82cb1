"""Asks one server one question by one method, and grades what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from step_sglang import words
from step_sglang.answers import Extractor
from step_sglang.client.sources import Source, reading_chunks
from step_sglang.evaluation.methods import Asked, Method, Part, Settings, Step, confidence_of
from step_sglang.evaluation.records import TraceResult
from step_sglang.gather import STREAM_INTERVAL, Gathered, Gathering, TraceFate, VoteRules
from step_sglang.judge import Judge
from step_sglang.toolchain.wire import Sampling
from step_sglang.vote import Ballot, tally

# Only the end of a trace is sent: streaming every token would cost the server time.
_NEVER = 1 << 30  # tokens


@dataclass(frozen=True)
class Session:
    """Asks for traces of one question; see `methods.Asker`."""

    source: Source
    prompt: list[int]  # token ids
    sampling: Sampling
    settings: Settings
    extract: Extractor
    judge: Judge

    async def ask(self, n: int, step: Step, early: str = "off") -> Part:
        """Sample n traces in one request.

        The clock stops when the last trace ended, or was cancelled; only an early end votes before.

        Raises:
            RequestRefused: the server refused it.
            ServerError: it does not answer, breaks off, or answers something unusable.
        """
        interval = _NEVER if early == "off" else STREAM_INTERVAL
        body = {
            "input_ids": self.prompt,
            "sampling_params": {
                **asdict(self.sampling),
                "n": n,
                "skip_special_tokens": False,
                "stream_interval": interval,
                "custom_params": {words.REQUEST_KEY: step},
            },
        }
        rules = VoteRules("weighted", early)
        limit = self.sampling.max_new_tokens
        gathering = Gathering(n, rules, self.judge.same, self.extract, limit)
        started = gathering.started = time.perf_counter()
        chunks = self.source.stream(body)
        async with aclosing(chunks):
            async for chunk in chunks:
                with reading_chunks():
                    ended = gathering.feed(chunk)
                if ended and early != "off":
                    await asyncio.to_thread(gathering.count)
                    if gathering.decided():
                        break
        seconds = time.perf_counter() - started
        gathering.cancel()
        for trace in gathering.traces:
            if trace.answer is None and trace.fate is not TraceFate.CANCELLED:
                trace.answer = self.extract(trace.text)
        return Part(tuple(gathering.traces), seconds)


@dataclass(frozen=True)
class Graded:
    """The vote of a question, and every trace."""

    answer: str | None
    correct: bool
    traces: tuple[TraceResult, ...]


def grade(method: Method, asked: Asked, gold: str, judge: Judge) -> Graded:
    """Vote as the method does, over the traces that finished with an answer."""
    right: dict[str, bool] = {}

    def is_right(answer: str | None) -> bool:
        if answer is None:
            return False
        if answer not in right:
            right[answer] = judge.same(answer, gold)
        return right[answer]

    ballots = []
    for trace in asked.traces:
        if trace.fate is TraceFate.FINISHED and trace.answer is not None:
            weight = method.weigh(trace, asked.threshold)
            if weight is not None:
                ballots.append(Ballot(trace.answer, weight))
    tallies = tally(ballots, judge.same)
    answer = tallies[0].answer if tallies else None
    traces = tuple(_trace_result(trace, is_right(trace.answer)) for trace in asked.traces)
    return Graded(answer, is_right(answer), traces)


def _trace_result(trace: Gathered, correct: bool) -> TraceResult:
    info = trace.meta_info
    step = info.get(words.META_KEY) or {}
    wait, prefill, decode = server_times(info)
    return TraceResult(
        fate=trace.fate.value,
        answer=trace.answer,
        correct=correct,
        tokens=trace.tokens,
        score=trace.score,
        confidence=confidence_of(trace),
        reason=step.get("reason"),
        retractions=int(info.get("num_retractions") or 0),
        wait=wait,
        prefill=prefill,
        decode=decode,
    )


def server_times(
    info: Mapping[str, Any],
) -> tuple[float | None, float | None, float | None]:
    """Seconds of waiting, prefill and decoding, by the server's own time stamps; None without them.

    A retracted trace waits again after its first token; that is no decoding.
    """
    wait, entry, prefilled, finished = (
        info.get(key)
        for key in (
            "queue_time", "forward_entry_time", "prefill_finished_time", "request_finished_ts",
        )
    )  # fmt: skip
    if wait is None or entry is None or prefilled is None or finished is None:
        return None, None, None
    again = 0.0
    dispatched = info.get("api_server_dispatch_finish_ts")
    if info.get("num_retractions") and dispatched is not None:
        again = max(0.0, wait - max(0.0, entry - dispatched))
    return wait, prefilled - entry, max(0.0, finished - prefilled - again)
