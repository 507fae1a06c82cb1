"""What the running batch holds, kept from step to step: no request is looked at twice for nothing.

It rests on what SGLang does in a decode step without speculation: every request of the batch is
given one token (`alloc_for_decode_default`), and `ScheduleBatch.reqs` is another list as soon as
requests come or go. Where a batch is other than that, there is no ledger, and pruning looks at
every request as it is.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from step_sglang.config import StepConfig
from step_sglang.patches.state import SchedulerStep, trace_of
from step_sglang.pruning.groups import TraceStatus
from step_sglang.pruning.standings import Look, Standing, StandingRound, Standings

_SETTLED = 2  # steps after which what a request shares, and its length, stay as expected


class Entry:
    """One request of the batch."""

    __slots__ = ("allocated", "order", "standing")

    def __init__(self, order: int, allocated: int) -> None:
        self.order = order  # rises with the place in the batch
        self.allocated = allocated  # KV tokens, less the clock
        self.standing: Standing | None = None  # of a live trace


class UnfitError(Exception):
    """This batch cannot have a ledger."""


class Ledger:
    """Of one running batch; call :meth:`sync` before anything else in a step."""

    def __init__(self, state: SchedulerStep, batch: Any) -> None:
        self._state = state
        self.page = int(batch.token_to_kv_pool_allocator.page_size)
        self.standings = Standings(self.page, state.config.min_steps)
        self._batch: Any = None
        self._reqs: list[Any] = []
        self._orders: list[int] = []  # of these
        self._entries: dict[Any, Entry] = {}  # by request, in the batch's order
        self._phases: dict[int, int] = {}  # requests by what they hold in their last page
        self._others: dict[Any, None] = {}  # requests that are no live trace of the standings
        self._watched: dict[Any, None] = {}  # which may be stopped without STEP being told
        # (step, order, request): when it could reach its last token, the soonest first.
        self._limits: list[tuple[int, int, Any]] = []
        self._order = 0
        self.closed = False
        self.looked = 0  # requests so far

    def sync(self, batch: Any) -> None:
        """Take over what has changed.

        Raises:
            UnfitError: SGLang does something else with this batch.
        """
        reqs = batch.reqs
        self._batch = batch
        steps = self._steps(reqs)
        if steps is None or not self.standings.sound:
            self._clear()
        else:
            self.standings.tick(steps)
        self._part()
        if reqs is not self._reqs:
            self._compare(reqs)
        self._settle()

    def forget(self, req: Any) -> None:
        """A request went back to the queue: if it comes again, it is another."""
        entry = self._entries.pop(req, None)
        if entry is not None:
            self._drop(req, entry)
            self._reqs = []  # compared in any case

    @property
    def clock(self) -> int:
        """Decode steps so far."""
        return self.standings.clock

    def need(self) -> int:
        """KV tokens that the next decode step allocates to the requests that have not finished."""
        self._part()
        phase = -self.clock % self.page
        pages = self._phases.get(phase, 0)
        for req in self._others:
            pages -= self._entries[req].allocated % self.page == phase
            pages += not req.finished() and req.kv.kv_committed_len % self.page == 0
        return pages * self.page

    def may_finish(self) -> bool:
        """Whether a result that is in flight may be a request's last one by its length."""
        clock, due = self.clock, []
        while self._limits and self._limits[0][0] <= clock:
            due.append(heapq.heappop(self._limits))
        found = False
        for _, order, req in due:
            entry = self._entries.get(req)
            if entry is not None and entry.order == order:
                found = found or req.next_output_finishes_by_length()
                self._limit(req, order)
        return found

    def end_aborted(self) -> None:
        """Count out traces that are on their way out, as `pruning` does."""
        reqs = self._entries if self._state.aborts else self._watched
        for req in list(reqs):
            trace = trace_of(req)
            if req.to_finish is not None and trace is not None:
                self._state.groups.end(trace, TraceStatus.ABORTED)
        self._state.aborts = False

    def round(self) -> StandingRound:
        """The running traces at this moment, to be handed out worst first."""
        return StandingRound(self.standings.groups.values(), self._look)

    def dismissed(self, gone: Sequence[Any]) -> None:
        """Victims have left the batch; unless others have too, there is nothing to compare."""
        reqs = self._batch.reqs
        if len(reqs) == len(self._reqs) - len(gone):
            for req in gone:
                entry = self._entries.pop(req)
                del self._orders[bisect_left(self._orders, entry.order)]
                self._drop(req, entry)
            self._reqs = reqs
        else:
            self._compare(reqs)

    def _look(self, req: Any) -> Look:
        place = bisect_left(self._orders, self._entries[req].order)
        own = -(-req.kv.kv_allocated_len // self.page) * self.page - shared_tokens(req, self.page)
        return Look(place, own, len(req.output_ids))

    def _part(self) -> None:
        """Traces that ended stay in the batch until SGLang takes them out."""
        for one in self.standings.gone:
            entry = self._entries.get(one.key)
            if entry is not None and entry.standing is one:
                entry.standing = None
                self._others[one.key] = None
        self.standings.gone.clear()

    def _steps(self, reqs: list[Any]) -> int | None:
        """Decode steps since the clock; None where requests disagree, or none is known."""
        steps = None
        for one in (reqs, reversed(reqs)):
            req = next((r for r in one if r in self._entries and not r.finished()), None)
            if req is None:
                return None
            found = req.kv.kv_allocated_len - self._entries[req].allocated - self.clock
            if found < 0 or steps not in (None, found):
                return None
            steps = found
        return steps

    def _compare(self, reqs: list[Any]) -> None:
        present = set(reqs)
        for req in [req for req in self._entries if req not in present]:
            self._drop(req, self._entries.pop(req))
        for req in [req for req in reqs if req not in self._entries]:
            self._add(req)
        if list(self._entries) != reqs:  # they are in another order
            self._clear()
            for req in reqs:
                self._add(req)
        self._reqs, self._orders = reqs, [entry.order for entry in self._entries.values()]

    def close(self) -> None:
        """It is not to be asked any more."""
        self.closed = True
        self._clear()

    def _clear(self) -> None:
        self.standings.clear()
        for known in (self._entries, self._phases, self._others, self._watched, self._limits):
            known.clear()
        self._reqs = []

    def _add(self, req: Any) -> None:
        trace = trace_of(req)
        signal = trace is not None and trace.group.for_memory and trace.signal is not None
        if (
            signal
            or req.beam_group is not None
            or (not req.finished() and req.kv.kv_allocated_len != req.kv.kv_committed_len)
        ):
            raise UnfitError
        self.looked += 1
        self._order += 1
        allocated = req.kv.kv_allocated_len - self.clock
        entry = self._entries[req] = Entry(self._order, allocated)
        phase = allocated % self.page
        self._phases[phase] = self._phases.get(phase, 0) + 1
        if trace is not None and trace.is_live:
            entry.standing = self.standings.add(
                req, trace, entry.order, req.kv.kv_allocated_len, shared_tokens(req, self.page)
            )
        else:
            self._others[req] = None
        if req.to_finish is not None or req.grammar is not None or req.session is not None:
            self._watched[req] = None
        self._limit(req, entry.order)

    def _limit(self, req: Any, order: int) -> None:
        left = req.sampling_params.max_new_tokens - 1 - len(req.output_ids)
        at = self.clock + max(0, left - _SETTLED)
        if len(self._limits) > 2 * len(self._entries) + 64:  # of requests that are gone
            entries = self._entries
            self._limits = [
                one
                for one in self._limits
                if (entry := entries.get(one[2])) is not None and entry.order == one[1]
            ]
            heapq.heapify(self._limits)
        heapq.heappush(self._limits, (at, order, req))

    def _drop(self, req: Any, entry: Entry) -> None:
        self._phases[entry.allocated % self.page] -= 1
        self._others.pop(req, None)
        self._watched.pop(req, None)
        if entry.standing is not None:
            entry.standing.left()

    def _settle(self) -> None:
        """Look again at what may have changed after a request had come."""
        unsure = self.standings.unsure
        for one, since in list(unsure.items()):
            req: Any = one.key
            entry = self._entries.get(req)
            if entry is None or entry.standing is not one:
                del unsure[one]
                continue
            self.looked += 1
            one.group.set_tokens(one, entry.allocated, shared_tokens(req, self.page))
            if self.clock - since >= _SETTLED:
                del unsure[one]


def fits_ledger(config: StepConfig, batch: Any) -> bool:
    """Whether a batch's requests all grow by a token a step, and only tokens count."""
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator as Base

    check = getattr(type(batch.token_to_kv_pool_allocator), "check_decode_capacity", None)
    return (
        config.policy != "paper"
        and check is not None
        and check is getattr(Base, "check_decode_capacity", None)
        and bool(batch.spec_algorithm.is_none())
    )


def shared_tokens(req: Any, page: int) -> int:
    """KV tokens of a running request that others share.

    The shared prompt stays, and so does what a trace shares of its text with another of its family
    that lives.
    What else the tree holds of it (after a resume) becomes evictable with it, so it counts as its
    own.
    """
    shared = min(req.kv.cache_protected_len, len(req.origin_input_ids))
    trace = trace_of(req)
    if trace is not None and trace.common:
        prefix = len(req.origin_input_ids) + trace.common
        shared = max(shared, min(req.kv.cache_protected_len, prefix) // page * page)
    return int(shared)
