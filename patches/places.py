"""Places of pruned traces that a branch may take, and what becomes of them otherwise.

A pruned trace of a group with refill is neither finished nor answered: it gives its KV back as a
retracted request does, and its place is kept here until a branch takes it or its group has no live
trace any more. No text of such a request is sent before its end, because it may still change.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from step_sglang.patches.state import SchedulerStep, state_of, trace_of
from step_sglang.pruning.groups import Group, Trace
from step_sglang.pruning.refill import RULES

MAX_FINISHED = 256  # of a group, whose text and scores are kept; late members are without end


@dataclass(eq=False)
class Place:
    """A pruned trace's request, and what it is answered with where nothing takes its place."""

    req: Any
    message: str


@dataclass(eq=False)
class GroupPlaces:
    """Of one group with refill."""

    places: list[Place] = field(default_factory=list)
    # Requests from which others may branch, those that finished last.
    finished: deque[Any] = field(default_factory=lambda: deque(maxlen=MAX_FINISHED))
    began: int | None = None  # forward passes when its first trace did
    decided: int = 0  # likewise, when it was decided about last
    swapped: int = 0  # likewise, of the tournament


@dataclass(eq=False)
class Places:
    """Of all groups with refill of one scheduler."""

    groups: dict[Group, GroupPlaces] = field(default_factory=dict)

    def of(self, group: Group) -> GroupPlaces:
        """The group's, from now on."""
        return self.groups.setdefault(group, GroupPlaces())

    def free(self) -> int:
        """Places that nothing has taken."""
        return sum(len(known.places) for known in self.groups.values())


def places_of(state: SchedulerStep) -> Places:
    """The places of a scheduler."""
    if state.places is None:
        state.places = Places()
    places: Places = state.places
    return places


def withheld(req: Any) -> bool:
    """Whether no text of a request may be sent yet."""
    trace = trace_of(req)
    return trace is not None and trace.refills and not req.finished()


def may_be_taken(trace: Trace) -> bool:
    """Whether a branch may take the place of a trace that is about to be pruned.

    Not of one that its vote does not need: it needs no other there.
    """
    group = trace.group
    if not trace.refills or trace.ending or group.stopped or group.live < 2:
        return False
    return group.branched < RULES[trace.refill].branches * group.joined


def keep_place(state: SchedulerStep, req: Any, message: str) -> None:
    """Keep the place of a request whose trace was pruned and whose KV is released."""
    trace = trace_of(req)
    assert trace is not None
    retractions = req.retraction_count
    req.reset_for_retract()  # a result may be in flight: it is skipped, as a retracted one's is
    req.retraction_count = retractions
    places_of(state).of(trace.group).places.append(Place(req, message))


def keep_source(state: SchedulerStep, req: Any, trace: Trace) -> None:
    """A trace with refill finished; others may branch from it as long as its group lives."""
    places_of(state).of(trace.group).finished.append(req)


def abort_request(result: None, scheduler: Any, recv_req: Any) -> None:
    """AFTER ``Scheduler.abort_request``, which knows no request that neither waits nor runs."""
    state = state_of(scheduler)
    if state is None:
        return
    state.aborts = True
    if state.places is None:
        return
    from sglang.srt.managers.scheduler import _make_abort_req

    for known in state.places.groups.values():
        for place in list(known.places):
            req = place.req
            if recv_req.abort_all or req.rid.startswith(recv_req.rid):
                known.places.remove(place)
                reason = recv_req.finished_reason
                _send_abort(scheduler, _make_abort_req(req, finished_reason=reason), req)


def _send_abort(scheduler: Any, abort_req: Any, req: Any) -> None:
    """Report a request that ends outside the output stream; see ``contract.ABORTS``."""
    if hasattr(scheduler, "send_abort_output"):
        scheduler.send_abort_output(abort_req, req)
    else:
        scheduler.ipc_channels.send_to_tokenizer.send_output(abort_req, req)


def answer_rest(scheduler: Any, places: Places) -> None:
    """Answer the places of groups that have nothing left to branch from, and forget those."""
    over: list[Place] = []
    for group, known in list(places.groups.items()):
        spent = group.branched >= RULES[group.refill].branches * group.joined
        if group.live == 0 or group.stopped or spent:
            over += known.places
            known.places = []
        if group.live == 0 or group.stopped:
            del places.groups[group]
    if over:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        for place in over:
            place.req.finished_reason = FINISH_ABORT(place.message)
            place.req.time_stats.set_completion_time()
        scheduler.output_streamer.stream_output([place.req for place in over], False)
