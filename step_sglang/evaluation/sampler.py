"""Samples a question's traces from a server for a method, and grades them."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import asdict, dataclass

from step_sglang import protocol
from step_sglang.client.result import server_times
from step_sglang.client.sampling import Sampling
from step_sglang.client.source import TraceSource, reading_chunks
from step_sglang.evaluation.methods import (
    Method,
    MethodSettings,
    Part,
    SampleResult,
    Step,
    confidence_of,
)
from step_sglang.evaluation.trial_result import TrialTrace
from step_sglang.voting.answers import Extractor
from step_sglang.voting.session import (
    STREAM_INTERVAL,
    SampledTrace,
    TraceFate,
    VoteRules,
    VoteSession,
)
from step_sglang.voting.tally import Ballot, tallying
from step_sglang.voting.verifier import AnswerVerifier

# Only the end of a trace is sent: streaming every token would cost the server time.
_NEVER = 1 << 30  # tokens


@dataclass(frozen=True)
class ServerSampler:
    """Samples traces of one question; implements `methods.Sampler`."""

    source: TraceSource
    prompt: list[int]  # token ids
    sampling: Sampling
    settings: MethodSettings
    extract: Extractor
    verifier: AnswerVerifier

    async def ask(self, n: int, step: Step, early: str = "off") -> Part:
        """Sample n traces in one request.

        The time ends with the last trace. Votes are counted meanwhile only where ``early`` asks
        for it.

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
                "custom_params": {protocol.REQUEST_KEY: step},
            },
        }
        rules = VoteRules("weighted", early)
        limit = self.sampling.max_new_tokens
        session = VoteSession(n, rules, self.extract, limit)
        comparison = self.verifier.comparison()
        started = session.started = time.perf_counter()
        chunks = self.source.stream(body)
        async with aclosing(chunks):
            async for chunk in chunks:
                with reading_chunks():
                    ended = session.feed(chunk)
                if ended and early != "off":
                    await comparison.arun(session.counting())
                    if session.decided():
                        break
        seconds = time.perf_counter() - started
        session.cancel()
        for trace in session.traces:
            if trace.answer is None and trace.fate is not TraceFate.CANCELLED:
                trace.answer = self.extract(trace.text)
        return Part(tuple(session.traces), seconds)


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
        if trace.fate is TraceFate.FINISHED and trace.answer is not None:
            weight = method.weigh(trace, asked.threshold)
            if weight is not None:
                ballots.append(Ballot(trace.answer, weight))
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
