"""Hooks on SGLang's HTTP endpoints, around the answers that ``voting`` and ``choices`` form."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

from step_sglang.errors import RequestError
from step_sglang.patches.choices import PROGRESS, add_usage, for_openai, leaves_out
from step_sglang.patches.parsed import parse_prompts, takes_part
from step_sglang.patches.server_args import config_of
from step_sglang.pruning.request import unpacked
from step_sglang.voting.one_choice import kept_alive
from step_sglang.voting.request import parse_vote
from step_sglang.voting.suffix import default_suffix, needs_suffix


def convert_chat(serving: Any, request: Any, raw_request: Any = None) -> None:
    """BEFORE a chat becomes a prompt: where answers are read from a box, ask for one.

    What `ask` and `solve` do too. A chat that speaks of a box already stays as it is.
    """
    server_args = serving.tokenizer_manager.server_args
    config = config_of(server_args)
    if config is None or not request.messages:
        return
    custom, session = unpacked(request.custom_params, request.session_params)
    request.custom_params, request.session_params = custom, session
    try:
        wish = parse_vote({"n": request.n, "custom_params": custom}, config)
    except RequestError:
        return  # the request itself will be refused for it
    last = request.messages[-1]
    if wish is None or last.role != "user":
        return
    suffix = wish.suffix
    if suffix is None:
        texts = (str(message.content) for message in request.messages)
        suffix = default_suffix(server_args.model_path, wish.extract) if needs_suffix(texts) else ""
    if suffix:
        asked = last.model_copy(update={"content": _with_suffix(last.content, suffix)})
        request.messages = [*request.messages[:-1], asked]


def _with_suffix(content: Any, suffix: str) -> Any:
    """A message's text, or its parts, of which the last text gets the suffix."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionMessageContentTextPart

    if isinstance(content, str):
        return content + suffix
    parts = list(content or ())
    texts = [place for place, part in enumerate(parts) if part.type == "text"]
    if not texts:  # images alone
        return [*parts, ChatCompletionMessageContentTextPart(type="text", text=suffix)]
    last = parts[texts[-1]]
    parts[texts[-1]] = last.model_copy(update={"text": last.text + suffix})
    return parts


def generate_stream(
    original: Callable[..., AsyncGenerator[str, None]],
    serving: Any,
    adapted_request: Any,
    request: Any,
    raw_request: Any,
) -> AsyncGenerator[str, None]:
    """AROUND the generators behind streamed chat and text completions."""
    for_openai(adapted_request)
    chunks = original(serving, adapted_request, request, raw_request)
    if not _keeps_client_waiting(serving.tokenizer_manager, adapted_request):
        return chunks
    return kept_alive(chunks, partial(_comment, adapted_request), str)


async def answer_whole(
    original: Callable[..., Awaitable[Any]],
    serving: Any,
    adapted_request: Any,
    request: Any,
    raw_request: Any,
) -> Any:
    """AROUND the handlers of chat and text completions that are not streamed."""
    for_openai(adapted_request)
    response = await original(serving, adapted_request, request, raw_request)
    add_usage(response, adapted_request)
    return response


async def serve_generate_request(original: Callable[..., Any], obj: Any, request: Any) -> Any:
    """AROUND ``serve_generate_request``, the handler of ``/generate``."""
    from sglang.srt.entrypoints import http_server

    manager = http_server._global_state.tokenizer_manager
    waits = obj.stream and _keeps_client_waiting(manager, obj)
    response = await original(obj, request)
    if waits:
        response.body_iterator = kept_alive(
            response.body_iterator, partial(_comment, obj), str.encode
        )
    return response


def _keeps_client_waiting(manager: Any, obj: Any) -> bool:
    """Whether a stream holds text back, so that comments have to keep its connection alive."""
    config = config_of(manager.server_args)
    if config is None or not takes_part(obj):
        return False
    try:
        parsed = parse_prompts(obj, config)
    except RequestError:
        return False  # the request itself will be refused for it
    return any(one.vote is not None for one in parsed) or leaves_out(obj, config)


def _comment(obj: Any) -> str | None:
    progress = getattr(obj, PROGRESS, None)
    return None if progress is None else progress.comment()
