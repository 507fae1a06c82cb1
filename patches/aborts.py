"""Live voted requests by their ids, so that SGLang's aborts and its refusal of a second id hold.

The traces of such a request run under ids of their own. SGLang's table of requests holds its id
too, as it does for an ordinary request; what an abort of it means is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol
from step_sglang.patches import peers
from step_sglang.patches.parsed import parsed_of

_VOTES = "step_votes"  # on the tokenizer manager
# In SGLang's own message for an abort, in the place of its text: a vote does not need the trace.
END_MESSAGE = f"step: {protocol.PRUNED_FOR_VOTE}"


@dataclass
class LiveVote:
    """A voted request that is not answered yet."""

    manager: Any
    rid: str
    state: Any  # SGLang's, which never gets an output from the scheduler
    aborted: bool = False

    def is_aborted(self) -> bool:
        """Whether its client, or whoever may abort requests, wants it to end."""
        return self.aborted

    def answer_before_start(self) -> dict[str, Any]:
        """SGLang's own answer to a request that is aborted before anything of it ran."""
        from sglang.srt.managers.io_struct import AbortReq

        self.manager._handle_abort_req(AbortReq(rid=self.rid))
        return dict(self.state.out_list[-1])


def abort_reason() -> dict[str, Any]:
    """The ``finish_reason`` of a request that was aborted while it ran."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return dict(FINISH_ABORT().to_json())


def _votes(manager: Any) -> dict[str, LiveVote]:
    votes: dict[str, LiveVote] | None = getattr(manager, _VOTES, None)
    if votes is None:
        votes = {}
        setattr(manager, _VOTES, votes)
    return votes


@contextmanager
def live_votes(manager: Any, items: list[Any], request: Any) -> Iterator[dict[str, LiveVote]]:
    """Hold the ids of voted requests while they live; refuses one that lives already.

    Raises:
        ValueError: SGLang's, for an id in use.
    """
    votes = _votes(manager)
    mine: dict[str, LiveVote] = {}
    try:
        for item in items:
            manager._init_req_state(item, request)
            state = manager.rid_to_state[item.rid]
            state.lora_released = True  # the adapter is held by the traces alone
            votes[item.rid] = mine[item.rid] = LiveVote(manager, item.rid, state)
        yield mine
    finally:
        for rid, vote in mine.items():
            if votes.get(rid) is vote:
                del votes[rid]
            if manager.rid_to_state.get(rid) is vote.state:
                del manager.rid_to_state[rid]
            vote.state.time_stats.set_finished_time()


def abort_request(result: None, manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """AFTER ``TokenizerManager.abort_request``, which ignores the id of no live request.

    The scheduler then ends every request whose id begins with that, and so does this. Several
    tokenizer workers ignore no id: the request may be another's.
    """
    known = rid in manager.rid_to_state
    if abort_all or (rid and (known or peers.several())):
        abort_votes(manager, None if abort_all else rid)
    if abort_all or (rid and not known):
        peers.tell_others({protocol.ASK_ABORT_VOTES: None if abort_all else rid})


def abort_votes(manager: Any, rid: str | None) -> None:
    """Abort this worker's votes whose id begins so; None: all of them."""
    for name, vote in _votes(manager).items():
        if rid is None or name.startswith(rid):
            vote.aborted = True


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
            manager._dispatch_to_scheduler(AbortReq(rid=rid, abort_message=END_MESSAGE))
            asked += 1
    return asked
