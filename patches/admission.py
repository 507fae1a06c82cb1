"""Admission: a trace that can be pruned reserves nothing, and makes room for those who wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from math import inf
from typing import Any

from step_sglang import protocol
from step_sglang.patches.guard import guard
from step_sglang.patches.pruning import PruningRound, own_tokens
from step_sglang.patches.queue import generates_nothing
from step_sglang.patches.state import SchedulerStep, state_of, trace_of


def get_prefill_adder_class(base: type, scheduler: Any) -> type:
    """AFTER ``Scheduler.get_prefill_adder_class``."""
    state = state_of(scheduler)
    if state is None or state.config.capture:
        return base
    return _step_adder(base, scheduler)


@lru_cache(maxsize=4)
def _step_adder(base: Any, scheduler: Any) -> type:
    """Subclass of the adder in use that reserves no future tokens for prunable traces."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    state = _enabled(scheduler)
    makes_room, begin_room = state.config.makes_room, partial(PrefillReclaimer, scheduler, state)

    class StepPrefillAdder(base):  # type: ignore[misc]
        def _get_running_request_total_token_offset(self, req: Any) -> Any:
            return 0 if _prunable(req) else super()._get_running_request_total_token_offset(req)

        def add_one_req(
            self, req: Any, has_chunked_req: bool, truncation_align_size: int | None
        ) -> Any:
            if getattr(self, "_step_parked", False):
                return AddReqResult.OTHER  # the batch would count the parked chunk as its own
            if has_chunked_req and self._step_needs_chunks(req):
                return AddReqResult.OTHER  # the scheduler holds one chunked prompt at a time

            def admit() -> Any:
                if not (_prunable(req) or generates_nothing(req)):
                    return base.add_one_req(self, req, has_chunked_req, truncation_align_size)
                with _no_future_tokens(req.sampling_params):
                    return base.add_one_req(self, req, has_chunked_req, truncation_align_size)

            result = admit()
            if result is not AddReqResult.NO_TOKEN or not (makes_room and state.groups):
                return result
            # It says that this request did not fit, or that after it the next one will not.
            room = self._room()
            if self.can_run_list and self.can_run_list[-1] is req:
                with room.credit():
                    return self.budget_state()
            if not room.make(req):
                state.refused = req
                return result
            with room.credit():
                return admit()

        def add_chunked_req(self, req: Any) -> Any:
            # Its first chunk was admitted with room for all of them; traces that reserve nothing
            # may have taken it meanwhile, in mixed passes. SGLang makes the chunk shorter as long
            # as anything is left, and then takes a whole one, whether there is room or not.
            if self.rem_total_tokens > 0 or not self.running_batch.reqs or not state.groups:
                return super().add_chunked_req(req)
            if self._room().make_for_chunk(req):
                return super().add_chunked_req(req)
            self._step_parked = True
            return req  # SGLang tries again in the next pass

        def preempt_to_schedule(self, req: Any) -> bool:
            # It adds up what preempted requests had reserved, and traces reserve nothing.
            if not makes_room or not state.groups:
                return bool(super().preempt_to_schedule(req))
            with self._room().credit():
                preempted = bool(super().preempt_to_schedule(req))
            if preempted:
                del self._step_room  # it may still count on requests that have left the batch
            return preempted

        def _step_needs_chunks(self, req: Any) -> bool:
            # SGLang asks this too, but not of a request that ignores the end token while the
            # radix cache is off; a chunk that traces made shorter leaves room for its first.
            # What comes from the host is loaded, not computed.
            done = req.prefix_len + req.host_hit_length
            extend = len(req.full_untruncated_fill_ids) - done
            return self.rem_chunk_tokens is not None and extend > self.rem_chunk_tokens

        def _room(self) -> Any:
            room = getattr(self, "_step_room", None)
            if room is None:
                room = self._step_room = begin_room(self)
            return room

    return StepPrefillAdder


def _enabled(scheduler: Any) -> SchedulerStep:
    state = state_of(scheduler)
    assert state is not None
    return state


