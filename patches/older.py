"""Hook bodies for the older forms of ``adapters``."""

from __future__ import annotations

from typing import Any

from step_sglang import protocol
from step_sglang.patches.forward import active
from step_sglang.patches.guard import guard
from step_sglang.patches.scheduler import create_generation_req
from step_sglang.patches.state import trace_of
from step_sglang.pruning.groups import TraceStatus


def born_in_queue(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler._add_request_to_queue``: one that comes back to it has its trace."""
    if trace_of(req) is None:
        create_generation_req(req, scheduler)


def played_from_queue(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler._add_request_to_queue``: one that comes back plays what it played."""
    from step_sglang.patches.virtual import hooks

    if not hooks.plays(req):
        hooks.create_generation_req(req, scheduler)


@guard(protocol.IN_RESPONSES)
def output_sent(result: None, sender: Any, output: Any, recv_obj: Any = None) -> None:
    """AFTER ``SenderWrapper.send_output``: of all that is sent, the ends of aborted requests."""
    from sglang.srt.managers.io_struct import AbortReq

    scoring, trace = active(), trace_of(recv_obj)
    if scoring is not None and trace is not None and isinstance(output, AbortReq):
        scoring.groups.end(trace, TraceStatus.ABORTED)
