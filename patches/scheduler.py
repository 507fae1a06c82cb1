"""Hooks on a scheduler's start, on a request's birth and early death, and on what it reports."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from step_sglang import protocol
from step_sglang.baselines import EngineContext
from step_sglang.baselines.embedding import load_embedding
from step_sglang.config import StepConfig
from step_sglang.errors import ConfigError, StepError
from step_sglang.patches import forward, guard, hooks
from step_sglang.patches.feed import answer_feed, is_for_feed
from step_sglang.patches.places import kind_of
from step_sglang.patches.preflight import (
    load_config_scorer,
    load_tokenizer,
    step_boundaries,
    step_delimiters,
)
from step_sglang.patches.server_args import config_of
from step_sglang.patches.state import SchedulerStep, set_state, set_trace, state_of, trace_of
from step_sglang.pruning.groups import GroupRegistry, TraceStatus
from step_sglang.pruning.log import PruningLog
from step_sglang.pruning.metrics import StepMetrics
from step_sglang.pruning.request import StepRequest, parse_request
from step_sglang.pruning.timeline import Timeline
from step_sglang.scoring.boundary import bitmap
from step_sglang.scoring.capture import Capture, boundary_positions
from step_sglang.scoring.op import MAX_ROWS
from step_sglang.scoring.self_check import check_op, describe_op
from step_sglang.scoring.slots import SlotState

if TYPE_CHECKING:
    from step_sglang.patches.spans import TraceEvents

logger = logging.getLogger(__name__)


def init_all_cuda_graphs(original: Callable[[Any], None], scheduler: Any) -> None:
    """AROUND ``Scheduler.init_all_cuda_graphs``: the pools exist, and no graph yet.

    Raises:
        StepError: the op's results are wrong on this device, or a graph was captured without it.
    """
    config = config_of(scheduler.server_args)
    if config is None:
        original(scheduler)
        return
    state = _begin(scheduler, config)
    # Before the capture, so that the kernel is loaded; after it, what the server will use.
    check_op(state.slots, state.hidden_dtype)
    original(scheduler)
    _require_op_in_graphs(scheduler.tp_worker.model_runner)
    check_op(state.slots, state.hidden_dtype)
    logger.info("STEP: the op's results are right: %s", describe_op(state.slots))


def _require_op_in_graphs(runner: Any) -> None:
    """Refuse decode graphs that would be replayed without scoring."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    graphs = runner.decode_cuda_graph_runner
    if not isinstance(graphs, DecodeCudaGraphRunner):
        return  # no graph, or one that another runner compiled, in which Python is compiled too
    missing = forward.uncaptured(graphs.capture_bs)
    if missing:
        raise StepError(
            f"STEP's op is not in the decode graphs of batch sizes {missing}: this model, or a "
            "plugin, does not call LogitsProcessor.forward with a ForwardBatch. Serve it without "
            "--enable-step"
        )


def _begin(scheduler: Any, config: StepConfig) -> SchedulerStep:
    from sglang.srt.runtime_context import get_parallel, get_spec

    runner = scheduler.tp_worker.model_runner
    hidden_size = scheduler.model_config.hf_text_config.hidden_size
    scorer = load_config_scorer(config, hidden_size)
    tokenizer = scheduler.tokenizer or load_tokenizer(scheduler.server_args)
    ids, think_end = step_boundaries(config, scorer, tokenizer)
    if think_end is None and not config.scores_all:
        logger.warning("STEP: the tokenizer has no think-end token, so every step is scored")
    hooks.verify(hooks.SCHEDULER)
    num_slots = runner.req_to_token_pool.req_to_token.shape[0]
    max_rows = _max_rows(runner.req_to_token_pool.size)
    if max(num_slots - 1, max_rows) > MAX_ROWS:  # slot 0 pads
        raise ConfigError(
            f"STEP scores at most {MAX_ROWS} running requests, this server allows "
            f"{num_slots - 1} in batches of up to {max_rows} rows: lower --max-running-requests"
        )
    drafted = 0
    if not scheduler.spec_algorithm.is_none():
        drafted = get_spec().speculative_num_draft_tokens
        hooks.install(hooks.SPECULATION)
    slots = SlotState(
        num_slots=num_slots,
        scorer=scorer,
        boundary=bitmap(ids),
        think_end_id=think_end,
        device=torch.device(runner.device),
        capture_dtype=runner.dtype if config.capture else None,
        max_rows=max_rows,
        drafted=drafted,
        hidden_dtype=runner.dtype,
    )
    groups = GroupRegistry(
        by_certainty=config.by_certainty,
        # Fitted on the scores of the thinking alone.
        calibration=None if config.scores_all else scorer.info.calibration,
    )
    metrics, events = _metrics(scheduler, groups), _events()
    embedding = load_embedding(config.embedding, tokenizer.decode)
    state = SchedulerStep(
        replace(config, delimiters=step_delimiters(config, scorer)),
        slots,
        EngineContext(frozenset(ids), think_end, embedding),
        hidden_size,
        runner.dtype,
        groups,
        PruningLog(each=config.log == "each"),
        metrics,
        events,
    )
    set_state(scheduler, state)
    forward.activate(
        slots,
        groups,
        metrics,
        alone=get_parallel().attn_tp_size == 1,
        events=events,
        heads=_heads(runner.model) if drafted else frozenset(),
    )
    logger.info("STEP: %d boundary tokens, think-end %s, %s", len(ids), think_end, config)
    return state


