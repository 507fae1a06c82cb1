"""Hooks around the forward pass: reset slots, score inside it, carry the results to the host."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from step_sglang.capture import Capture
from step_sglang.confidence import token_confidences
from step_sglang.groups import GroupRegistry
from step_sglang.metrics import StepMetrics
from step_sglang.slots import SlotReset, SlotState


@dataclass
class _Active:
    """What scores the passes of this process."""

    slots: SlotState
    groups: GroupRegistry
    metrics: StepMetrics | None = None
    prefilled: _PrefilledRows | None = None  # of the pass that is being enqueued


@dataclass(frozen=True)
class _PrefilledRows:
    """Rows of one prefill pass that requests want captured."""

    rows: list[int]  # of the pass's hidden states
    owners: list[tuple[Capture, int]]  # for each row who wants it, and its position in the input


# One model per scheduler process; LogitsProcessor and ModelRunner know no scheduler.
_active: _Active | None = None


def activate(slots: SlotState, groups: GroupRegistry, metrics: StepMetrics | None) -> None:
    """Score every forward pass of this process from now on."""
    global _active  # noqa: PLW0603
    _active = _Active(slots, groups, metrics)


def forward_batch_generation(worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``TpModelWorker.forward_batch_generation``: on the forward stream, before the pass.

    Requests that start or resume in this pass get their slot set; those that decode in a mixed
    pass keep it, because the device is ahead of the host's copy.
    """
    if _active is None or batch is None or not batch.forward_mode.is_extend():
        return
    decoding = set(batch.decoding_reqs or ())
    slots = _active.slots
    slots.reset([_slot_reset(req, slots) for req in batch.reqs if req not in decoding])
    _active.prefilled = _prefilled_rows(batch, slots) if slots.captures else None


def _slot_reset(req: Any, slots: SlotState) -> SlotReset:
    from step_sglang.patches.scheduler import trace_of

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
    from step_sglang.patches.scheduler import trace_of

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

    if _active is None or not isinstance(logits_metadata, ForwardBatch):
        return
    forward = logits_metadata
    if forward.forward_mode.is_decode():
        rows = None
    elif forward.forward_mode.is_extend():
        rows = torch.cumsum(forward.extend_seq_lens, dim=0, dtype=torch.int64) - 1
    else:
        return
    slots = _active.slots
    slots.score(hidden_states, rows, forward.req_pool_indices, forward.input_ids, forward.positions)
    if _active.prefilled is not None:
        slots.keep_rows(hidden_states, _active.prefilled.rows)


def sample(
    original: Callable[..., torch.Tensor], runner: Any, logits_output: Any, forward_batch: Any
) -> torch.Tensor:
    """AROUND ``ModelRunner.sample``, which changes the logits in place and clears the field that
    carries values to the host.
    """
    mode = forward_batch.forward_mode
    if _active is None or not _active.groups.num_live or not (mode.is_decode() or mode.is_extend()):
        return original(runner, logits_output, forward_batch)
    top_ks = tuple(sorted(k for k in _active.groups.watched if k))
    confidences = token_confidences(logits_output.next_token_logits, top_ks) if top_ks else None
    tokens = original(runner, logits_output, forward_batch)
    _append_output(logits_output, forward_batch.batch_size, confidences, top_ks)
    return tokens


def _append_output(
    logits_output: Any, batch: int, confidences: torch.Tensor | None, top_ks: tuple[int, ...]
) -> None:
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    assert _active is not None
    slots, prefilled = _active.slots, _active.prefilled
    _active.prefilled = None
    output = StepDeviceOutput(
        values=slots.results(batch),
        hidden=slots.last_hidden(batch),
        kept=None if prefilled is None else slots.kept_rows(),
        owners=() if prefilled is None else tuple(prefilled.owners),
        confidences=confidences,
        top_ks=top_ks,
    )
    logits_output.auxiliary_device_output = append_auxiliary_output(
        logits_output.auxiliary_device_output, output
    )


@dataclass(frozen=True)
class StepDeviceOutput:
    """Results of one pass on the device; they ride on the copy of the sampled tokens."""

    values: torch.Tensor  # [B, 2] fp32: step score (NaN: none), score sum
    hidden: torch.Tensor | None = None  # [B, D] where the server captures
    kept: torch.Tensor | None = None  # [K, D] rows wanted of a prefilled trace
    owners: tuple[tuple[Capture, int], ...] = ()  # of the kept rows
    confidences: torch.Tensor | None = None  # [B, K] fp32: of the sampled tokens, one column per k
    top_ks: tuple[int, ...] = ()  # [K] candidates

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> StepHostOutput:
        """Enqueue the copies; SGLang waits for them with the sampled tokens."""
        hidden, kept, confidences = (
            None if t is None else copy_tensor(t)
            for t in (self.hidden, self.kept, self.confidences)
        )
        values = copy_tensor(self.values)
        return StepHostOutput(values, hidden, kept, self.owners, confidences, self.top_ks)


@dataclass(frozen=True)
class StepHostOutput:
    """The same results on the host."""

    values: torch.Tensor
    hidden: torch.Tensor | None
    kept: torch.Tensor | None
    owners: tuple[tuple[Capture, int], ...]
    confidences: torch.Tensor | None
    top_ks: tuple[int, ...]

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Record the scores of requests whose token this pass committed.

        A request without a commit was retracted, pruned or finished meanwhile, or is in the
        middle of its prompt: then the device's value is not the trace's.
        """
        from step_sglang.patches.scheduler import trace_of

        values = self.values.numpy()
        ended = (values[:, 0] == values[:, 0]).nonzero()[0]  # NaN is unequal to itself
        for i in ended.tolist():
            trace, commit = trace_of(batch.reqs[i]), commits[i]
            if trace is None or commit is None:
                continue
            # The pass consumed the token before the one it made visible.
            position = commit.output_index - 1
            score = float(values[i, 0])
            trace.record(score, float(values[i, 1]), position)
            if _active is not None and _active.metrics is not None:
                _active.metrics.step_scored(score)
            if trace.capture is not None and self.hidden is not None:
                trace.capture.rows.append(self.hidden[i].clone())
        for row, (capture, position) in enumerate(self.owners):
            assert self.kept is not None
            capture.keep_prefilled(position, self.kept[row].clone())
        if _active is not None and _active.groups.watched.total():
            self._show_tokens(_active.groups, batch, commits)

    def _show_tokens(self, groups: GroupRegistry, batch: Any, commits: Sequence[Any]) -> None:
        """Show the tokens to those who watch them, and end the traces that they name."""
        from step_sglang.patches.scheduler import trace_of

        now = time.time()
        confidences = None if self.confidences is None else self.confidences.numpy()
        columns = {k: column for column, k in enumerate(self.top_ks)}
        for row, (req, commit) in enumerate(zip(batch.reqs, commits, strict=True)):
            trace = trace_of(req)
            if trace is None or commit is None or not trace.watches_tokens:
                continue
            confidence = math.nan
            if trace.top_k:
                assert confidences is not None
                confidence = float(confidences[row, columns[trace.top_k]])
            for token in commit.token_ids:
                ended = trace.token(token, now, confidence)
                if ended is not None:
                    groups.end_soon(ended)
