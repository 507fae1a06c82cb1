"""The scheduler's side of ending single traces that a vote does not need; see ``aborts``.

A running trace is pruned, which frees its memory at once and says why it ended; any other is
aborted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from step_sglang import protocol
from step_sglang.patches.aborts import END_MESSAGE
from step_sglang.patches.guard import guard
from step_sglang.patches.state import state_of, trace_of


def abort_request(original: Callable[[Any, Any], None], scheduler: Any, recv_req: Any) -> None:
    """AROUND ``Scheduler.abort_request``: a running trace that a vote does not need is pruned.

    All ranks get the message in the same iteration.
    """
    if recv_req.abort_message != END_MESSAGE:
        original(scheduler, recv_req)
        return
    dismissed = False
    with guard(protocol.IN_PRUNING):
        dismissed = _dismiss(scheduler, recv_req.rid)
    if not dismissed:
        recv_req.abort_message = None
        original(scheduler, recv_req)


def _dismiss(scheduler: Any, rid: str) -> bool:
    """Let a running trace be pruned before the next decode step; whether there is one."""
    state = state_of(scheduler)
    if state is None or state.groups.stopped is not None:
        return False
    for req in scheduler.running_batch.reqs:
        if req.rid == rid:
            trace = trace_of(req)
            if trace is None or req.finished():
                return False
            state.groups.dismiss(trace, protocol.PRUNED_FOR_VOTE)
            return True
    return False
