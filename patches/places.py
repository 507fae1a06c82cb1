"""Places of pruned traces that a branch may take, and what becomes of them otherwise.

A pruned trace of a group with refill is neither finished nor answered: it gives its KV back as a
retracted request does, and its place is kept here until a branch takes it or its group has no live
trace any more. No text of such a request is sent before its end, because it may still change.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
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
    kind: bytes = b""  # of its trace


@dataclass(eq=False)
class GroupPlaces:
    """Of one group with refill."""

    places: list[Place] = field(default_factory=list)
    # Requests from which others may branch, those that finished last.
    finished: deque[Any] = field(default_factory=lambda: deque(maxlen=MAX_FINISHED))
    began: int | None = None  # forward passes when its first trace did
    decided: int = 0  # likewise, when it was decided about last
    swapped: int = 0  # likewise, of the tournament

    def drop(self, places: Sequence[Place]) -> Sequence[Place]:
        """Keep these no longer."""
        gone = set(places)
        self.places = [place for place in self.places if place not in gone]
        return places


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


# All of SGLang's sampling parameters that a text depends on, the seed aside: each sample has its
# own. How text is shown (`skip_special_tokens`, `no_stop_trim`) stays the request's.
_SAMPLED_BY = (
    *("max_new_tokens", "min_new_tokens", "ignore_eos"),
    *("stop_strs", "stop_regex_strs", "stop_token_ids"),
    *("temperature", "top_p", "top_k", "min_p", "logit_bias", "watermark"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)


def kind_of(req: Any) -> bytes:
    """Requests of one kind go on alike from the same text: a branch and its parent are of one."""
    params = req.sampling_params
    parts = [(name, _plain(getattr(params, name, None))) for name in _SAMPLED_BY]
    parts += [("from", (req.lora_id, req.extra_key, req.cache_salt))]
    digest = hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16)
    digest.update(array("q", req.origin_input_ids).tobytes())
    return digest.digest()


def _plain(value: Any) -> Any:
    """The same for the same stops and biases, in whatever order they were given."""
    if isinstance(value, Mapping):
        return sorted(value.items(), key=repr)
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(value, key=repr)
    return value


def may_be_taken(state: SchedulerStep, trace: Trace) -> bool:
    """Whether a branch may take the place of a trace that is about to be pruned.

    Not of one that its vote does not need: it needs no other there.
    """
    group = trace.group
    if not trace.refills or trace.ending or group.stopped or group.live < 2:
        return False
    if group.branched >= RULES[trace.refill].branches * group.joined:
        return False
    known = None if state.places is None else state.places.groups.get(group)
    return group.alike[trace.kind] > 1 or trace.kind in _kinds_finished(known)


def _kinds_finished(known: GroupPlaces | None) -> set[bytes]:
    """Of the finished traces that may still be branched from."""
    if known is None:
        return set()
    return {trace.kind for req in known.finished if (trace := trace_of(req)) is not None}


def keep_place(state: SchedulerStep, req: Any, message: str) -> None:
    """Keep the place of a request whose trace was pruned and whose KV is released."""
    trace = trace_of(req)
    assert trace is not None
    retractions = req.retraction_count
    req.reset_for_retract()  # a result may be in flight: it is skipped, as a retracted one's is
    req.retraction_count = retractions
    places_of(state).of(trace.group).places.append(Place(req, message, trace.kind))


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
        # None of the traces that are left is like these; whoever else lives may live for ever.
        lonely = [place for place in known.places if not group.alike[place.kind]]
        if lonely:
            kinds = _kinds_finished(known)
            over += known.drop([place for place in lonely if place.kind not in kinds])
    answer(scheduler, over)


def answer(scheduler: Any, over: Sequence[Place]) -> None:
    """Answer places that nothing can take any more."""
    if over:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        for place in over:
            place.req.finished_reason = FINISH_ABORT(place.message)
            place.req.time_stats.set_completion_time()
        scheduler.output_streamer.stream_output([place.req for place in over], False)
