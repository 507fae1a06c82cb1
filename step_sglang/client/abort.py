"""Ends a group on a server, with nothing but the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from step_sglang import protocol
from step_sglang.errors import RequestError
from step_sglang.pruning.request import check_group_id


def abort_group(url: str, group: str, *, api_key: str | None = None, timeout: float = 60.0) -> int:
    """Abort every trace of a group, whichever request it came with.

    Args:
        url: the server, such as ``http://127.0.0.1:30000``.
        group: the id that the requests gave in ``custom_params.step.group``.
        api_key: of the server, if it has one.
        timeout: seconds to wait for the last trace to end.

    Returns:
        How many requests were aborted; 0 for a group that the server does not know.

    Raises:
        RequestError: the group id is none, or the server refuses the call.
        OSError: the server cannot be reached, or does not answer in time.
    """
    check_group_id(group, "group")
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    call = urllib.request.Request(
        url.rstrip("/") + protocol.ABORT_GROUP_PATH,
        data=json.dumps({protocol.GROUP: group}).encode(),
        headers=headers,
        method="POST",
    )
    try:
        with urllib.request.urlopen(call, timeout=timeout) as answer:
            return int(json.load(answer)[protocol.ABORTED])
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:500]
        raise RequestError(f"the server answered {error.code}: {detail}") from error
