"""Pruning: end the worst traces when memory is short, instead of retracting or queueing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from step_sglang import protocol
from step_sglang.errors import safe_repr
from step_sglang.patches.guard import guard
from step_sglang.patches.ledger import Ledger, UnfitError, fits_ledger, shared_tokens
from step_sglang.patches.places import keep_place, may_be_taken
from step_sglang.patches.state import TRACE, SchedulerStep, state_of, trace_of
from step_sglang.pruning.groups import Group, TraceStatus
from step_sglang.pruning.policy import Candidates, GroupView, TraceView, above_watermark
from step_sglang.pruning.standings import StandingRound

logger = logging.getLogger(__name__)

Choice = TypeVar("Choice")


def update_running_batch(scheduler: Any, batch: Any) -> None:
    """BEFORE ``Scheduler.update_running_batch``, which retracts when memory is still short."""
    state = state_of(scheduler)
    if state is None or state.config.capture or not state.groups.num_live:
        if state is not None:
            _close(state)
        return
    if not state.groups.num_ending and _has_room(state, batch):
        return
    ledger = _ledger(state, batch)
    finishing = _finishing(scheduler, state, batch, ledger)
    if state.groups.num_ending:
        _prune_ending(scheduler, state, batch, finishing)
        ledger = _ledger(state, batch)

    def fits() -> bool:
        return _fits(batch, finishing, ledger)

    # Where some finish, SGLang skips one decode step: their memory comes free by itself.
    if finishing:
        fits()
        return
    if state.kv_limit is not None or state.groups.num_held:
        _prune_to_shares(scheduler, state, batch, ledger)
    if not fits():
        PruningRound(scheduler, state, batch, ledger=ledger).prune_until(
            fits, partial(_short, batch, ledger)
        )


def _ledger(state: SchedulerStep, batch: Any) -> Ledger | None:
    """What is known of the batch, up to date; None where it has to be looked at request by request.

    Ranks that come to different answers decide the same: a ledger tells what a look would.
    """
    ledger: Ledger | None = state.ledger
    if ledger is None:
        if state.unfit is batch.reqs or not fits_ledger(state.config, batch):
            return None
        ledger = Ledger(state, batch)
    state.ledger, state.unfit = ledger, None
    with guard(protocol.IN_PRUNING) as syncing:
        try:
            ledger.sync(batch)
        except UnfitError:
            state.unfit = batch.reqs
    if syncing.failed or state.unfit is not None:
        _close(state)
        return None
    return ledger


def _close(state: SchedulerStep) -> None:
    """Look at every request from now on, until a ledger is begun anew in another step."""
    ledger, state.ledger = state.ledger, None
    if ledger is not None:
        with guard(protocol.IN_PRUNING):
            ledger.close()


def _usable(ledger: Ledger | None) -> Ledger | None:
    """None once it is closed, which may have been earlier in this step."""
    return None if ledger is None or ledger.closed else ledger


def _finishing(
    scheduler: Any, state: SchedulerStep, batch: Any, ledger: Ledger | None
) -> Sequence[Any]:
    """Requests whose result in flight is their last one by its length."""
    may = True
    if ledger is not None:
        with guard(protocol.IN_PRUNING) as asking:
            may = ledger.may_finish()
        if asking.failed:
            _close(state)  # it may have forgotten whom to ask again
    found: Sequence[Any] = scheduler._reqs_finishing_inflight(batch) if may else ()
    return found


def _has_room(state: SchedulerStep, batch: Any) -> bool:
    """Whether the next decode step fits for certain, told without a look at its requests.

    What groups hold below their shares was added up in an earlier step; until a trace joins or ends
    or the batch grows, each request has taken at most a page in every step since.
    """
    if not batch.spec_algorithm.is_none():
        return False
    allocator = batch.token_to_kv_pool_allocator
    most = len(batch.reqs) * allocator.page_size
    if state.kv_limit is not None or state.groups.num_held:
        state.below_shares -= most
        seen = (state.groups.changes, len(batch.reqs))
        if state.below_shares < 0 or seen != state.shares_seen:
            return False
    return bool(allocator.available_size() >= most)


def _prune_to_shares(
    scheduler: Any, state: SchedulerStep, batch: Any, ledger: Ledger | None
) -> None:
    """Prune until all groups together, and each by itself, hold no more than they may."""
    if state.groups.num_held:
        _prune_held(scheduler, state, batch, ledger)
    if state.kv_limit is not None:
        _prune_to(scheduler, state, batch, state.kv_limit, ledger)
    held = _held_next(batch, ledger)
    pool, below = scheduler.max_total_num_tokens, []
    if state.kv_limit is not None:
        below.append(state.kv_limit - sum(held.values()))
    below += [int(pool * g.prune_at) - tokens for g, tokens in held.items() if g.is_held]
    state.below_shares = min(below, default=0)
    state.shares_seen = (state.groups.changes, len(batch.reqs))


def _held_next(batch: Any, ledger: Ledger | None) -> Mapping[Group, int]:
    """KV tokens that groups hold after the next decode step."""
    if (ledger := _usable(ledger)) is not None and ledger.standings.sound:
        known: Mapping[Group, int] | None = None
        with guard(protocol.IN_PRUNING):
            known = ledger.standings.held_next()
        if known is not None:
            return known
    return held_by_groups(batch, partial(_grows, batch))


def _prune_to(
    scheduler: Any, state: SchedulerStep, batch: Any, limit: int, ledger: Ledger | None
) -> None:
    """Prune until groups hold at most ``limit`` KV tokens after the next decode step."""

    def above() -> int:
        # Ranks agree on it: their memory is the same.
        return above_watermark(_held_next(batch, ledger).values(), limit)

    if not above():
        return
    pruning = PruningRound(scheduler, state, batch, ledger=ledger)
    if above():  # still: the round counts aborted traces out
        pruning.prune_until(lambda: not above(), above, protocol.PRUNED_FOR_WATERMARK)


def _grows(batch: Any, req: Any) -> int:
    """KV tokens that the next decode step allocates for a request."""
    if batch.spec_algorithm.is_none():
        return 1
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    # Drafts are allocated ahead, and what was not accepted is still there.
    held = int(req.kv.kv_allocated_len - req.kv.kv_committed_len)
    return max(0, int(get_alloc_reserve_per_decode()) - held)


def _prune_held(scheduler: Any, state: SchedulerStep, batch: Any, ledger: Ledger | None) -> None:
    """Prune groups that would hold more than the share of the pool that they asked for."""

    def above() -> dict[str, int]:
        """KV tokens by which groups would exceed their shares, as `_prune_to` counts."""
        pool, held = scheduler.max_total_num_tokens, _held_next(batch, ledger)
        excess = {
            g.group_id: tokens - int(pool * g.prune_at) for g, tokens in held.items() if g.is_held
        }
        return {name: tokens for name, tokens in excess.items() if tokens > 0}

    for name in sorted(above()):  # ranks agree on it: their memory is the same

        def short(name: str = name) -> int:
            return above().get(name, 0)

        def enough(name: str = name) -> bool:
            return name not in above()

        # A round for each: the victims of one leave the batch, and with them the places in it.
        pruning = PruningRound(scheduler, state, batch, ledger=ledger)
        if not enough():
            pruning.prune_until(enough, short, protocol.PRUNED_FOR_WATERMARK, name)


def _gives_memory(req: Any) -> bool:
    """Whether it is a trace that memory may be taken from, its group's minimum left aside."""
    trace = trace_of(req)
    return trace is not None and trace.is_live and trace.group.for_memory


