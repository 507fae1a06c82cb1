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
from step_sglang.patches.aborts import end_traces
from step_sglang.patches.page import add_page
from step_sglang.patches.parsed import parsed_of
from step_sglang.pruning.request import check_group_id

_SERVER = "sglang.srt.entrypoints.http_server"
_LOOK_AGAIN = 0.05  # seconds


def add_endpoints(config: StepConfig) -> None:
    """Add the endpoints to SGLang's HTTP server, if this process runs one."""
    server = sys.modules.get(_SERVER)
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
    add_page(server.app, config)


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
    manager = sys.modules[_SERVER]._global_state.tokenizer_manager
    aborted: set[str] = set()
    # Again and again: with n > 1 the samples begin after the prompt was computed.
    while members := _members(manager, group):
        for rid in members - aborted:
            manager.abort_request(rid)
        aborted |= members
        if await request.is_disconnected():
            break
        await asyncio.sleep(_LOOK_AGAIN)
    return JSONResponse({protocol.GROUP: group, protocol.ABORTED: len(aborted)})


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
    manager = sys.modules[_SERVER]._global_state.tokenizer_manager
    return JSONResponse({protocol.ENDED: end_traces(manager, rids)})


def _members(manager: Any, group: str) -> set[str]:
    return {rid for rid, state in manager.rid_to_state.items() if _group(state.obj, rid) == group}


def _group(obj: Any, rid: str) -> str | None:
    """The group of a request that the tokenizer manager holds; its own id if it named none."""
    trace = parsed_of(obj).trace
    return None if trace is None else trace.group or rid
