"""The HTTP endpoints of STEP; here are those that abort a group, or end single traces.

A group's requests are told by what they said of STEP.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches import peers
from step_sglang.patches.aborts import end_traces
from step_sglang.patches.page import add_page
from step_sglang.patches.parsed import parsed_of
from step_sglang.pruning.request import check_group_id

SERVER = "sglang.srt.entrypoints.http_server"
_LOOK_AGAIN = 0.05  # seconds


def add_endpoints(config: StepConfig, *, several: bool = False) -> None:
    """Add the endpoints to SGLang's HTTP server, if this process runs one.

    Args:
        config: STEP's settings.
        several: this process is one of several tokenizer workers.
    """
    server = sys.modules.get(SERVER)
    if server is None or any(
        getattr(route, "path", "") == protocol.ABORT_GROUP_PATH for route in server.app.routes
    ):
        return
    from sglang.srt.utils.auth import AuthLevel, auth_level

    # Who may abort requests may abort groups.
    for path, function in (
        (protocol.ABORT_GROUP_PATH, abort_group),
        (protocol.END_TRACES_PATH, end_traces_of),
    ):
        endpoint = auth_level(AuthLevel.ADMIN_OPTIONAL)(function)
        server.app.add_api_route(path, endpoint, methods=["POST"])
    add_page(server.app, config, several=several)


async def abort_group(request: Request) -> JSONResponse:
    """Abort a group; answers when none of its requests is left."""
    try:
        body = json.loads(await request.body())
        if not isinstance(body, dict) or set(body) != {protocol.GROUP}:
            raise RequestError('the body must be an object such as {"group": "q1"}')
        group = check_group_id(body[protocol.GROUP], protocol.GROUP)
    except (RequestError, ValueError, RecursionError) as error:
        message = str(error) if isinstance(error, RequestError) else "the body is not JSON"
        return JSONResponse({"error": {"message": message}}, status_code=400)
    manager = sys.modules[SERVER]._global_state.tokenizer_manager
    aborted: set[str] = set()
    # Again and again: with n > 1 the samples begin after the prompt was computed.
    try:
        while members := await _abort_members_everywhere(manager, group):
            aborted |= members
            if await request.is_disconnected():
                break
            await asyncio.sleep(_LOOK_AGAIN)
    except TimeoutError:
        return _no_answer()
    return JSONResponse({protocol.GROUP: group, protocol.ABORTED: len(aborted)})


async def _abort_members_everywhere(manager: Any, group: str) -> set[str]:
    others = await peers.ask_others({protocol.ASK_ABORT_GROUP: group})
    return set(abort_members(manager, group)).union(*others)


def _no_answer() -> JSONResponse:
    message = "a tokenizer worker of this server does not answer: try again"
    return JSONResponse({"error": {"message": message}}, status_code=503)


async def end_traces_of(request: Request) -> JSONResponse:
    """End traces by their ids; answers at once how many lived."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    rids = body.get(protocol.TRACES) if isinstance(body, dict) and len(body) == 1 else None
    if not isinstance(rids, list) or not all(isinstance(rid, str) for rid in rids):
        message = 'the body must be an object such as {"traces": ["ID", "ID"]}'
        return JSONResponse({"error": {"message": message}}, status_code=400)
    manager = sys.modules[SERVER]._global_state.tokenizer_manager
    ended = end_traces(manager, rids)
    try:
        ended += sum(await peers.ask_others({protocol.ASK_END_TRACES: rids}))
    except TimeoutError:
        return _no_answer()
    return JSONResponse({protocol.ENDED: ended})


def abort_members(manager: Any, group: str) -> list[str]:
    """Abort the requests of a group that came to this process; returns which there are."""
    states = list(manager.rid_to_state.items())
    members = [rid for rid, state in states if _group(state.obj, rid) == group]
    for rid in members:
        manager.abort_request(rid)  # once: SGLang keeps in mind which it has aborted
    return members


def _group(obj: Any, rid: str) -> str | None:
    """The group of a request that the tokenizer manager holds; its own id if it named none."""
    trace = parsed_of(obj).trace
    return None if trace is None else trace.group or rid