def _staying(batch: Any, finishing: Sequence[Any] = ()) -> list[int]:
    """Places of the requests that the next decode step computes."""
    leaving = set(finishing)
    return [i for i, req in enumerate(batch.reqs) if not req.finished() and req not in leaving]


def _fits(batch: Any, finishing: Sequence[Any], ledger: Ledger | None) -> bool:
    """Whether the next decode step fits; evicts unreferenced radix-cache nodes to find out."""
    need = None if finishing else _needed(ledger)
    if need is not None:  # as `check_decode_mem` asks
        fits: bool = batch.token_to_kv_pool_allocator.check_decode_capacity(
            num_tokens=need,
            tree_cache=batch.tree_cache,
            requests=None,
            spec_algorithm=batch.spec_algorithm,
        )
        return fits
    staying = _staying(batch, finishing)
    return not staying or bool(batch.check_decode_mem(selected_indices=staying))


def _needed(ledger: Ledger | None) -> int | None:
    """KV tokens that the next decode step allocates, if the ledger knows."""
    need = None
    if (ledger := _usable(ledger)) is not None:
        with guard(protocol.IN_PRUNING):
            need = ledger.need()
    return need


def _short(batch: Any, ledger: Ledger | None) -> int:
    """KV tokens that the next decode step lacks, once what can be evicted is."""
    need = _needed(ledger)
    if need is None:
        need = batch.new_tokens_required_next_decode(_staying(batch))
    return int(need - batch.token_to_kv_pool_allocator.available_size())


