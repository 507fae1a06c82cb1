"""Hooks around the forward pass: reset slots, score inside it, carry the results to the host."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from step_sglang import protocol
from step_sglang.patches.guard import guard
from step_sglang.patches.state import trace_of
from step_sglang.pruning.groups import GroupRegistry, Trace
from step_sglang.pruning.metrics import StepMetrics
from step_sglang.scoring.capture import Capture
from step_sglang.scoring.certainty import CANDIDATES
from step_sglang.scoring.confidence import token_confidences
from step_sglang.scoring.slots import SlotReset, SlotState

if TYPE_CHECKING:
    from step_sglang.patches.spans import TraceEvents

logger = logging.getLogger(__name__)

# Lost passes in a row after which scoring is given up: about one step of text without a score.
MAX_LOST_PASSES = 64


@dataclass
class _Active:
    """What scores the passes of this process."""

    slots: SlotState
    groups: GroupRegistry
    metrics: StepMetrics | None = None
    events: TraceEvents | None = None
    alone: bool = True  # no other rank could see a failure that this one does not
    prefilled: _PrefilledRows | None = None  # of the pass that is being enqueued
    asked: bool = False  # that pass came to the scoring hook
    scored: bool = False  # and was scored there
    replayed: bool = False  # that pass was a captured graph, in which the op is
    missed_any: bool = False  # some pass was lost: a slot may have missed its think-end token
    steps_unscored: int = 0  # their scores were not finite
    passes_lost: int = 0  # with live traces, but not scored
    lost_in_a_row: int = 0
    captured: set[int] = field(default_factory=set)  # batch sizes whose graph has the op in it
    heads: frozenset[int] = frozenset()  # ids of the served model's LogitsProcessors; empty: all


@dataclass(frozen=True)
class _PrefilledRows:
    """Rows of one prefill pass that requests want captured."""

    rows: list[int]  # of the pass's hidden states
    owners: list[tuple[Capture, int]]  # for each row who wants it, and its position in the input


_UNSURE = "step_unsure"  # on a request whose slot could not be set: what is scored is not its own

_UNTOUCHED = -1.0  # no step score, not even of a row without a step

# One model per scheduler process; LogitsProcessor and ModelRunner know no scheduler.
_active: _Active | None = None


def activate(
    slots: SlotState,
    groups: GroupRegistry,
    metrics: StepMetrics | None,
    *,
    alone: bool,
    events: TraceEvents | None = None,
    heads: frozenset[int] = frozenset(),
) -> None:
    """Score every forward pass of this process from now on.

    Args:
        slots: the op's state.
        groups: the traces of this process.
        metrics: counts what happens; None without metrics.
        alone: whether no other tensor-parallel rank runs the same passes.
        events: tells of traces where SGLang's tracing is on.
        heads: ids of the served model's own LogitsProcessors, where a draft model's are in the same
            process; empty: all are the model's.
    """
    global _active  # noqa: PLW0603
    _active = _Active(slots, groups, metrics, events, alone, heads=heads)


def active() -> _Active | None:
    """What scores the passes of this process; None without STEP."""
    return _active


def forward_batch_generation(worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``TpModelWorker.forward_batch_generation``: on the forward stream, before the pass.

    Requests that start or resume in this pass get their slot set; those that decode in a mixed
    pass keep it, because the device is ahead of the host's copy.
    """
    if _active is None:
        return
    _active.asked = _active.scored = _active.replayed = False
    # A pass that verifies drafts is given its own batch; requests go on in it as in a decode pass.
    if batch is None or not is_prefill(batch.forward_mode):
        return
    with guard(protocol.IN_SCORING) as beginning:
        _begin(_active, batch)
    if beginning.failed:
        for req in _starting(batch):
            setattr(req, _UNSURE, True)


def is_prefill(mode: Any) -> bool:
    """Whether requests start or resume in passes of this mode. SGLang calls verifying one, too."""
    return bool(mode.is_extend()) and not mode.is_target_verify()


def _starting(batch: Any) -> list[Any]:
    decoding = set(batch.decoding_reqs or ())
    return [req for req in batch.reqs if req not in decoding]


