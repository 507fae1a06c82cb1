"""Ends a group on a server."""

from __future__ import annotations

from step_sglang.client.http import DEFAULT_TIMEOUT, Client
from step_sglang.pruning.request import check_group_id


def abort_group(
    url: str, group: str, *, api_key: str | None = None, timeout: float = DEFAULT_TIMEOUT
) -> int:
    """Abort every trace of a group, whichever request it came with.

    Args:
        url: the server, such as ``http://127.0.0.1:30000``.
        group: the id that the requests gave in ``custom_params.step.group``.
        api_key: of the server; None: what ``STEP_SGLANG_API_KEY`` says.
        timeout: seconds to wait for the last trace to end.

    Returns:
        How many requests were aborted; 0 for a group that the server does not know.

    Raises:
        RequestError: this can be no group's id.
        ServerError: the server does not answer in time, wants another key, or runs without STEP.
    """
    check_group_id(group, "group")
    with Client(url, timeout, api_key) as client:
        return client.abort_group(group)
