"""The waiting queue: in which order requests are tried, and who is held back for now.

The queue itself stays as SGLang keeps it; an admission pass sees another one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol
from step_sglang.config import AUTO, OFF
from step_sglang.patches.guard import guard
from step_sglang.patches.pruning import own_tokens
from step_sglang.patches.refill import refill
from step_sglang.patches.state import SchedulerStep, state_of, trace_of
from step_sglang.pruning.admission import (
    NEW,
    ORDINARY,
    GroupDemand,
    GroupLimit,
    Line,
    hold_back,
    line_of_running,
)
from step_sglang.pruning.groups import Group
from step_sglang.pruning.policy import watermark

logger = logging.getLogger(__name__)


def set_limits(scheduler: Any, state: SchedulerStep) -> None:
    """Resolve the limits of a scheduler that knows its decode graphs."""
    groups, batch = state.config.group_limit, state.config.batch_limit
    state.kv_limit = watermark(scheduler.max_total_num_tokens, state.config.prune_at)
    if groups != OFF:
        state.group_limit = GroupLimit(None if groups == AUTO else int(groups))
    if batch not in (AUTO, OFF):
        state.max_batch = int(batch)
    elif graphs := scheduler.tp_worker.get_decode_cuda_graph_bs():
        largest, most = max(graphs), scheduler.max_running_requests
        state.max_batch = largest if batch == AUTO else None
        if most > largest:
            logger.warning(
                "STEP: decode graphs are captured up to %d requests, but up to %d may run, slower "
                "then; %s. Capture more (--cuda-graph-max-bs-decode), or lower "
                "--max-running-requests",
                largest,
                most,
                "traces start only while fewer than that run (--step-max-batch)"
                if batch == AUTO
                else "--step-max-batch off lets traces be among them",
            )


@guard(protocol.IN_ADMISSION)
def add_request_to_queue(result: None, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler._add_request_to_queue``: try it, though others did not fit before."""
    state = state_of(scheduler)
    if state is None:
        return
    state.queued += 1
    if state.came is not None and scheduler.waiting_queue[-1:] == [req]:
        state.came.append(scheduler.waiting_queue.pop())
    if state.config.makes_room and state.groups.num_live:
        scheduler.running_batch.batch_is_full = False
    if state.ledger is not None:
        state.ledger.forget(req)


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """AROUND ``Scheduler.get_new_batch_prefill``: it sees who may start now, by turn.

    SGLang stops at the first request that does not fit, and some policies sort what it sees again.
    Who comes in the middle of a pass, as a grammar is ready or by preemption, is tried in the next.
    """
    state, eligible = state_of(scheduler), None
    if state is not None:
        refill(scheduler, state, running_batch)
    if state is not None and not (scheduler.waiting_queue and state.groups.num_live):
        _say_waiting(state, 0)
    if state is not None and _has_to_choose(scheduler, state, running_batch):
        with guard(protocol.IN_ADMISSION):
            eligible = _who_may_start(scheduler, state, running_batch)
    if state is None or eligible is None:
        return original(scheduler, running_batch)
    queue: list[Any] = scheduler.waiting_queue
    came: list[Any] = []
    nobody = not eligible.queue
    scheduler.waiting_queue, state.refused, state.came = eligible.queue, None, came
    try:
        plan = original(scheduler, running_batch)
    finally:
        left, state.came = scheduler.waiting_queue, None
        scheduler.waiting_queue = [*(queue if nobody else _rest(queue, left, eligible.held)), *came]
    with guard(protocol.IN_ADMISSION):
        # In the order in which they were tried: a policy sorts the list in its place.
        _account(state, eligible, left, plan)
    return plan


def _rest(queue: list[Any], left: list[Any], held: list[Any]) -> list[Any]:
    """Who still waits, by arrival."""
    waiting = {*left, *held}
    return [req for req in queue if req in waiting]


def _has_to_choose(scheduler: Any, state: SchedulerStep, running_batch: Any) -> bool:
    if state.config.capture or not state.groups.num_live:
        return False
    if not state.config.makes_room and state.group_limit is None and state.max_batch is None:
        return False
    if scheduler.grammar_manager.has_waiting_grammars():
        return True  # what comes from there is tried at once, whatever was said before
    # SGLang itself tries nobody otherwise, but where it may preempt.
    return bool(scheduler.waiting_queue) and (
        not running_batch.batch_is_full
        or bool(
            running_batch.is_empty()
            or scheduler.enable_priority_preemption
            or scheduler.is_hybrid_swa
        )
    )


@dataclass(frozen=True)
class _Eligible:
    queue: list[Any]  # requests
    held: list[Any]  # the others
    lines: dict[Any, Line]  # of those in the queue; none where they keep SGLang's order


class _Running:
    """What runs, at the moment of an admission pass."""

    def __init__(self, scheduler: Any, running_batch: Any) -> None:
        chunked, page = scheduler.chunked_req, scheduler.page_size
        self.reqs = [*running_batch.reqs, *(() if chunked is None else (chunked,))]
        self.traces = 0
        self.held: Counter[Group] = Counter()  # KV tokens
        self.others = 0  # KV tokens of ordinary requests
        self.groups: dict[Group, Any] = {}  # and a request of each
        for req in self.reqs:
            group = _group_of(req)
            tokens = 0 if req is chunked or req.finished() else own_tokens(req, page)
            if group is None or not group.for_memory:
                self.others += tokens
                continue
            self.traces += 1
            self.held[group] += tokens
            self.groups.setdefault(group, req)