def _prune_ending(
    scheduler: Any, state: SchedulerStep, batch: Any, finishing: Sequence[Any]
) -> None:
    """Prune the traces that are to end, whatever memory there is."""
    spared = set(finishing)
    ended = []
    for req in batch.reqs:
        trace = trace_of(req)
        if trace is not None and trace.is_live and trace.ending and req not in spared:
            assert trace.reason is not None
            _prune(scheduler, state, batch, req, trace.reason)
            ended.append(req)
    _dismiss(scheduler, batch, ended)


class PruningRound:
    """The decisions of one scheduling step about one running batch.

    Args:
        scheduler: SGLang's scheduler.
        state: STEP's part of it.
        batch: the running batch; requests leave it here only.
        spared: requests of the batch that end by themselves in this step; without a ledger.
        ledger: of the batch; None: every request is looked at.
    """

    def __init__(
        self,
        scheduler: Any,
        state: SchedulerStep,
        batch: Any,
        spared: Sequence[Any] = (),
        ledger: Ledger | None = None,
    ) -> None:
        self._scheduler, self._state, self._batch = scheduler, state, batch
        self._page = batch.token_to_kv_pool_allocator.page_size
        self._spared, self._ledger = set(spared), _usable(ledger)
        # Kept while requests leave: ranks exchange places in it, also after one chose otherwise.
        self._reqs: Sequence[Any] = batch.reqs
        with guard(protocol.IN_PRUNING):
            if self._ledger is None:
                _end_aborted(state, batch.reqs)
            else:
                self._ledger.end_aborted()
            _end_aborted(state, scheduler.waiting_queue)
        self._look()

    def _look(self) -> None:
        self._standings: StandingRound | None = None
        self.candidates = Candidates((), self._state.config)
        with guard(protocol.IN_PRUNING):
            if self._ledger is not None:
                self._standings = self._ledger.round()
            else:
                self.candidates = Candidates(
                    _views(self._reqs, self._page, self._spared), self._state.config
                )

    def prune_until(
        self,
        enough: Callable[[], bool],
        short: Callable[[], int],
        reason: str = protocol.PRUNED_FOR_DECODE,
        group: str | None = None,
    ) -> None:
        """Prune the worst traces, until there is enough room or none may be pruned any more.

        Args:
            enough: whether there is, which it is not yet; it and not ``short`` decides, because
                only the engine knows what a victim frees beyond its own pages. Ranks must agree on
                it.
            short: KV tokens that are missing.
            reason: one of the words for it.
            group: the only one that gives; None: all may.
        """
        gone: list[Any] = []
        while True:
            tokens, victims = short(), []
            with guard(protocol.IN_PRUNING) as choosing:
                victims = (self._standings or self.candidates).take_until(tokens, group)
            pruned = self._prune(victims, reason, choosing.failed, enough)
            gone += pruned
            if not pruned or enough():
                break
        self._dismiss(gone)

    def prune_for(self, kv_share: float, tokens: int) -> None:
        """Prune traces for a waiting request; see ``Candidates.reclaim``."""
        victims: list[TraceView] = []
        with guard(protocol.IN_PRUNING) as choosing:
            victims = self.candidates.reclaim(kv_share, tokens)
        gone = self._prune(victims, protocol.PRUNED_FOR_ADMISSION, choosing.failed)
        self._dismiss(gone)

    def _prune(
        self,
        victims: Sequence[TraceView],
        reason: str,
        failed: bool,
        enough: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """Prune those on which the ranks agree, until there is enough room."""
        chosen = [victim.handle for victim in victims]
        agreed = agree(self._scheduler, chosen)
        gone: list[Any] = []
        for index in agreed:
            if gone and enough():
                break
            _prune(self._scheduler, self._state, self._batch, self._reqs[index], reason)
            gone.append(self._reqs[index])
        if failed and self._ledger is not None:
            _close(self._state)
            self._ledger = None
        if failed or agreed != chosen or len(gone) < len(chosen):
            self._look()  # the candidates here lack other traces than the batch does
        return gone

    def _dismiss(self, gone: Sequence[Any]) -> None:
        _dismiss(self._scheduler, self._batch, gone)
        if gone and self._ledger is not None:
            with guard(protocol.IN_PRUNING) as leaving:
                self._ledger.dismissed(gone)
            if leaving.failed:
                _close(self._state)


def _views(reqs: Sequence[Any], page: int, spared: set[Any]) -> list[GroupView]:
    """The running traces by group; those of a group at its minimum too, for what they hold."""
    members: dict[str, tuple[Group, list[TraceView]]] = {}
    for index, req in enumerate(reqs):
        trace = trace_of(req)
        if trace is None or not _gives_memory(req) or req in spared:
            continue
        group = trace.group
        if group.group_id not in members:
            members[group.group_id] = (group, [])
        length = len(req.output_ids)
        view = TraceView(index, own_tokens(req, page), length, *trace.rank_key(length))
        members[group.group_id][1].append(view)
    return [
        GroupView(
            name,
            group.survivors,
            group.min_survivors,
            group.weight,
            traces,
            None if group.baseline is None else 1,
        )
        for name, (group, traces) in members.items()
    ]


def own_tokens(req: Any, page: int, more: int = 0) -> int:
    """KV tokens of a running request that no other can share, once ``more`` are allocated to it."""
    return int(-(-(req.kv.kv_allocated_len + more) // page) * page - shared_tokens(req, page))


def own_tokens_of(reqs: Sequence[Any], page: int) -> list[int]:
    """:func:`own_tokens` of many, without a call for each: a thousand wait while it is found."""
    found = []
    for req in reqs:
        kv, shared = req.kv, len(req.origin_input_ids)
        protected = kv.cache_protected_len
        if protected < shared:  # noqa: PLR1730 - min() costs as much as all the rest
            shared = protected
        trace = getattr(req, TRACE, None)
        if trace is not None and trace.common:
            found.append(own_tokens(req, page))
            continue
        found.append(-(-kv.kv_allocated_len // page) * page - shared)
    return found


def _end_aborted(state: SchedulerStep, reqs: Sequence[Any]) -> None:
    """Count out traces that are on their way out, or they would be counted as survivors."""
    for req in reqs:
        trace = trace_of(req)
        if trace is not None and req.to_finish is not None:
            state.groups.end(trace, TraceStatus.ABORTED)


def agree(scheduler: Any, victims: list[Choice]) -> list[Choice]:
    """Every tensor-parallel rank of a batch takes the first rank's choice.

    All of them come here in the same iteration, because their memory state is identical; their
    scores could differ in the last bit, and different victims would hang the server. With
    data-parallel attention other ranks have other batches, and do not come.
    """
    group = scheduler.attn_tp_group
    if group.world_size == 1:
        return victims
    from sglang.srt.utils import broadcast_pyobj

    agreed: list[Choice] = broadcast_pyobj(
        victims, group.rank, scheduler.attn_tp_cpu_group, src=group.ranks[0]
    )
    return agreed


def _prune(scheduler: Any, state: SchedulerStep, batch: Any, req: Any, reason: str) -> None:
    """End a victim for good and free its KV now; ``_dismiss`` does the rest.

    It may still have a result in flight; the result processor skips finished requests.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.mem_cache.common import release_kv_cache

    trace = trace_of(req)
    assert trace is not None
    group = trace.group
    if not (group.scored or group.baseline or state.warned_unscored):
        state.warned_unscored = True
        logger.warning(
            "STEP prunes without scores: no trace of group %s has reached a step boundary: check "
            "--step-delimiter, and that the prompt asks this model to reason",
            safe_repr(group.group_id, 300),
        )
    trace.reason, trace.tokens = reason, len(req.output_ids)
    keeps_place = may_be_taken(state, trace)
    state.groups.end(trace, TraceStatus.PRUNED)
    score = "none" if trace.score is None else f"{trace.score:.4f}"
    message = f"{protocol.PRUNED_MESSAGE}: trace score {score} after {trace.num_steps} steps"
    if state.events is not None:
        state.events.pruned(req, trace)
    if not keeps_place:
        # Before the release: a session keeps the row of a request that did not abort.
        req.finished_reason = FINISH_ABORT(message)
    allocator = batch.token_to_kv_pool_allocator
    before = allocator.available_size()
    # Not inserted into the radix tree: nobody will continue this text.
    release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
    if keeps_place:
        keep_place(state, req, message)
    else:
        req.release_mm_inputs_on_abort()
        req.time_stats.set_completion_time()
    available = allocator.available_size()
    if state.metrics is not None:
        with guard(protocol.IN_METRICS):
            state.metrics.trace_pruned(reason, available - before)
    if state.groups.watcher is not None:
        state.groups.watcher.freed(trace, available - before)
    pool = scheduler.max_total_num_tokens
    state.log.pruned(
        safe_repr(req.rid, 80),
        safe_repr(trace.group.group_id, 300),
        trace.score,
        trace.num_steps,
        reason,
        available - before,
        pool - available,
        pool,
    )


def _dismiss(scheduler: Any, batch: Any, gone: Sequence[Any]) -> None:
    """Take victims out of their batch and answer them, all at once: each costs the whole batch.

    Those whose place is kept are not answered yet.
    """
    if gone:
        kept = [req for req in gone if not req.finished()]
        batch.filter_batch(reqs_to_exclude=kept)
        batch.batch_is_full = False
        ended = [req for req in gone if req.finished()]
        scheduler.output_streamer.stream_output(ended, any(req.return_logprob for req in ended))


def prune_for_refill(scheduler: Any, state: SchedulerStep, batch: Any, reqs: Sequence[Any]) -> None:
    """Prune running traces that give way to branches of better ones."""
    for req in reqs:
        _prune(scheduler, state, batch, req, protocol.PRUNED_FOR_REFILL)
    _dismiss(scheduler, batch, reqs)


def held_by_groups(batch: Any, growth: Callable[[Any], int] = lambda req: 0) -> Counter[Group]:
    """KV tokens that pruning could free of the running traces, their groups' minimum left aside.

    ``growth``: tokens that are allocated to a request before.
    """
    page = batch.token_to_kv_pool_allocator.page_size
    held: Counter[Group] = Counter()
    for req in batch.reqs:
        trace = trace_of(req)
        if trace is not None and _gives_memory(req):
            held[trace.group] += own_tokens(req, page, growth(req))
    return held