def _begin(active: _Active, batch: Any) -> None:
    active.prefilled = None
    starting, slots = _starting(batch), active.slots
    slots.reset([_slot_reset(req, slots) for req in starting])
    for req in starting:
        setattr(req, _UNSURE, False)
    if active.events is not None:
        active.events.admitted(starting)
    if slots.captures:
        active.prefilled = _prefilled_rows(batch, slots)


def _slot_reset(req: Any, slots: SlotState) -> SlotReset:
    trace = trace_of(req)
    if trace is None or (trace.capture is not None and trace.capture.prompt_tokens is not None):
        return SlotReset(req.kv.req_pool_idx)
    # A resumed request has consumed every token but its last, which the coming pass consumes.
    consumed = max(len(req.output_ids) - 1, 0)
    return SlotReset(
        slot=req.kv.req_pool_idx,
        score_from=len(req.origin_input_ids) + consumed,
        score_sum=trace.score_sum,
        num_steps=trace.num_steps,
        # A continued trace may have ended its thinking in an earlier request, now in the prompt.
        thinking=slots.think_end_id not in req.output_ids[:consumed]
        and slots.think_end_id not in req.origin_input_ids[trace.prompt_tokens :],
    )


def _prefilled_rows(batch: Any, slots: SlotState) -> _PrefilledRows | None:
    rows: list[int] = []
    owners: list[tuple[Capture, int]] = []
    offset = 0
    for req, extend_len in zip(batch.reqs, batch.extend_lens, strict=True):
        trace = trace_of(req)
        if trace is not None and trace.capture is not None:
            for position in trace.capture.wanted:
                if req.prefix_len <= position < req.prefix_len + extend_len:
                    rows.append(offset + position - req.prefix_len)
                    owners.append((trace.capture, position))
        offset += extend_len
    return _PrefilledRows(rows, owners) if rows else None