class PrefillReclaimer:
    """Makes room for waiting requests in one pass of an adder.

    What prunable traces hold counts as free for the reservations of others: it can be had when it
    is needed. Only the tokens that a request takes at once must be free before it starts.
    """

    def __init__(self, scheduler: Any, state: SchedulerStep, adder: Any) -> None:
        self._adder = adder
        # These end by themselves in this step; a waiting request may as well wait for their memory.
        self._finishing = scheduler._reqs_finishing_inflight(adder.running_batch)
        self._begin_round = partial(
            PruningRound, scheduler, state, adder.running_batch, self._finishing
        )

    @cached_property
    def _round(self) -> PruningRound:
        return self._begin_round()

    @contextmanager
    def credit(self) -> Iterator[None]:
        """Let the adder see what pruning can free as free."""
        budget, credit = self._adder.memory_budget, 0
        with guard(protocol.IN_ADMISSION):
            credit = self._round.candidates.reclaimable()
        budget.total_offset -= credit
        try:
            yield
        finally:
            budget.total_offset += credit

    def make_for_chunk(self, req: Any) -> bool:
        """Make room for the next chunk of a prompt, at any trace's cost: it holds memory already.

        Returns:
            Whether the chunk fits now.
        """
        adder = self._adder
        extend = len(req.full_untruncated_fill_ids) - req.prefix_len
        need = adder.ceil_paged_tokens(min(extend, adder.rem_chunk_tokens))
        need += adder.per_req_token_overhead
        coming_free = self._coming_free()

        def short() -> int:
            return int(need - adder.cur_rem_tokens)

        # What comes free by itself in this step is not taken from anybody.
        if short() > coming_free:
            self._round.prune_until(lambda: short() <= coming_free, short)
        return short() <= 0

    def make(self, req: Any) -> bool:
        """Make room for the tokens that a waiting request takes at once.

        They are all that is not in the device's memory: what the hierarchical cache would load from
        the host takes as much of it as what is computed.

        Returns:
            Whether they are free now.
        """
        adder = self._adder
        extend = len(req.full_untruncated_fill_ids) - req.prefix_len
        need = adder.ceil_paged_tokens(extend) + adder.per_req_token_overhead
        with adder._lock_node(req.last_node):  # its prefix cannot be evicted for it
            if not self._may_reserve(req, need):
                return False
            short = need - adder.cur_rem_tokens + 1
            if short > self._coming_free():
                kv_share = inf  # nobody gives for it
                # Nobody gives for a branch: it waits, for memory was free when it was decided.
                if _is_new_branch(req):
                    return False
                with guard(protocol.IN_ADMISSION):
                    kv_share = self._kv_share(req, need)
                self._round.prune_for(kv_share, short)
            return bool(adder.cur_rem_tokens > need)

    def _coming_free(self) -> int:
        return sum(own_tokens(req, self._adder.page_size) for req in self._finishing)

    def _may_reserve(self, req: Any, need: int) -> bool:
        """Whether its future tokens fit beside the other reservations, traces left aside."""
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        if _prunable(req) or generates_nothing(req):
            return True
        if req.sampling_params.ignore_eos and getattr(self._adder.tree_cache, "disable", True):
            return False  # SGLang then simulates every running request's future
        future = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        future = min(future, CLIP_MAX_NEW_TOKENS)
        with self.credit():
            return bool(need + future < self._adder.rem_total_tokens)

    def _kv_share(self, req: Any, need: int) -> float:
        """KV tokens per weight that the request's group would hold with it."""
        trace = trace_of(req)
        if trace is None or not trace.group.for_memory:
            return float(need)
        group = trace.group
        admitted = sum(
            self._adder.ceil_paged_tokens(other.extend_len)
            for other in self._adder.can_run_list
            if (mate := trace_of(other)) is not None and mate.group is group
        )
        held = self._round.candidates.held(group.group_id)
        return float((held + admitted + need) / group.weight)


def _is_new_branch(req: Any) -> bool:
    """Whether it has generated nothing yet; one that comes back is a trace like any other."""
    trace = trace_of(req)
    if trace is None or trace.origin is None:
        return False
    return len(req.output_ids) <= trace.origin.position + 1


def _prunable(req: Any) -> bool:
    trace = trace_of(req)
    return trace is not None and trace.group.prunable


@contextmanager
def _no_future_tokens(params: Any) -> Iterator[None]:
    """Make the adder see a request that will generate nothing.

    The adder reads the length inline in several places, so the value itself is changed for the
    time of the call. ``ignore_eos`` would select a path that simulates every running request's
    future.
    """
    max_new_tokens, ignore_eos = params.max_new_tokens, params.ignore_eos
    params.max_new_tokens, params.ignore_eos = 0, False
    try:
        yield
    finally:
        params.max_new_tokens, params.ignore_eos = max_new_tokens, ignore_eos
