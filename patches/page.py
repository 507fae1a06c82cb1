"""The live page on SGLang's HTTP server: the page, its feed, and how a browser shows its key."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import aclosing, contextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.live.html import LIVE_HEADERS, live_page
from step_sglang.live.hub import Hub
from step_sglang.live.votes import Finished
from step_sglang.patches.guard import guard
from step_sglang.scoring.calibration import calibration_of
from step_sglang.voting.answers import extractor_named
from step_sglang.voting.session import VoteSession

_SERVER = "sglang.srt.entrypoints.http_server"

_hub: Hub | None = None  # one HTTP server per process
_config: StepConfig | None = None


def add_page(app: Any, config: StepConfig, *, several: bool = False) -> None:
    """Add the page and its feed to SGLang's HTTP server.

    Where this is one of several tokenizer workers, each would have a part of the feed.
    """
    global _config  # noqa: PLW0603
    if config.page == "off":
        return
    if several:
        for path in (protocol.PAGE_PATH, protocol.EVENTS_PATH):
            app.add_api_route(path, refuse_several, methods=["GET"], include_in_schema=False)
        return
    _config = config
    app.add_api_route(protocol.PAGE_PATH, show_page, methods=["GET"], include_in_schema=False)
    app.add_api_route(protocol.EVENTS_PATH, send_events, methods=["GET"], include_in_schema=False)


async def refuse_several() -> JSONResponse:
    """GET the page or its feed of one of several workers."""
    return _refusal("the live page needs a server with --tokenizer-worker-num 1", 501)


async def show_page() -> HTMLResponse:
    """GET /step."""
    return HTMLResponse(live_page(), headers=LIVE_HEADERS)


async def send_events(request: Request) -> Response:
    """GET /step/events: the feed, as server-sent events."""
    # A browser adds the key by itself, also when another site's page asks for the feed.
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return _refusal("the feed is for the server's own page", 403)
    manager = _manager()
    if manager.gracefully_exit:
        return _refusal("the server is about to end", 503)
    hub = _the_hub(manager)
    if hub.full:
        return _refusal("as many look at this server's traces as may", 503)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(manager, hub), media_type="text/event-stream", headers=headers)


def _refusal(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status)


async def _events(manager: Any, hub: Hub) -> AsyncGenerator[bytes, None]:
    yield b"retry: 1000\n\n"
    async with aclosing(hub.watch()) as updates:
        async for update in updates:
            if manager.gracefully_exit:  # or the server would wait for its viewers
                return
            yield b": nothing new\n\n" if update is None else b"data: " + update + b"\n\n"


def _manager() -> Any:
    return sys.modules[_SERVER]._global_state.tokenizer_manager


def _the_hub(manager: Any) -> Hub:
    global _hub  # noqa: PLW0603
    if _hub is None:
        assert _config is not None

        async def ask() -> list[bytes]:
            return await _ask(manager, protocol.FEED_NEXT)

        async def stop() -> None:
            await _ask(manager, protocol.FEED_STOP)

        def read_tokens(ids: Any) -> str:
            return "" if manager.tokenizer is None else str(manager.tokenizer.decode(list(ids)))

        _hub = Hub(ask, stop, read_tokens, _config.vote, extractor_named(_config.extract))
    return _hub


async def _ask(manager: Any, question: str) -> list[bytes]:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=question))
    return [answer.internal_state[protocol.FEED] for answer in answers]


def trace_finished(meta_info: Mapping[str, Any], state: Any) -> None:
    """A trace's last chunk was put together, but for its text."""
    if _hub is None or not _hub.watched:
        return
    with guard(protocol.IN_PAGE):
        step = meta_info[protocol.META_KEY]
        calibration = calibration_of(step.get(protocol.META_CALIBRATION))
        score = step[protocol.META_SCORE]
        _hub.finished(Finished(meta_info["id"], score, calibration, state.get_text))


@contextmanager
def following(manager: Any, session: VoteSession) -> Iterator[None]:
    """Show a vote of the server's own, while the context lasts."""
    if _config is None:
        yield
        return
    with _the_hub(manager).following(session):
        yield


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class BrowserLogin:
    """Lets a browser show the server's key, which it can only as a password.

    On the page's own paths a password counts as the key: it is put where SGLang looks for the key,
    and SGLang decides. Its refusal asks the browser for a password.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        paths = (protocol.PAGE_PATH, protocol.EVENTS_PATH)
        path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
        if scope["type"] != "http" or path not in paths:
            await self._app(scope, receive, send)
            return

        async def asking(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                asks = (b"www-authenticate", b'Basic realm="the API key of this server"')
                message = {**message, "headers": [*message["headers"], asks]}
            await send(message)

        headers = [(name, _as_bearer(name, value)) for name, value in scope["headers"]]
        await self._app({**scope, "headers": headers}, receive, asking)


def _as_bearer(name: bytes, value: bytes) -> bytes:
    kind, _, rest = value.partition(b" ")
    if name.lower() != b"authorization" or kind.lower() != b"basic":
        return value
    try:
        _, _, password = base64.b64decode(rest, validate=True).partition(b":")
    except binascii.Error:
        return value
    return b"Bearer " + password


def add_api_key_middleware(result: None, app: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``add_api_key_middleware``: what is added later sees a request earlier."""
    if _config is not None:
        app.add_middleware(BrowserLogin)