def _heads(model: torch.nn.Module) -> frozenset[int]:
    """Ids of the modules that make the served model's logits: a draft model has its own."""
    from sglang.srt.layers.logits_processor import LogitsProcessor

    return frozenset(id(m) for m in model.modules() if isinstance(m, LogitsProcessor))


def _max_rows(requests: int) -> int:
    """Rows of the largest batch of that many requests.

    An MoE model's all-to-all, or ``--moe-dense-tp-size``, pads batches to a multiple of the ranks.
    """
    from sglang.srt.utils.common import get_cuda_graph_max_batch_size, get_eager_max_batch_size

    return int(max(get_cuda_graph_max_batch_size(requests), get_eager_max_batch_size(requests)))


def _metrics(scheduler: Any, groups: GroupRegistry) -> StepMetrics | None:
    if not scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        return None
    labels = scheduler.metrics_collector.labels
    metrics = StepMetrics({name: labels[name] for name in labels if name != "priority"})
    groups.observer = guard.guard(protocol.IN_METRICS)(partial(metrics.trace_changed, groups))
    guard.observe(metrics.failed)
    return metrics


@guard.guard(protocol.IN_TRACING)
def _events() -> TraceEvents | None:
    from sglang.srt.observability.trace import get_global_tracing_enabled

    if not get_global_tracing_enabled():
        return None
    from step_sglang.patches.spans import TraceEvents

    return TraceEvents()


@guard.guard(protocol.IN_REQUESTS)
def create_generation_req(req: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler._create_generation_req``: give the request its trace."""
    state = state_of(scheduler)
    params = req.sampling_params
    step_request = parse_request(params.custom_params) if state is not None else None
    # max_new_tokens 0 is the tokenizer manager's own prefix warm-up for n > 1: no trace.
    if state is None or step_request is None or params.max_new_tokens == 0:
        return
    capture = _capture(state, step_request, req) if step_request.hidden_states else None
    # The tokenizer manager decided it, who knows what can have branches.
    refill = step_request.refill or protocol.REFILL_OFF
    trace = state.groups.join(
        step_request.group or req.rid,
        weight=step_request.weight,
        min_survivors=step_request.min_survivors or state.config.min_survivors,
        prune_at=step_request.prune_at,
        name=step_request.trace,
        prompt_tokens=len(req.origin_input_ids),
        step_scores=step_request.step_scores,
        capture=capture,
        baseline=step_request.baseline,
        context=state.context,
        timeline=Timeline() if step_request.record else None,
        alone=step_request.group is None,
        samples=params.n,
        rid=req.rid,
        show_text=step_request.show_text,
        refill=refill,
        kind=b"" if refill == protocol.REFILL_OFF else kind_of(req),
    )
    set_trace(req, trace)


def _capture(state: SchedulerStep, step_request: StepRequest, req: Any) -> Capture:
    start = step_request.prompt_tokens
    wanted: tuple[int, ...] = ()
    if start is not None:
        # A cached prefix is not computed again, so its hidden states would be missing.
        req.extra_key = f"{req.extra_key or ''}{req.rid}"
        req.skip_radix_cache_insert = True
        wanted = boundary_positions(
            req.origin_input_ids, start, state.context.boundaries, state.context.think_end_id
        )
    return Capture(state.hidden_size, state.hidden_dtype, start, wanted)


@guard.guard(protocol.IN_RESPONSES)
def send_abort_output(result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER ``Scheduler.send_abort_output``: the request ended outside the output stream."""
    state, trace = state_of(scheduler), trace_of(req)
    if state is not None and trace is not None:
        state.groups.end(trace, TraceStatus.ABORTED)


def get_internal_state(original: Callable[[Any, Any], Any], scheduler: Any, recv_req: Any) -> Any:
    """AROUND ``Scheduler.get_internal_state``: what ``/server_info`` says of STEP, or the feed."""
    state = state_of(scheduler)
    if state is not None and is_for_feed(recv_req):
        return answer_feed(scheduler, state, recv_req)
    result = original(scheduler, recv_req)
    if state is not None:
        _add_state(result, state)
    return result


@guard.guard(protocol.IN_RESPONSES)
def _add_state(result: Any, state: SchedulerStep) -> None:
    result.internal_state["step"] = {
        **state.config.effective(),
        "groups": len(state.groups),
        "groups_begun": state.groups.num_begun,
        "groups_waiting": state.groups_waiting,
        "group_limit": state.group_limit and state.group_limit.most,
        "batch_limit": state.max_batch,
        "kv_limit": state.kv_limit,
        "live_traces": state.groups.num_live,
        "free_places": 0 if state.places is None else state.places.free(),
        "steps_unscored": forward.steps_unscored(),
        "passes_lost": forward.passes_lost(),
        "stopped": state.groups.stopped,
        "failures": guard.counts(),
        "scorer_stale": state.scorer_stale,
    }


def record_weight_version(result: None, updater: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``record_weight_version_after_update``, which every way of updating weights ends in."""
    state = state_of(updater.scheduler)
    if state is None or not state.config.scorer_file:
        return
    state.scorer_stale = True
    if state.metrics is not None:
        with guard.guard(protocol.IN_METRICS):
            state.metrics.scorer_is_stale()
    logger.warning(
        "STEP: the model's weights were updated, but the scorer %r was trained for those before; "
        "it goes on scoring until the server is started with one for the new weights",
        state.config.scorer,
    )
