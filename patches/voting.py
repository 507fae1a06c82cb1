"""The hook that votes: a request becomes a group inside the tokenizer manager."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches import sessions
from step_sglang.patches.aborts import LiveVote, abort_reason, end_traces, live_votes
from step_sglang.patches.choices import PROGRESS, leaves_out, without_pruned
from step_sglang.patches.page import following
from step_sglang.patches.parsed import hand_out, parse_prompts, parsed_of, set_parsed, takes_part
from step_sglang.patches.server_args import config_of
from step_sglang.patches.votes import vote_begins, vote_ended
from step_sglang.pruning.request import StepRequest
from step_sglang.voting.one_choice import VoteProgress, not_voted, one_choice, run, session_of
from step_sglang.voting.request import ParsedRequest, VoteRequest, trace_params, without_vote
from step_sglang.voting.verifier import SERVER_BUDGET, AnswerVerifier, Comparison

# Starts nothing until an answer needs it.
_verifier = AnswerVerifier(budget=SERVER_BUDGET, children=2, spare=True)

Generate = Callable[..., AsyncGenerator[Any, None]]


def generate_request(original: Generate, manager: Any, obj: Any, request: Any = None) -> Any:
    """AROUND ``TokenizerManager.generate_request``, an asynchronous generator."""
    config = config_of(manager.server_args)
    if config is None or not takes_part(obj):
        return original(manager, obj, request)
    voted = any(parsed.vote is not None for parsed in parse_prompts(obj, config))
    sessions.lead_to_trace(manager, obj)
    if not voted:
        chunks = original(manager, obj, request)
        if leaves_out(obj, config):
            return without_pruned(chunks, obj, manager.incremental_streaming_output)
        return chunks
    why = sessions.why_unvoted(manager, obj)
    if why is not None:
        _take_no_vote(obj, config)
        return not_voted(original(manager, obj, request), why)
    setattr(obj, PROGRESS, VoteProgress())
    return _answers(original, manager, obj, request, config)


def _take_no_vote(obj: Any, config: StepConfig) -> None:
    """Make a request an ordinary one, or a trace if it said so."""
    parsed = parse_prompts(obj, config)
    set_parsed(obj, *(replace(one, vote=None) for one in parsed))

    def ordinary(params: dict[str, Any]) -> dict[str, Any]:
        if "custom_params" not in params:
            return params
        return {**params, "custom_params": without_vote(params["custom_params"])}

    params = obj.sampling_params
    if isinstance(params, list):
        obj.sampling_params = [ordinary(one) for one in params]
    elif params is not None:
        obj.sampling_params = ordinary(params)


async def _answers(
    original: Generate, manager: Any, obj: Any, request: Any, config: StepConfig
) -> AsyncGenerator[Any, None]:
    obj.normalize_batch_and_arguments()
    items = hand_out(obj)
    voted = [item for item in items if parsed_of(item).vote is not None]
    with live_votes(manager, voted, request) as votes:
        tasks = [
            asyncio.ensure_future(
                _answer(original, manager, item, request, config, obj, votes[item.rid])
                if item.rid in votes
                else _unvoted_answer(original, manager, item, request)
            )
            for item in items
        ]
        answers: list[dict[str, Any]] = []
        try:
            if obj.stream:
                for done in asyncio.as_completed(tasks):
                    answer = await done
                    if not obj.is_single:
                        answer["index"] = obj.rid.index(answer["meta_info"]["id"])
                    yield answer
            else:
                answers = await asyncio.gather(*tasks)
        finally:
            # One that failed ends the others: cancelled, each closes its own group.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    # Once the ids are free: whoever gets this asks for no more, and a client may use its id again.
    if not obj.stream:
        yield answers[0] if obj.is_single else answers


async def _unvoted_answer(
    original: Generate, manager: Any, item: Any, request: Any
) -> dict[str, Any]:
    """The answer to a prompt of a batch in which others are voted."""
    inner = copy.copy(item)
    inner.stream = False
    return dict(await anext(original(manager, inner, request)))


async def _answer(
    original: Generate,
    manager: Any,
    item: Any,
    request: Any,
    config: StepConfig,
    whole: Any,
    live: LiveVote,
) -> dict[str, Any]:
    """One prompt's voted answer in the form of a request without a vote."""
    parsed = parsed_of(item)
    wish = parsed.vote
    assert wish is not None
    if item.return_logprob and manager.incremental_streaming_output:
        raise RequestError(
            "log-probabilities of a voted answer need a server without "
            "--incremental-streaming-output"
        )
    inner = copy.copy(item)
    inner.__dict__.pop("_sub_obj_cache", None)
    inner.regenerate_rid()
    inner.stream = True
    inner.sampling_params = trace_params(item.sampling_params, wish, config)
    trace = parsed.trace or StepRequest()
    set_parsed(inner, ParsedRequest(trace, voted=True, extract=wish.extract))
    session = session_of(wish, _length_limit(wish, inner))
    vote_begins(live, inner)
    comparison = _verifier.comparison()
    getattr(whole, PROGRESS).sessions.append(session)
    chunks = original(manager, inner, request)
    connected = None if request is None else _connection(manager, request, item, comparison)
    check = partial(_raise_errors, whole.stream)
    try:
        with following(manager, session):
            last = await run(
                chunks, session, check, connected, comparison, live.is_aborted,
                partial(end_traces, manager),
            )  # fmt: skip
    finally:
        best = session.outcome().best
        if best is not None:
            await sessions.answered(manager, item, session.traces[best])
    aborted = abort_reason() if live.aborted else None
    if aborted is None:
        vote_ended(manager, live, session)
    return one_choice(
        session, last, item.rid, aborted=aborted, before_start=live.answer_before_start
    )


def _length_limit(wish: VoteRequest, inner: Any) -> int | None:
    limit = inner.sampling_params.get("max_new_tokens", 128)  # SGLang's own default
    return limit if isinstance(limit, int) else None


def _connection(manager: Any, request: Any, item: Any, comparison: Comparison) -> Callable[[], Any]:
    rid = item.rid

    async def connected() -> None:
        if manager.gracefully_exit:
            comparison.stop()
        if not item.background and await request.is_disconnected():
            raise ValueError(f"Request is disconnected from the client side. Abort request {rid=}")

    return connected


def _raise_errors(stream: bool, chunk: dict[str, Any]) -> None:
    """What SGLang raises for a request that does not stream; a ValueError alone for one that does.

    A trace's abort without a status code is no error.
    """
    from fastapi import HTTPException

    reason = chunk["meta_info"].get("finish_reason") or {}
    status = reason.get("status_code")
    if reason.get("type") != "abort" or status is None:
        return
    if stream or status == 400:
        raise ValueError(reason["message"])
    raise HTTPException(status_code=status, detail=reason["message"])
