"""Hooks for one-choice answers: a request becomes a group inside the tokenizer manager."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches.record import config_of
from step_sglang.voting.one_choice import (
    VoteProgress,
    VoteRequest,
    kept_alive,
    one_choice,
    parse_vote,
    run,
    session_of,
    trace_params,
)
from step_sglang.voting.verifier import AnswerVerifier

_PROGRESS = "step_progress"  # on the request object, which its HTTP handler holds too
_verifier = AnswerVerifier()  # starts nothing until an answer needs it

Generate = Callable[..., AsyncGenerator[Any, None]]


def generate_request(original: Generate, manager: Any, obj: Any, request: Any = None) -> Any:
    """AROUND ``TokenizerManager.generate_request``, an asynchronous generator."""
    config = config_of(manager.server_args)
    if config is None or not _wishes(obj, config):
        return original(manager, obj, request)
    setattr(obj, _PROGRESS, VoteProgress())
    return _answers(original, manager, obj, request, config)


def _wishes(obj: Any, config: StepConfig) -> bool:
    """Whether any request of a batch is to be voted; raises RequestError."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        return False
    if isinstance(obj.rid, str) and obj.rid.startswith(HEALTH_CHECK_RID_PREFIX):
        return False
    params = obj.sampling_params
    every = params if isinstance(params, list) else [params or {}]
    return any([parse_vote(each, config) is not None for each in every])


async def _answers(
    original: Generate, manager: Any, obj: Any, request: Any, config: StepConfig
) -> AsyncGenerator[Any, None]:
    obj.normalize_batch_and_arguments()
    items = [obj] if obj.is_single else [obj[i] for i in range(obj.batch_size)]
    tasks = [
        asyncio.ensure_future(_answer(original, manager, item, request, config, obj))
        for item in items
    ]
    try:
        if not obj.stream:
            answers = await asyncio.gather(*tasks)
            yield answers[0] if obj.is_single else answers
            return
        for done in asyncio.as_completed(tasks):
            answer = await done
            if not obj.is_single:
                answer["index"] = obj.rid.index(answer["meta_info"]["id"])
            yield answer
    finally:
        # One that failed ends the others: cancelled, each closes its own group.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(
    original: Generate, manager: Any, item: Any, request: Any, config: StepConfig, whole: Any
) -> dict[str, Any]:
    """One prompt's answer in the form of a request without a vote."""
    wish = parse_vote(item.sampling_params, config)
    inner = copy.copy(item)
    inner.__dict__.pop("_sub_obj_cache", None)
    inner.regenerate_rid()
    if wish is None:
        inner.stream = False
        answer = await anext(original(manager, inner, request))
        answer["meta_info"]["id"] = item.rid
        return dict(answer)
    if item.return_logprob and manager.incremental_streaming_output:
        raise RequestError(
            "log-probabilities of a voted answer need a server without "
            "--incremental-streaming-output"
        )
    inner.stream = True
    inner.sampling_params = trace_params(item.sampling_params, wish, config)
    session = session_of(wish, _verifier.same, _length_limit(wish, inner))
    getattr(whole, _PROGRESS).sessions.append(session)
    chunks = original(manager, inner, request)
    connected = None if request is None else _connection(request, item.rid)
    check = partial(_raise_errors, whole.stream)
    last = await run(chunks, session, check, connected)
    return one_choice(session, last, item.rid)


def _length_limit(wish: VoteRequest, inner: Any) -> int | None:
    limit = inner.sampling_params.get("max_new_tokens", 128)  # SGLang's own default
    return limit if isinstance(limit, int) else None


def _connection(request: Any, rid: str) -> Callable[[], Any]:
    async def connected() -> None:
        if await request.is_disconnected():
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


def generate_stream(
    original: Generate, serving: Any, adapted_request: Any, request: Any, raw_request: Any
) -> AsyncGenerator[str, None]:
    """AROUND the generators behind streamed chat and text completions."""
    chunks = original(serving, adapted_request, request, raw_request)
    if not _is_voted(serving.tokenizer_manager, adapted_request):
        return chunks
    return kept_alive(chunks, partial(_comment, adapted_request), str)


async def serve_generate_request(original: Callable[..., Any], obj: Any, request: Any) -> Any:
    """AROUND ``serve_generate_request``, the handler of ``/generate``."""
    from sglang.srt.entrypoints import http_server

    voted = obj.stream and _is_voted(http_server._global_state.tokenizer_manager, obj)
    response = await original(obj, request)
    if voted:
        response.body_iterator = kept_alive(
            response.body_iterator, partial(_comment, obj), str.encode
        )
    return response


def _is_voted(manager: Any, obj: Any) -> bool:
    config = config_of(manager.server_args)
    try:
        return config is not None and _wishes(obj, config)
    except RequestError:
        return False  # the request itself will be refused for it


def _comment(obj: Any) -> str | None:
    progress = getattr(obj, _PROGRESS, None)
    return None if progress is None else progress.comment()
