"""Ends single traces that a vote does not need: from the tokenizer manager to the scheduler.

SGLang's own message for an abort carries it, with a word in the place of its text: a running trace
is then pruned, which frees its memory at once and says why it ended; any other is aborted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from step_sglang import protocol
from step_sglang.patches.guard import guard
from step_sglang.patches.parsed import parsed_of
from step_sglang.patches.state import state_of, trace_of

_MESSAGE = f"step: {protocol.PRUNED_FOR_VOTE}"


def end_traces(manager: Any, rids: Iterable[str]) -> int:
    """Ask the scheduler to end traces; ids that live no more, or are no traces, do nothing.

    Returns:
        How many were asked for.
    """
    from sglang.srt.managers.io_struct import AbortReq

    asked = 0
    for rid in rids:
        state = manager.rid_to_state.get(rid)
        if state is not None and not state.abort_sent and parsed_of(state.obj).trace is not None:
            manager._dispatch_to_scheduler(AbortReq(rid=rid, abort_message=_MESSAGE))
            asked += 1
    return asked


def abort_request(original: Callable[[Any, Any], None], scheduler: Any, recv_req: Any) -> None:
    """AROUND ``Scheduler.abort_request``: a running trace that a vote does not need is pruned.

    All ranks get the message in the same iteration.
    """
    if recv_req.abort_message != _MESSAGE:
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
