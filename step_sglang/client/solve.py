"""Solves one question: samples a group of traces, votes, ends the group when that is decided."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from step_sglang import protocol
from step_sglang.client.engine import EngineSource
from step_sglang.client.errors import ClientError, NoStepError, ServerError, ServerGoneError
from step_sglang.client.http import AsyncClient
from step_sglang.client.result import Result, SolveProgress, progress_of, result_of
from step_sglang.client.sampling import Sampling
from step_sglang.client.servers import avoid, servers, taking
from step_sglang.client.source import Messages, TraceSource, reading_chunks
from step_sglang.voting.answers import Extractor, extractor_named
from step_sglang.voting.classes import Same
from step_sglang.voting.effort import effort_point
from step_sglang.voting.request import MAX_TRACES, is_greedy
from step_sglang.voting.session import STREAM_INTERVAL, VoteRules, VoteSession
from step_sglang.voting.suffix import default_suffix
from step_sglang.voting.verifier import AnswerVerifier, Comparison

DEFAULT_N = 64
DEFAULT_TIMEOUT = 600.0
DEFAULT_EFFORT = "thorough"
# Up to the context, however long that is.
DEFAULT_SAMPLING: Mapping[str, Any] = {**asdict(Sampling()), "max_new_tokens": None}
_REPORT_INTERVAL = 0.1  # seconds between two progress reports


async def asolve(
    question: str | Messages | Sequence[int],
    n: int = DEFAULT_N,
    *,
    url: str | Sequence[str] | None = None,
    engine: Any = None,
    vote: str = protocol.DEFAULT_VOTE,
    early: str | None = None,
    threshold: float | None = None,
    shrink: float | None = None,
    prune_at: float | None = None,
    effort: str | float = DEFAULT_EFFORT,
    extract: str | Extractor = "boxed",
    same: Same | None = None,
    sampling: Mapping[str, Any] | None = None,
    chat: bool = True,
    suffix: str | None = None,
    group: str | None = None,
    api_key: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    on_progress: Callable[[SolveProgress], None] | None = None,
) -> Result:
    r"""Sample ``n`` traces of a question as one group and vote on their answers.

    Args:
        question: a user message, a whole chat (a list of messages), or token ids.
        n: traces; 1 is a single trace with its score.
        url: a server started with ``--enable-step``, or a list of some: the question goes to the
            one with the fewest open questions of this process, and to another if that does not
            answer. Give this or ``engine``.
        engine: an ``sgl.Engine(enable_step=True, ...)`` of this process.
        vote: ``calibrated`` by the odds of being right that the server's scorer file states (as
            ``weighted`` where it states none), ``weighted`` by trace score, ``majority``, ``best``.
        early: end the group when no outcome of the open traces can change the answer (``exact``),
            also when that is improbable (``posterior``), or never (``off``). This and the next
            three are by default what ``effort`` sets.
        threshold: of the posterior rule, the probability that the answer would change.
        shrink: end the least promising traces once fewer settle the vote: the probability that the
            vote of all would differ; 0 is never. Needs a key that may abort requests.
        prune_at: the share of the KV pool that the group may hold before its worst trace is pruned.
        effort: ``fast``, ``balanced``, ``thorough``, or a number from 0 (fast) to 1 (thorough).
        extract: reads the answer of a trace: ``boxed``, ``choice``, ``number``, or a function of
            its text that returns None when there is none.
        same: whether two answers mean the same; default: math-verify, in a child process.
        sampling: SGLang sampling parameters, over the paper's (temperature 0.6, top_p 0.95,
            top_k 20). Without ``max_new_tokens`` a trace may fill the context.
        chat: render the question with the chat template; False sends the text as it is.
        suffix: appended to a question that is a user message; default: what asks for a boxed
            answer, where ``extract`` is ``boxed`` (nothing for the embedded reasoner).
        group: the group's name; default: a new one.
        api_key: sent as a bearer token.
        timeout: seconds without anything from the server.
        on_progress: called at most ten times a second, and at the end.

    Raises:
        ClientError: the arguments contradict each other or are out of range (n: 1 to 4096).
        VoteError: there is no such vote, early-finish rule, effort or extractor.
        NoStepError: the server runs without STEP.
        RequestRefused: the server refused the request.
        ServerGoneError: the server went away in the middle; what had arrived is in ``.result``.
        ServerError: it does not answer, or not as an SGLang server of this version.
    """
    dial = effort_point(effort)
    rules = VoteRules(
        vote,
        dial.early if early is None else early,
        dial.threshold if threshold is None else threshold,
        dial.shrink if shrink is None else shrink,
    )
    extractor = extract if callable(extract) else extractor_named(extract)
    _check_numbers(n, timeout, {"prune_at": prune_at, **(sampling or {})})
    started = time.perf_counter()

    async def ask(source: TraceSource) -> Result:
        nonlocal suffix
        verifier = AnswerVerifier()  # starts nothing unless it is asked
        try:
            params = {**DEFAULT_SAMPLING, **(sampling or {})}
            asked = question
            if isinstance(question, str) and question and chat:
                if suffix is None and extract == "boxed":
                    suffix = default_suffix(await source.model())
                asked = question + (suffix or "")
            share = dial.prune_at if prune_at is None else prune_at
            body = await _body(source, asked, chat, n, params, group, share)
            session = VoteSession(n, rules, extractor, params["max_new_tokens"], same)
            # What the caller compares by runs in a thread: it may take long.
            comparison = verifier.comparison() if same is None else None
            await _gather(source, body, session, comparison, started, on_progress)
            return result_of(session, time.perf_counter() - started)
        finally:
            verifier.close()
            await source.close()

    if (url is None) is (engine is None):
        raise ClientError("give either url, a running server, or engine, an sgl.Engine")
    if url is None:
        return await ask(EngineSource(engine))
    untried = list(servers(url))
    while True:
        try:
            with taking(untried) as chosen:
                result = await ask(AsyncClient(chosen, timeout, api_key))
        except ServerError as error:
            untried.remove(chosen)
            # Of another kind: it did answer, and another server would say the same, or text is
            # there already.
            if type(error) is not ServerError or not untried:
                raise
        else:
            if result.turned_away:
                avoid(chosen)
            return result


def solve(question: str | Messages | Sequence[int], n: int = DEFAULT_N, **options: Any) -> Result:
    """:func:`asolve` for programs without an event loop; the same arguments and errors.

    With an engine it runs on the engine's own loop, as ``Engine.generate`` does.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise ClientError("solve() would block the running event loop: await asolve() instead")
    engine = options.get("engine")
    if engine is not None and options.get("url") is None:
        solved: Result = engine.loop.run_until_complete(asolve(question, n, **options))
        return solved
    return asyncio.run(asolve(question, n, **options))


