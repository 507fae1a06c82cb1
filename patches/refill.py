"""Refill: branches of good traces take the places of pruned ones while memory is free.

A branch is the pruned trace's request with its parent's text up to a step boundary, put into the
waiting queue like a retracted one. What the parent has computed of it is put into the radix tree
first.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from step_sglang import protocol
from step_sglang.errors import safe_repr
from step_sglang.patches.guard import guard
from step_sglang.patches.places import GroupPlaces, Place, answer, answer_rest
from step_sglang.patches.pruning import agree, held_by_groups, prune_for_refill
from step_sglang.patches.state import SchedulerStep, set_trace, trace_of
from step_sglang.pruning.groups import Group
from step_sglang.pruning.refill import (
    RULES,
    Branch,
    RefillRules,
    RefillView,
    Room,
    SourceView,
    branch_seed,
    can_start,
    choose_branches,
    choose_swaps,
    has_parent,
)


def refill(scheduler: Any, state: SchedulerStep, running_batch: Any) -> None:
    """Answer places that stay free, and start branches; before each admission pass.

    Nothing that was pruned in this iteration can branch in it: its last result is still in flight.
    """
    places = state.places
    if places is None or not places.groups:
        return
    answer_rest(scheduler, places)
    if _somebody_waits(scheduler):
        return
    passes = scheduler.forward_ct
    # Ranks come to the same groups: all of this is the same on each.
    due = [
        (group, known)
        for group, known in places.groups.items()
        if passes - known.decided >= RULES[group.refill].interval
    ]
    if not due:
        return
    held: Counter[Group] = Counter()
    if state.kv_limit is not None or state.groups.num_held:
        held = held_by_groups(running_batch)
    # One for all of them, as what they hold: what has been decided does not run yet.
    room = _room(scheduler, state, running_batch, held)
    for group, known in due:
        known.decided = passes
        share = _share(scheduler, group, held, room)
        _refill_group(scheduler, state, running_batch, group, known, room, share)


def _somebody_waits(scheduler: Any) -> bool:
    return bool(
        scheduler.waiting_queue
        or scheduler.chunked_req is not None
        or scheduler.grammar_manager.has_waiting_grammars()
    )


def _refill_group(
    scheduler: Any,
    state: SchedulerStep,
    batch: Any,
    group: Group,
    known: GroupPlaces,
    room: Room,
    share: Room | None,
) -> None:
    rules = RULES[group.refill]
    running = [req for req in batch.reqs if _may_branch_from(req, group)]
    if known.began is None:
        known.began = scheduler.forward_ct - max((len(r.output_ids) for r in running), default=0)
    age = scheduler.forward_ct - known.began
    if _swaps(rules) and scheduler.forward_ct - known.swapped >= rules.swap_interval:
        known.swapped = scheduler.forward_ct
        gone: list[int] = []
        with guard(protocol.IN_REFILL):
            view = _view(state, group, known.places, running, list(known.finished), age)
            gone = choose_swaps(view, rules)
        gone = agree(scheduler, gone)
        if gone:
            prune_for_refill(scheduler, state, batch, [running[i] for i in sorted(gone)])
            return  # their places can be taken in the next iteration
    rooms = [room] if share is None else [room, share]
    for place_reqs in _alike(known.places):
        kind = place_reqs[0].kind
        alone = not group.alike[kind]
        # Nothing here differs between ranks: they agree on as many choices.
        counts = (len(place_reqs), group.live, group.joined, group.branched)
        if not (can_start(*counts, rooms, rules) or alone):
            continue
        like_running = [req for req in running if _kind(req) == kind]
        like_finished = [req for req in known.finished if _kind(req) == kind]
        sources = [*like_running, *like_finished]
        decided: list[Branch] = []
        hopeless = False
        with guard(protocol.IN_REFILL):
            view = _view(state, group, place_reqs, like_running, like_finished, age)
            whole, *own_share = (replace(one) for one in rooms)
            decided = choose_branches(view, whole, rules, *own_share)
            hopeless = alone and not decided and not has_parent(view, rules)
        # By number, not by id: a finished one's may be in use again.
        for index, parent, position in agree(scheduler, decided):
            place = place_reqs[index]
            prompt = len(place.req.origin_input_ids)
            # Only now: whether there is room for more is to be the same on every rank.
            own = room.own_tokens(parent < len(like_running), position, prompt)
            for one in rooms:
                one.take(own)
            known.drop([place])
            _start(scheduler, state, batch, place.req, sources[parent], position)
        # As time passes, only later boundaries may be branched from.
        if alone and agree(scheduler, [hopeless])[0]:
            answer(scheduler, known.drop(place_reqs))


def _swaps(rules: RefillRules) -> bool:
    return rules.swap > 0 or rules.floor > 0


def _may_branch_from(req: Any, group: Group) -> bool:
    trace = trace_of(req)
    return (
        trace is not None
        and trace.group is group
        and trace.refills
        and trace.is_live
        and not req.finished()
        and req.to_finish is None
    )


def _kind(req: Any) -> bytes | None:
    trace = trace_of(req)
    return None if trace is None else trace.kind


def _alike(places: Sequence[Place]) -> list[list[Place]]:
    kinds: dict[bytes, list[Place]] = {}
    for place in places:
        kinds.setdefault(place.kind, []).append(place)
    return list(kinds.values())


def _view(
    state: SchedulerStep,
    group: Group,
    places: Sequence[Place],
    running: Sequence[Any],
    finished: Sequence[Any],
    age: int,
) -> RefillView:
    sources = []
    for handle, req in enumerate((*running, *finished)):
        trace = trace_of(req)
        assert trace is not None and trace.boundaries is not None
        # A token that ends a step is known before the pass that consumes it has scored it.
        length = len(req.output_ids)
        known = bisect_left(trace.boundaries, length, key=lambda b: b.position)
        sources.append(
            SourceView(
                handle,
                length,
                handle < len(running),
                trace.boundaries[:known],
                trace.since,
                trace.depth,
                trace.branches,
            )
        )
    limit = places[0].req if places else next(iter((*running, *finished)), None)
    most = 0 if limit is None else limit.sampling_params.max_new_tokens
    return RefillView(
        group.group_id,
        group.refill,
        range(len(places)),
        sources,
        group.live,
        group.joined,
        group.branched,
        group.survivors - group.min_survivors,
        state.lengths.expected(most),
        0 if limit is None else len(limit.origin_input_ids),
        age,
    )


def _room(scheduler: Any, state: SchedulerStep, batch: Any, held: Counter[Group]) -> Room:
    tree, running = scheduler.tree_cache, len(batch.reqs)
    tokens = batch.token_to_kv_pool_allocator.available_size() if running else 0
    tokens += tree.evictable_size()
    if state.kv_limit is not None:
        tokens = min(tokens, state.kv_limit - held.total())
    requests = scheduler.get_num_allocatable_reqs(running, running_batch=batch)
    if state.max_batch is not None:
        requests = min(requests, state.max_batch - running)
    if scheduler.max_queued_requests is not None:
        requests = min(requests, scheduler.max_queued_requests)
    return Room(tokens, requests, running, scheduler.page_size, _shares(scheduler))


def _share(scheduler: Any, group: Group, held: Counter[Group], room: Room) -> Room | None:
    """What is left of the share of the pool that a group asked for; None: it may have all."""
    if not group.is_held:
        return None
    tokens = int(scheduler.max_total_num_tokens * group.prune_at) - held[group]
    return replace(room, tokens=tokens, running=group.live)


def _shares(scheduler: Any) -> bool:
    """Whether the tree can keep what a running request has computed, up to any place."""
    tree = scheduler.tree_cache
    return not (getattr(tree, "disable", False) or tree.supports_mamba() or tree.supports_swa())


def _start(
    scheduler: Any, state: SchedulerStep, batch: Any, req: Any, source: Any, position: int
) -> None:
    """Let a pruned trace's request go on from the source's text up to a token."""
    place, parent = trace_of(req), trace_of(source)
    assert place is not None and parent is not None
    group = parent.group
    if not source.finished() and _shares(scheduler) and not source.skip_radix_cache_insert:
        # Its last token is computed in the branch's own first pass, in which its step is scored.
        shared = len(source.origin_input_ids) + position
        # What it took over itself, or shared before, is in the tree: SGLang only ever adds to it.
        if shared > source.kv.cache_protected_len:
            source.refresh_fill_ids()
            scheduler.tree_cache.checkpoint(source, up_to=shared)
    generated, reasoned = len(req.output_ids), req.reasoning_tokens
    before = place.origin
    _take_over(scheduler, req, source, position)
    child = state.groups.branch(
        place,
        parent,
        position,
        generated - len(req.output_ids) + (0 if before is None else before.tokens),
        reasoned - req.reasoning_tokens + (0 if before is None else before.reasoning_tokens),
    )
    set_trace(req, child)
    req.sampling_params.sampling_seed = branch_seed(
        req.sampling_params.sampling_seed, group.branched
    )
    swapped = place.reason == protocol.PRUNED_FOR_REFILL
    reason = protocol.BRANCHED_FOR_SWAP if swapped else protocol.BRANCHED_FOR_ROOM
    if state.metrics is not None:
        with guard(protocol.IN_METRICS):
            state.metrics.trace_branched(reason, child.depth)
    if state.events is not None:
        state.events.branched(req, child, reason)
    state.log.branched(
        safe_repr(req.rid, 80),
        safe_repr(group.group_id, 300),
        safe_repr(source.rid, 80),
        position,
        child.depth,
        child.score,
        reason,
    )
    batch.batch_is_full = False
    scheduler._add_request_to_queue(req, is_retracted=True)


def _take_over(scheduler: Any, req: Any, source: Any, position: int) -> None:
    """Make the source's output up to a token the request's own, as if it had generated it."""
    from sglang.srt.utils.weight_versions import truncate_weight_version_events

    req.output_ids = array("q", source.output_ids[: position + 1])
    req.full_untruncated_fill_ids = array("q")  # built anew from the output
    req.weight_version_events = truncate_weight_version_events(
        source.weight_version_events, num_kept_tokens=position + 1
    )
    req.customized_info = None
    # Nothing was sent, so the detokenizer knows nothing of it.
    req.surr_offset = req.read_offset = None
    req.send_token_offset = req.send_decode_id_offset = 0
    req.reasoning_tokens, req._is_reasoning_over = 0, False
    req._think_end_match_len = req._think_start_match_len = 0
    scheduler.batch_result_processor._maybe_update_reasoning_tokens(req, list(req.output_ids))
