"""The op in plain torch, written to be read: the oracle that the native code is tested against.

Uses data-dependent shapes, so it belongs in tests and benches, not in a captured graph.
"""

import torch
from torch import Tensor

from step_sglang.scoring.op import NUM_STEPS, SCORE_FROM, SCORE_SUM, THINKING


def is_boundary(ids: Tensor, boundary: Tensor) -> Tensor:
    """[N] bool: bit (id & 31) of word id >> 5; ids outside the bitmap are never boundaries."""
    inside = (ids >= 0) & (ids < 32 * boundary.numel())
    safe = torch.where(inside, ids, 0)
    if boundary.numel() == 0:
        return inside
    return inside & ((boundary[safe >> 5].long() >> (safe & 31)) & 1).bool()


def step_logits(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """[N] logits of the scorer for hidden states [N, D], all in the dtype of `h`."""
    a = torch.relu(h @ w1.to(h.dtype).T + b1.to(h.dtype))
    return a @ w2.to(h.dtype).reshape(-1) + b2.to(h.dtype)


def step_score_(
    hidden: Tensor,
    row_index: Tensor | None,
    slot_ids: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    boundary: Tensor,
    think_end_id: int,
    slots: Tensor,
    out: Tensor,
    workspace: Tensor,
    w1: Tensor,
    head: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """As `step_sglang.scoring.op.step_score_`; `dtype` is the arithmetic (float64 as an oracle).

    With `dtype=torch.float64`, `out` may be float64 too, to keep its precision.
    """
    score_from, thinking, num_steps = slots[SCORE_FROM], slots[THINKING], slots[NUM_STEPS]
    score_sum = slots[SCORE_SUM].view(torch.float32)
    units = w1.shape[0]
    b1, w2, b2 = head[:units], head[units:-1], head[-1:]
    if row_index is None:
        row_index = torch.arange(slot_ids.numel(), device=slot_ids.device)
    out[: slot_ids.numel(), 0] = float("nan")
    out[: slot_ids.numel(), 1] = 0.0

    in_range = (slot_ids >= 0) & (slot_ids < slots.shape[1])
    in_range &= (row_index >= 0) & (row_index < hidden.shape[0])
    rows = in_range.nonzero().flatten()  # rows of the batch that are not padding
    owners, tokens = slot_ids[rows], row_index[rows]
    ids = input_ids[tokens]

    generated = positions[tokens] >= score_from[owners]
    ends_thinking = (
        generated & (ids == think_end_id) if think_end_id >= 0 else torch.zeros_like(generated)
    )
    is_step = generated & ~ends_thinking & is_boundary(ids, boundary)
    if think_end_id >= 0:
        is_step &= thinking[owners] != 0
    thinking[owners[ends_thinking]] = 0

    h = hidden[tokens[is_step]].to(dtype)
    logits = step_logits(h, w1, b1, w2, b2)
    finite = torch.isfinite(logits)
    scores = torch.sigmoid(logits[finite])
    scored_slots = owners[is_step][finite]
    score_sum.index_add_(0, scored_slots, scores.to(score_sum.dtype))
    num_steps.index_add_(0, scored_slots, torch.ones_like(scored_slots, dtype=num_steps.dtype))

    out[rows[is_step], 0] = float("inf")
    out[rows[is_step][finite], 0] = scores.to(out.dtype)
    out[rows, 1] = score_sum[owners].to(out.dtype)
