"""Scoring under speculative decoding: the tokens that a verify pass consumed.

A verify pass runs a request's last committed token and a tree of drafts below it. Which drafts are
accepted, and so belong to the text, is known when the tokens are sampled; that pass consumes each
of them, and the last committed token, exactly once. ``forward`` keeps the pass's hidden states,
here the accepted ones are scored. Rejected drafts are never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from step_sglang import protocol
from step_sglang.patches import forward
from step_sglang.patches.forward import Confidences, StepDeviceOutput
from step_sglang.patches.guard import guard


def eagle_sample(
    original: Callable[..., Any],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND ``eagle_sample``, which NGRAM, standalone drafts and the EAGLE family share.

    Returns what it does: ``predict`` [B * n], ``accept_lens`` [B], ``accept_index`` [B, depth].
    """
    active = forward.active()
    if (
        active is None
        or not active.groups.num_live
        or active.groups.stopped
        or batch.forward_mode.is_idle()
    ):
        return original(verify_input, batch, logits_output, *args, **kwargs)
    lost = not (active.scored or active.replayed)
    if lost or active.lost_in_a_row:
        forward.count_lost(active, lost)
    confidences = None
    with guard(protocol.IN_SCORING):  # before the logits change in place
        confidences = forward.confidences_of(active.groups, logits_output.next_token_logits)
    sampled = original(verify_input, batch, logits_output, *args, **kwargs)
    output = None
    with guard(protocol.IN_SCORING):
        output = _results(active, verify_input, batch, sampled[2], confidences, lost)
    forward.append_output(logits_output, output)
    return sampled


def _results(
    active: Any,
    verify_input: Any,
    batch: Any,
    accepted: torch.Tensor,
    confidences: Confidences | None,
    lost: bool,
) -> StepDeviceOutput:
    if confidences is not None:
        rows = accepted.long().clamp(min=0)  # what stands for none is never committed
        confidences = Confidences(confidences.top_ks, confidences.values[:, 0][rows])
    if lost:
        unknown = torch.full((*accepted.shape, 2), math.nan, device=accepted.device)
        return StepDeviceOutput(unknown, confidences=confidences)
    values = active.slots.score_drafts(
        accepted, batch.req_pool_indices, verify_input.draft_token, verify_input.positions
    )
    return StepDeviceOutput(values, confidences=confidences)