def _check_numbers(n: int, timeout: float, given: Mapping[str, Any]) -> None:
    """Refuse what a server would refuse only later, or in words of its own."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_TRACES:
        raise ClientError(f"n must be an integer from 1 to {MAX_TRACES}, not {n!r}")
    if not timeout > 0:
        raise ClientError(f"timeout must be a number of seconds above 0, not {timeout!r}")
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ClientError(f"{name} must be a finite number, not {value}")
    limit = given.get("max_new_tokens")
    if isinstance(limit, int) and limit < 1:
        raise ClientError(f"max_new_tokens must be at least 1, not {limit}")
    if n > 1 and is_greedy(given.get("temperature")):
        raise ClientError("n > 1 needs a temperature above 0: at 0 all traces are the same")


async def _body(
    source: TraceSource,
    question: str | Messages | Sequence[int],
    chat: bool,
    n: int,
    params: Mapping[str, Any],
    group: str | None,
    prune_at: float,
) -> dict[str, Any]:
    if not question:
        raise ClientError("the question is empty")
    prompt: dict[str, Any]
    if not isinstance(question, str) and isinstance(question[0], int):
        prompt = {"input_ids": list(question)}
    elif isinstance(question, str) and not chat:
        prompt = {"text": question}
    else:
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        prompt = {"input_ids": await source.render(messages)}  # type: ignore[arg-type]
    custom = params.get("custom_params") or {}
    if protocol.REQUEST_KEY in custom or "n" in params:
        raise ClientError("sampling must not hold n or custom_params.step: solve() sets both")
    step: dict[str, Any] = {protocol.STEP_SCORES: True}
    if group is not None:
        step[protocol.GROUP] = group
    if prune_at != 1:
        step[protocol.PRUNE_AT] = prune_at
    return {
        **prompt,
        "sampling_params": {
            "skip_special_tokens": False,
            "stream_interval": STREAM_INTERVAL,
            **params,
            "n": n,
            "custom_params": {**custom, protocol.REQUEST_KEY: step},
        },
    }


async def _gather(
    source: TraceSource,
    body: dict[str, Any],
    session: VoteSession,
    comparison: Comparison | None,
    started: float,
    on_progress: Callable[[SolveProgress], None] | None,
) -> None:
    session.started = time.perf_counter()
    reported = 0.0
    chunks = source.stream(body)
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if _feed(session, chunk):
                    await _count(session, comparison)
                    if session.decided():
                        break
                    if ended := session.surplus():
                        await source.end_traces(ended)
                if on_progress is not None and time.perf_counter() - reported > _REPORT_INTERVAL:
                    reported = time.perf_counter()
                    on_progress(progress_of(session))
    except ServerError as error:
        if type(error) is not ServerError or not any(t.meta_info for t in session.traces):
            raise
        await _count(session, comparison)
        result = result_of(session, time.perf_counter() - started)
        raise ServerGoneError(f"{error}; {_arrived(result)}", result) from error
    session.cancel()
    if on_progress is not None:
        on_progress(progress_of(session))


async def _count(session: VoteSession, comparison: Comparison | None) -> None:
    if comparison is None:
        await asyncio.to_thread(session.count)
    else:
        await comparison.arun(session.counting())


def _feed(session: VoteSession, chunk: Mapping[str, Any]) -> bool:
    with reading_chunks():
        if protocol.META_KEY not in chunk["meta_info"]:
            # An abort of a request that never ran carries no step data.
            reason = chunk["meta_info"].get("finish_reason") or {}
            if reason.get("type") != "abort":
                raise NoStepError(
                    "the server runs without STEP, so its traces have no score: start it with "
                    "--enable-step --step-scorer S (an engine with enable_step=True)"
                )
        return session.feed(chunk)


def _arrived(result: Result) -> str:
    ended = sum(trace.finish_reason is not None for trace in result.traces)
    return f"{ended} of {len(result.traces)} traces had ended, see the error's `result`"