def _who_may_start(scheduler: Any, state: SchedulerStep, running_batch: Any) -> _Eligible:
    queue: list[Any] = scheduler.waiting_queue
    # While only the held wait, and nobody comes or goes, the answer stays: thousands may wait.
    seen = (state.queued, state.groups.changes, len(queue), len(running_batch.reqs))
    if seen == state.all_held:
        return _Eligible([], queue, {})
    running = _Running(scheduler, running_batch)
    groups = _late_groups(scheduler, state, running)
    _say_waiting(state, len(groups))
    queue, late = _without_late(queue, groups)
    queue, lines = _by_turn(queue, state, running)
    queue, over = _within_batch(queue, scheduler, state, running)
    state.all_held = None if queue else seen
    return _Eligible(queue, [*late, *over], lines)


def _without_late(queue: list[Any], late: set[Group]) -> tuple[list[Any], list[Any]]:
    """Who may begin, and the others."""
    if not late:
        return queue, []
    return (
        [req for req in queue if _group_of(req) not in late],
        [req for req in queue if _group_of(req) in late],
    )


def _by_turn(
    queue: list[Any], state: SchedulerStep, running: _Running
) -> tuple[list[Any], dict[Any, Line]]:
    """The queue in the order in which it is tried, and everybody's line."""
    if not state.config.makes_room:
        return queue, {}
    lines = {req: _line(req, running) for req in queue}
    return [queue[place] for place in state.turns.order(list(lines.values()))], lines


def _within_batch(
    queue: list[Any], scheduler: Any, state: SchedulerStep, running: _Running
) -> tuple[list[Any], list[Any]]:
    """Who the batch has room for, and the others."""
    if state.max_batch is None:
        return queue, []
    queue = sorted(queue, key=lambda req: _priority(scheduler, req))
    traces = [_is_trace(req) for req in queue]
    over = hold_back(traces, len(running.reqs), running.traces, state.max_batch)
    return (
        [req for place, req in enumerate(queue) if place not in over],
        [queue[place] for place in sorted(over)],
    )


def _group_of(req: Any) -> Group | None:
    """None also for what is on its way out, in one last pass: it waits for nobody's turn."""
    trace = trace_of(req)
    if trace is None or not trace.is_live or req.to_finish is not None:
        return None
    return trace.group


def _priority(scheduler: Any, req: Any) -> int:
    """With SGLang's priority scheduling: the lower, the sooner. Else all are alike."""
    if not scheduler.enable_priority_scheduling:
        return 0
    return int(req.priority * scheduler.policy.priority_sign)


def _is_trace(req: Any) -> bool:
    group = _group_of(req)
    return group is not None and group.for_memory


def generates_nothing(req: Any) -> bool:
    """So it is for the tokenizer manager's own prefix warm-up for n > 1."""
    return bool(req.sampling_params.max_new_tokens == 0)


def _line(req: Any, running: _Running) -> Line:
    group = _group_of(req)
    if group is None or not group.for_memory:
        # The tokenizer manager computes the prompt of n samples alone, before it sends them.
        return NEW if generates_nothing(req) else ORDINARY
    tokens = running.held[group]
    return line_of_running(group.group_id, tokens / group.weight) if tokens else NEW


def _late_groups(scheduler: Any, state: SchedulerStep, running: _Running) -> set[Group]:
    """Groups of which nothing has run and nothing may begin yet."""
    if state.group_limit is None:
        return set()
    began = {group: req for group, req in running.groups.items() if group.limited}
    waiting: dict[Group, Any] = {}
    for req in scheduler.waiting_queue:
        group = _group_of(req)
        if group is not None and group.limited and group not in began:
            (began if group.began else waiting).setdefault(group, req)
    first = sorted(waiting, key=lambda group: _priority(scheduler, waiting[group]))
    waiting = {group: waiting[group] for group in first}

    def demands(groups: dict[Group, Any]) -> Sequence[GroupDemand]:
        return [
            GroupDemand(
                group.expected,
                group.min_survivors,
                group.weight,
                state.lengths.expected(req.sampling_params.max_new_tokens),
                len(req.origin_input_ids),
                running.held[group],
            )
            for group, req in groups.items()
        ]

    pool = scheduler.max_total_num_tokens - running.others
    if state.kv_limit is not None:
        pool = min(pool, state.kv_limit)
    number = state.group_limit.may_begin(demands(began), demands(waiting), pool)
    return set(list(waiting)[number:])


def _say_waiting(state: SchedulerStep, groups: int) -> None:
    if groups != state.groups_waiting:
        state.groups_waiting = groups
        if state.metrics is not None:
            with guard(protocol.IN_METRICS):
                state.metrics.groups_wait(groups)


def _account(state: SchedulerStep, eligible: _Eligible, left: Sequence[Any], plan: Any) -> None:
    waiting = set(left)
    admitted = [req for req in eligible.queue if req not in waiting]
    for req in admitted:
        if (group := _group_of(req)) is not None:
            group.began = True
    state.turns.admitted([eligible.lines[req] for req in admitted if req in eligible.lines])
    refused = eligible.lines.get(state.refused)
    if refused is not None and state.turns.refused(refused):
        plan.running_batch.batch_is_full = False  # let the next line try in the next pass
    state.refused = None
