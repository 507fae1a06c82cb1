"""Samples a question's traces from a server for a method, and grades them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from step_sglang import protocol
from step_sglang.client.result import server_times
from step_sglang.client.sampling import Sampling
from step_sglang.client.source import TraceSource, reading_chunks
from step_sglang.evaluation.methods import (
    Consensus,
    Method,
    MethodSettings,
    Part,
    SampleResult,
    Step,
    confidence_of,
)
from step_sglang.evaluation.trial_result import TrialTrace
from step_sglang.voting.answers import Extractor
from step_sglang.voting.classes import Steps
from step_sglang.voting.families import lineage_of
from step_sglang.voting.session import (
    STREAM_INTERVAL,
    SampledTrace,
    TraceFate,
    VoteRules,
    VoteSession,
)
from step_sglang.voting.tally import Ballot, Poll, share_of, tallying
from step_sglang.voting.verifier import AnswerVerifier


@dataclass(frozen=True)
class ServerSampler:
    """Samples traces of one question; implements `methods.Sampler`."""

    source: TraceSource
    prompt: list[int]  # token ids
    sampling: Sampling
    settings: MethodSettings
    extract: Extractor
    verifier: AnswerVerifier
    clock: Callable[[], float] = time.perf_counter  # of the latency; seconds
    custom: Mapping[str, Any] = field(default_factory=dict)  # `custom_params` beside the step's
    interval: int = STREAM_INTERVAL  # tokens between two chunks of a trace that may be cut short

    async def ask(self, n: int, step: Step, until: VoteRules | Consensus | None = None) -> Part:
        """Sample n traces in one request.

        The time ends with the last trace, or when ``until`` ends the group. Votes are counted only
        where it asks for that, and the time that it takes is counted too.

        Raises:
            RequestRefused: the server refused it.
            ServerError: it does not answer, breaks off, or answers something unusable.
        """
        started = self.clock()
        comparison = self.verifier.comparison()
        agreed = None
        if isinstance(until, Consensus):
            agreed = _Agreement(until)
            await comparison.arun(agreed.counting(until.before))
            if agreed.reached():
                return Part((), self.clock() - started)
        # Else only the end of a trace is sent: streaming every token would cost the server time.
        interval = protocol.NEVER_STREAMED if until is None else self.interval
        body = {
            "input_ids": self.prompt,
            "sampling_params": {
                **asdict(self.sampling),
                "n": n,
                "skip_special_tokens": False,
                "stream_interval": interval,
                "custom_params": {**self.custom, protocol.REQUEST_KEY: step},
            },
        }
        rules = until if isinstance(until, VoteRules) else VoteRules(early="off")
        session = VoteSession(n, rules, self.extract, self.sampling.max_new_tokens)
        session.started = time.perf_counter()
        chunks = self.source.stream(body)
        async with aclosing(chunks):
            async for chunk in chunks:
                with reading_chunks():
                    ended = session.feed(chunk)
                if not ended or until is None:
                    continue
                trace = session.traces[chunk.get("index", 0)]
                if agreed is None:
                    await comparison.arun(session.counting())
                elif trace.fate is TraceFate.FINISHED:
                    trace.answer = self.extract(trace.text)
                    await comparison.arun(agreed.counting([trace]))
                if session.decided() if agreed is None else agreed.reached():
                    break
                if surplus := session.surplus():
                    await self.source.end_traces(surplus)
        seconds = self.clock() - started
        session.cancel()
        for trace in session.traces:
            if trace.answer is None and trace.fate is not TraceFate.CANCELLED:
                trace.answer = self.extract(trace.text)
        return Part(tuple(session.traces), seconds)


class _Agreement:
    """The vote of a method that ends its group by :class:`Consensus`."""

    def __init__(self, until: Consensus) -> None:
        self._until, self._poll = until, Poll()

    def counting(self, traces: Sequence[SampledTrace]) -> Steps[None]:
        """Count traces that ended, in steps that may take long."""
        for trace in traces:
            if (ballot := _ballot(trace, self._until.weigh(trace))) is not None:
                yield from self._poll.adding(ballot)

    def reached(self) -> bool:
        tallies = self._poll.tallies()
        return bool(tallies) and share_of(tallies) >= self._until.share


def _ballot(trace: SampledTrace, weight: float | None, *, families: bool = False) -> Ballot | None:
    """Of a trace that finished with an answer, unless its method keeps it out of the vote."""
    if trace.fate is not TraceFate.FINISHED or trace.answer is None or weight is None:
        return None
    return Ballot(trace.answer, weight, lineage_of(trace.meta_info) if families else None)


@dataclass(frozen=True)
class Graded:
    """The voted answer of a trial, with every trace."""

    answer: str | None
    correct: bool
    traces: tuple[TrialTrace, ...]


def grade(method: Method, asked: SampleResult, gold: str, verifier: AnswerVerifier) -> Graded:
    """Vote with the method's weights over the traces that finished with an answer."""
    right: dict[str, bool] = {}

    def is_right(answer: str | None) -> bool:
        if answer is None:
            return False
        if answer not in right:
            right[answer] = verifier.same(answer, gold)
        return right[answer]

    ballots = []
    for trace in asked.traces:
        weight = method.weigh(trace, asked.threshold)
        if (ballot := _ballot(trace, weight, families=method.families)) is not None:
            ballots.append(ballot)
    tallies = verifier.comparison().run(tallying(ballots))
    answer = tallies[0].answer if tallies else None
    traces = tuple(_trace_result(trace, is_right(trace.answer)) for trace in asked.traces)
    return Graded(answer, is_right(answer), traces)


def _trace_result(trace: SampledTrace, correct: bool) -> TrialTrace:
    info = trace.meta_info
    step = info.get(protocol.META_KEY) or {}
    wait, prefill, decode = server_times(info)
    return TrialTrace(
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