def logits_forward(
    processor: Any,
    input_ids: torch.Tensor,
    hidden_states: torch.Tensor,
    lm_head: Any,
    logits_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """BEFORE ``LogitsProcessor.forward``: inside the captured graph, after the final norm."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    # A model or a plugin may pass a LogitsMetadata, which does not say whose rows these are: then
    # the pass is lost, and counted in `sample`. A draft model's passes are not the trace's.
    if (
        _active is None
        or not isinstance(logits_metadata, ForwardBatch)
        or (_active.heads and id(processor) not in _active.heads)
    ):
        return
    compiled = torch.compiler.is_compiling()  # then no Python of this runs in later passes
    if not compiled:
        _active.asked = True
    with guard(protocol.IN_SCORING) as scoring:
        _score(_active, hidden_states, logits_metadata)
    if not compiled and not scoring.failed:
        _active.scored = True


def model_forward(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``ModelRunner.forward``: whether a graph was replayed, without any Python.

    A decode graph holds the op: :func:`capture_one_shape` has seen it run.
    """
    if _active is not None and result.can_run_graph and not runner.is_draft_worker:
        _active.replayed = True


def capture_one_shape(
    original: Callable[..., None], runner: Any, size: int, *args: Any, **kwargs: Any
) -> None:
    """AROUND ``DecodeCudaGraphRunner.capture_one_shape``: did the op run in what it records?

    The passes that warm a shape up run the same Python as the one that is recorded. They must
    write a result to every row, whatever way the model takes to its head.
    """
    if _active is None or runner.model_runner.is_draft_worker:
        original(runner, size, *args, **kwargs)
        return
    # Under speculative decoding what is recorded verifies drafts: it keeps their hidden states.
    results = _active.slots.kept_drafts(size)
    if results is None:
        results = _active.slots.out[:size, 0]
    results.fill_(_UNTOUCHED)
    original(runner, size, *args, **kwargs)
    if not bool((results == _UNTOUCHED).any()):
        _active.captured.add(size)


def uncaptured(sizes: Sequence[int]) -> list[int]:
    """Those of the captured batch sizes whose graph would not score."""
    return [size for size in sizes if _active is None or size not in _active.captured]


def _may_be_replayed(hidden_states: torch.Tensor) -> bool:
    """Whether this pass may be captured or compiled, to be repeated with traces in it."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

    return (
        hidden_states.device.type != "cpu"
        or torch.compiler.is_compiling()
        or bool(get_is_capture_mode())
    )


def _score(active: _Active, hidden_states: torch.Tensor, forward: Any) -> None:
    if not active.groups.num_live and not _may_be_replayed(hidden_states):
        return
    if forward.forward_mode.is_target_verify():
        # Which of the drafts are accepted is known after the pass: scored then.
        active.slots.keep_drafts(hidden_states)
        return
    if forward.forward_mode.is_decode():
        rows = None
    elif forward.forward_mode.is_extend():
        rows = torch.cumsum(forward.extend_seq_lens, dim=0, dtype=torch.int64) - 1
    else:
        return
    slots = active.slots
    slots.score(hidden_states, rows, forward.req_pool_indices, forward.input_ids, forward.positions)
    if active.prefilled is not None:
        slots.keep_rows(hidden_states, active.prefilled.rows)


def sample(
    original: Callable[..., torch.Tensor], runner: Any, logits_output: Any, forward_batch: Any
) -> torch.Tensor:
    """AROUND ``ModelRunner.sample``, which changes the logits in place and clears the field that
    carries values to the host.
    """
    mode = forward_batch.forward_mode
    if (
        _active is None
        or not _active.groups.num_live
        or _active.groups.stopped
        or runner.is_draft_worker
        or not (mode.is_decode() or mode.is_extend())
    ):
        return original(runner, logits_output, forward_batch)
    # A prefill graph holds the body alone: the head, and the hook, run in Python after it.
    lost = not (_active.scored or (_active.replayed and mode.is_decode()))
    if lost or _active.lost_in_a_row:
        count_lost(_active, lost)
    confidences = None
    with guard(protocol.IN_SCORING):
        confidences = confidences_of(_active.groups, logits_output.next_token_logits)
    tokens = original(runner, logits_output, forward_batch)
    output = None
    with guard(protocol.IN_SCORING):
        output = _results(_active, forward_batch.batch_size, confidences, lost)
    append_output(logits_output, output)
    return tokens


def count_lost(active: _Active, lost: bool) -> None:
    """Count a pass that live traces were in and nothing scored; give up when all are lost."""
    if not lost:
        active.lost_in_a_row = 0
        return
    active.missed_any = True
    active.passes_lost += 1
    if active.metrics is not None:
        with guard(protocol.IN_METRICS):
            active.metrics.pass_lost()
    if not active.asked and active.passes_lost == 1:
        logger.error(
            "STEP lost a forward pass: the model did not call LogitsProcessor.forward with a "
            "ForwardBatch, so its steps have no scores; further lost passes are only counted"
        )
    # A failure may be one rank's own, and ranks that disagree on whether STEP runs would hang.
    if active.asked and not active.alone:
        return
    active.lost_in_a_row += 1
    if active.lost_in_a_row >= MAX_LOST_PASSES:
        _stop(active)


def _stop(active: _Active) -> None:
    why = "failed" if active.asked else "was bypassed by the model or a plugin"
    reason = f"scoring {why} in {active.lost_in_a_row} forward passes in a row"
    active.groups.stop(reason)
    if active.metrics is not None:
        with guard(protocol.IN_METRICS):
            active.metrics.has_stopped()
    logger.error(
        "STEP stopped for good: %s. Nothing is scored or pruned any more, and requests are served "
        "as without STEP; restart the server when the cause is gone",
        reason,
    )


def confidences_of(groups: GroupRegistry, logits: torch.Tensor) -> Confidences | None:
    """Confidences at every row of [T, V] logits, as far as they are wanted of live traces."""
    wanted = {k for k in groups.watched if k}
    if groups.by_certainty:
        wanted.add(CANDIDATES)
    top_ks = tuple(sorted(wanted))
    return Confidences(top_ks, token_confidences(logits, top_ks)[:, None]) if top_ks else None


def append_output(logits_output: Any, output: StepDeviceOutput | None) -> None:
    """Let results ride on the copy of the sampled tokens, beside those of others."""
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    if output is None:
        return
    logits_output.auxiliary_device_output = append_auxiliary_output(
        logits_output.auxiliary_device_output, output
    )


def _results(
    active: _Active, batch: int, confidences: Confidences | None, lost: bool
) -> StepDeviceOutput:
    slots, prefilled = active.slots, active.prefilled
    active.prefilled = None
    if lost:
        # What the slots hold is of an earlier pass; the tokens may be wanted all the same.
        return StepDeviceOutput(
            slots.results(batch)[:, None].fill_(math.nan), confidences=confidences
        )
    return StepDeviceOutput(
        values=slots.results(batch)[:, None],
        hidden=slots.last_hidden(batch),
        kept=None if prefilled is None else slots.kept_rows(),
        owners=() if prefilled is None else tuple(prefilled.owners),
        confidences=confidences,
    )


@dataclass(frozen=True)
class Confidences:
    """Token confidences of one pass, by the number of candidates."""

    top_ks: tuple[int, ...]  # [K]
    values: torch.Tensor  # [B, S, K] fp32, of the S tokens that the pass may commit

    def on_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Confidences:
        """The same on the host."""
        return Confidences(self.top_ks, copy_tensor(self.values))

    def of_all(self, top_k: int) -> list[list[float]]:
        """[B, S] of every request, of a number of candidates that was asked for."""
        found: list[list[float]] = self.values[:, :, self.top_ks.index(top_k)].tolist()
        return found

    def of(self, row: int, token: int, top_k: int) -> float:
        """One request's committed token; NaN for a number of candidates that was not asked for."""
        if top_k not in self.top_ks:
            return math.nan
        return float(self.values[row, token, self.top_ks.index(top_k)])


@dataclass(frozen=True)
class StepDeviceOutput:
    """Results of one pass on the device; they ride on the copy of the sampled tokens."""

    # [B, S, 2] fp32 of each of the S tokens that the pass may consume of a request (1, or more
    # with accepted drafts): step score (NaN: no step, infinity: no score), sum
    values: torch.Tensor
    hidden: torch.Tensor | None = None  # [B, D] where the server captures
    kept: torch.Tensor | None = None  # [K, D] rows wanted of a prefilled trace
    owners: tuple[tuple[Capture, int], ...] = ()  # of the kept rows
    confidences: Confidences | None = None

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> StepHostOutput:
        """Enqueue the copies; SGLang waits for them with the sampled tokens."""
        hidden, kept = (None if t is None else copy_tensor(t) for t in (self.hidden, self.kept))
        confidences = None if self.confidences is None else self.confidences.on_host(copy_tensor)
        return StepHostOutput(copy_tensor(self.values), hidden, kept, self.owners, confidences)


@dataclass(frozen=True)
class StepHostOutput:
    """The same results on the host."""

    values: torch.Tensor
    hidden: torch.Tensor | None
    kept: torch.Tensor | None
    owners: tuple[tuple[Capture, int], ...]
    confidences: Confidences | None

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Record the scores of requests whose token this pass committed.

        A request without a commit was retracted, pruned or finished meanwhile, or is in the
        middle of its prompt: then the device's value is not the trace's.
        """
        with guard(protocol.IN_SCORING):
            if _active is not None and _active.groups.by_certainty:
                self._judge_by_certainty(batch, commits)
            self._record(batch, commits)
        if _active is not None and _active.groups.watched:
            self._show_tokens(_active.groups, batch, commits)

    def _record(self, batch: Any, commits: Sequence[Any]) -> None:
        scores = self.values.numpy()[:, :, 0]
        rows, tokens = (scores == scores).nonzero()  # noqa: PLR0124  # NaN is unequal to itself
        # As numbers of Python: positions travel in answers.
        steps = zip(rows.tolist(), tokens.tolist(), scores[rows, tokens].tolist(), strict=True)
        failed = True
        while failed:  # one that fails costs the others nothing: the iterator goes on after it
            with guard(protocol.IN_SCORING) as recording:
                for i, j, score in steps:
                    commit = commits[i]
                    # A request that ended within the pass did not consume what it drafted beyond.
                    if commit is not None and j < len(commit.token_ids):
                        self._record_step(i, j, score, batch.reqs[i], commit)
            failed = recording.failed
        for row, (capture, position) in enumerate(self.owners):
            assert self.kept is not None
            capture.keep_prefilled(position, self.kept[row].clone())

    def _record_step(self, row: int, token: int, score: float, req: Any, commit: Any) -> None:
        trace, active = trace_of(req), _active
        if trace is None or getattr(req, _UNSURE, False):
            return
        # The pass consumed the token before each one that it made visible.
        position = commit.output_index - 1 + token
        if active is not None and active.missed_any and _thought_before(req, trace, position):
            return
        if score in (math.inf, -math.inf):
            _step_unscored()
            return
        # Summed here: the device's sum would hold steps whose results were lost.
        trace.add_step(score, trace.score_sum + score, position)
        if trace.capture is not None and self.hidden is not None:
            trace.capture.rows.append(self.hidden[row].clone())
        if active is None:
            return
        if active.groups.watcher is not None:
            active.groups.watcher.scored(trace, position, score, req.output_ids)
        if active.metrics is not None:
            with guard(protocol.IN_METRICS):
                active.metrics.step_scored(score)
        if active.events is not None:
            active.events.scored(req, trace)

    def _judge_by_certainty(self, batch: Any, commits: Sequence[Any]) -> None:
        """Put certainties in place of the scores of a blank scorer, which only found the steps.

        Token by token: the pass consumed the token before each one that it made visible, so a step
        that ends there has all of its tokens before the visible one is added.
        """
        if self.confidences is None:  # it failed: then no step of this pass has a score
            self.values[:, :, 0].masked_fill_(~self.values[:, :, 0].isnan(), math.inf)
            return
        ended = (~self.values[:, :, 0].isnan()).tolist()
        sure = self.confidences.of_all(CANDIDATES)
        for row, (req, commit) in enumerate(zip(batch.reqs, commits, strict=True)):
            trace = trace_of(req)
            if trace is None or commit is None or trace.certainty is None:
                continue
            for place in range(len(commit.token_ids)):
                if ended[row][place]:
                    score = trace.certainty.end_step()
                    if score is None:
                        score = math.inf
                    if math.isfinite(self.values[row, place, 0]):
                        self.values[row, place, 0] = score
                trace.certainty.add(sure[row][place])

    def _show_tokens(self, groups: GroupRegistry, batch: Any, commits: Sequence[Any]) -> None:
        """Show the tokens to those who watch them, and end the traces that they name."""
        now = time.time()
        for row, (req, commit) in enumerate(zip(batch.reqs, commits, strict=True)):
            trace = trace_of(req)
            if trace is None or commit is None or not trace.watches_tokens:
                continue
            with guard(protocol.IN_SCORING):
                known = self.confidences
                for place, token in enumerate(commit.token_ids):
                    confidence = math.nan if known is None else known.of(row, place, trace.top_k)
                    ended = trace.token(token, now, confidence)
                    if ended is not None:
                        groups.end_soon(ended)


def _thought_before(req: Any, trace: Trace, position: int) -> bool:
    """Whether the think-end token came before, in a pass that was not scored.

    Each token is looked at once, however often it is asked.
    """
    assert _active is not None
    if trace.think_end is None and trace.looked < position:
        new = req.output_ids[trace.looked : position]
        end = _active.slots.think_end_id
        if end in new:
            trace.think_end = trace.looked + new.index(end)
        trace.looked = position
    return trace.think_end is not None and trace.think_end < position


def _step_unscored() -> None:
    assert _active is not None
    _active.steps_unscored += 1
    if _active.metrics is not None:
        with guard(protocol.IN_METRICS):
            _active.metrics.step_unscored()


def steps_unscored() -> int:
    """Steps of traces that ended with a score that is not finite."""
    return 0 if _active is None else _active.steps_unscored


def passes_lost() -> int:
    """Forward passes that live traces were in and nothing scored."""
    return 0 if _active is None else _active.passes_lost
