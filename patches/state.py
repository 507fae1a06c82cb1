"""What STEP owns in one scheduler, and where: on the scheduler, and on each request its trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from step_sglang.baselines import EngineContext
from step_sglang.config import StepConfig
from step_sglang.pruning.admission import GroupLimit, TraceLengths, Turns
from step_sglang.pruning.groups import GroupRegistry, Trace
from step_sglang.pruning.log import PruningLog
from step_sglang.pruning.metrics import StepMetrics
from step_sglang.scoring.slots import SlotState

_STATE = "step_state"
TRACE = "step_trace"


@dataclass(eq=False)  # one object per scheduler
class SchedulerStep:
    """What STEP owns in one scheduler."""

    config: StepConfig
    slots: SlotState
    context: EngineContext
    hidden_size: int
    hidden_dtype: torch.dtype
    groups: GroupRegistry
    log: PruningLog
    metrics: StepMetrics | None = None  # with --enable-metrics, on the rank that SGLang measures
    events: Any = None  # of `spans`, with --enable-trace
    turns: Turns = field(default_factory=Turns)
    lengths: TraceLengths = field(default_factory=TraceLengths)
    group_limit: GroupLimit | None = None
    kv_limit: int | None = None  # KV tokens that groups may hold together; None: the pool
    below_shares: int = 0  # KV tokens that every group may surely still take, of its own share too
    shares_seen: tuple[int, int] | None = None  # traces and requests of which that was told
    max_batch: int | None = None  # requests; no further trace starts then
    groups_waiting: int = 0  # that may not begin yet
    queued: int = 0  # requests so far
    all_held: Any = None  # what the last admission pass saw, if everybody was held back in it
    came: list[Any] | None = None  # requests that came in the admission pass that goes on, if any
    refused: Any = None  # the request that did not fit in the admission pass that goes on
    warned_unscored: bool = False  # a group was pruned that has no scored step
    places: Any = None  # of pruned traces that branches may take, see `places`
    ledger: Any = None  # of the running batch, see `ledger`
    unfit: Any = None  # the list of a batch's requests for which there is none
    aborts: bool = False  # requests were aborted since running ones were looked at for it
    scorer_stale: bool = False  # the weights that it was trained for were replaced


def state_of(scheduler: Any) -> SchedulerStep | None:
    """A scheduler's STEP state, or None when STEP is off."""
    return getattr(scheduler, _STATE, None)


def set_state(scheduler: Any, state: SchedulerStep) -> None:
    """Turn STEP on for a scheduler."""
    setattr(scheduler, _STATE, state)


def is_traced(holder: Any) -> bool:
    """Whether SGLang's tracing follows a request of the scheduler, or a tokenizer manager's."""
    return bool(holder.time_stats.trace_ctx.tracing_enable)


def trace_of(req: Any) -> Trace | None:
    """A request's trace, or None for an ordinary request."""
    return getattr(req, TRACE, None)


def set_trace(req: Any, trace: Trace) -> None:
    """Make a request a trace."""
    setattr(req, TRACE, trace)
