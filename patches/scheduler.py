"""STEP's part of a scheduler: what it owns, and the hooks on a request's birth and early death."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from step_sglang import words
from step_sglang.baselines import Surroundings
from step_sglang.boundary import bitmap
from step_sglang.capture import Capture, boundary_positions
from step_sglang.config import StepConfig
from step_sglang.embedding import load_embedding
from step_sglang.errors import ConfigError
from step_sglang.groups import Fate, GroupRegistry, Trace
from step_sglang.metrics import StepMetrics
from step_sglang.op import MAX_ROWS
from step_sglang.patches import forward, guard, hooks
from step_sglang.patches.preflight import (
    load_config_scorer,
    load_tokenizer,
    step_boundaries,
)
from step_sglang.patches.record import config_of
from step_sglang.recording import Recording
from step_sglang.request import StepRequest, parse_request
from step_sglang.slots import SlotState

logger = logging.getLogger(__name__)

_STATE = "step_state"
_TRACE = "step_trace"


@dataclass
class SchedulerStep:
    """What STEP owns in one scheduler."""

    config: StepConfig
    slots: SlotState
    around: Surroundings
    hidden_size: int
    hidden_dtype: torch.dtype
    groups: GroupRegistry
    metrics: StepMetrics | None = None  # with --enable-metrics, on the rank that SGLang measures
    scorer_stale: bool = False  # the weights that it was trained for were replaced


def state_of(scheduler: Any) -> SchedulerStep | None:
    """A scheduler's STEP state, or None when STEP is off."""
    return getattr(scheduler, _STATE, None)


def trace_of(req: Any) -> Trace | None:
    """A request's trace, or None for an ordinary request."""
    return getattr(req, _TRACE, None)


def init_all_cuda_graphs(scheduler: Any) -> None:
    """BEFORE ``Scheduler.init_all_cuda_graphs``: the pools exist, and no graph yet."""
    config = config_of(scheduler.server_args)
    if config is None:
        return
    runner = scheduler.tp_worker.model_runner
    hidden_size = scheduler.model_config.hf_text_config.hidden_size
    scorer = load_config_scorer(config, hidden_size)
    tokenizer = scheduler.tokenizer or load_tokenizer(scheduler.server_args)
    ids, think_end = step_boundaries(config, scorer, tokenizer)
    if think_end is None and not config.scores_all:
        logger.warning("STEP: the tokenizer has no think-end token, so every step is scored")
    hooks.verify(hooks.SCHEDULER)
    num_slots = runner.req_to_token_pool.req_to_token.shape[0]
    if num_slots - 1 > MAX_ROWS:  # slot 0 pads
        raise ConfigError(
            f"STEP scores at most {MAX_ROWS} running requests, this server allows "
            f"{num_slots - 1}: lower --max-running-requests"
        )
    slots = SlotState(
        num_slots=num_slots,
        scorer=scorer,
        boundary=bitmap(ids),
        think_end_id=think_end,
        device=torch.device(runner.device),
        capture_dtype=runner.dtype if config.capture else None,
    )
    groups = GroupRegistry()
    metrics = _metrics(scheduler, groups)
    embedding = load_embedding(config.embedding, tokenizer.decode)
    state = SchedulerStep(
        config,
        slots,
        Surroundings(frozenset(ids), think_end, embedding),
        hidden_size,
        runner.dtype,
        groups,
        metrics,
    )
    setattr(scheduler, _STATE, state)
    forward.activate(slots, groups, metrics)
    logger.info("STEP: %d boundary tokens, think-end %s, %s", len(ids), think_end, config)


def _metrics(scheduler: Any, groups: GroupRegistry) -> StepMetrics | None:
    if not scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        return None
    labels = scheduler.metrics_collector.labels
    metrics = StepMetrics({name: labels[name] for name in labels if name != "priority"})
    groups.observer = guard.guard(words.IN_METRICS)(partial(metrics.trace_changed, groups))
    guard.observe(metrics.failed)
    return metrics


@guard.guard(words.IN_REQUESTS)
def create_generation_req(req: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler._create_generation_req``: give the request its trace."""
    state = state_of(scheduler)
    params = req.sampling_params
    wishes = parse_request(params.custom_params) if state is not None else None
    # max_new_tokens 0 is the tokenizer manager's own prefix warm-up for n > 1: no trace.
    if state is None or wishes is None or params.max_new_tokens == 0:
        return
    capture = _capture(state, wishes, req) if wishes.hidden_states else None
    trace = state.groups.join(
        wishes.group or req.rid,
        weight=wishes.weight,
        min_survivors=wishes.min_survivors or state.config.min_survivors,
        name=wishes.trace,
        prompt_tokens=len(req.origin_input_ids),
        step_scores=wishes.step_scores,
        capture=capture,
        baseline=wishes.baseline,
        around=state.around,
        recording=Recording() if wishes.record else None,
    )
    setattr(req, _TRACE, trace)


def _capture(state: SchedulerStep, wishes: StepRequest, req: Any) -> Capture:
    start = wishes.prompt_tokens
    wanted: tuple[int, ...] = ()
    if start is not None:
        # A cached prefix is not computed again, so its hidden states would be missing.
        req.extra_key = f"{req.extra_key or ''}{req.rid}"
        req.skip_radix_cache_insert = True
        wanted = boundary_positions(
            req.origin_input_ids, start, state.around.boundaries, state.around.think_end_id
        )
    return Capture(state.hidden_size, state.hidden_dtype, start, wanted)


@guard.guard(words.IN_RESPONSES)
def send_abort_output(result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER ``Scheduler.send_abort_output``: the request ended outside the output stream."""
    state, trace = state_of(scheduler), trace_of(req)
    if state is not None and trace is not None:
        state.groups.end(trace, Fate.ABORTED)


@guard.guard(words.IN_RESPONSES)
def get_internal_state(result: Any, scheduler: Any, recv_req: Any) -> None:
    """AFTER ``Scheduler.get_internal_state``: what ``/server_info`` says of STEP."""
    state = state_of(scheduler)
    if state is not None:
        result.internal_state["step"] = {
            **asdict(state.config),
            "groups": len(state.groups),
            "live_traces": state.groups.num_live,
            "steps_unscored": forward.steps_unscored(),
            "failures": guard.counts(),
            "scorer_stale": state.scorer_stale,
        }


def record_weight_version(result: None, updater: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``record_weight_version_after_update``, which every way of updating weights ends in."""
    state = state_of(updater.scheduler)
    if state is None or not state.config.scorer:
        return
    state.scorer_stale = True
    if state.metrics is not None:
        with guard.guard(words.IN_METRICS):
            state.metrics.scorer_is_stale()
    logger.warning(
        "STEP: the model's weights were updated, but the scorer %r was trained for those before; "
        "it goes on scoring until the server is started with one for the new weights",
        state.config.scorer,
    )
