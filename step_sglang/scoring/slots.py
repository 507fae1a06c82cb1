"""Owns the op's per-slot device state: one slot per running request, indexed by its KV row.

All methods enqueue on the current stream and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from step_sglang.scoring.op import pack_head, step_score_, workspace_size
from step_sglang.scoring.scorer import Scorer

NEVER = torch.iinfo(torch.int32).max  # `score_from` of a slot whose request is not scored


@dataclass(frozen=True, slots=True)
class SlotReset:
    """What a slot must hold when a request starts, or resumes, in it."""

    slot: int
    score_from: int = NEVER  # first position that may be scored
    score_sum: float = 0.0
    num_steps: int = 0
    thinking: bool = True


class SlotState:
    """Tensors of the op that live as long as the engine.

    Args:
        num_slots: S, rows of the engine's request pool (row 0 is its padding row).
        max_rows: rows of the largest batch. Engines pad batches, so it can be more than there are
            slots; None: as many as there are slots.
        drafted: n, tokens of each request that a pass of speculative decoding verifies; 0 without.
        hidden_dtype: of the model's hidden states; needed with ``drafted``.
        scorer: the MLP, moved to ``device`` here.
        boundary: [ceil(V / 32)] int32 bitmap of the boundary tokens.
        think_end_id: token after which a trace is scored no more, or None.
        device: where the model runs.
        capture_dtype: dtype of the model's hidden states, to keep them for the host; None to score
            only.
    """

    def __init__(
        self,
        num_slots: int,
        scorer: Scorer,
        boundary: torch.Tensor,
        think_end_id: int | None,
        device: torch.device,
        capture_dtype: torch.dtype | None = None,
        max_rows: int | None = None,
        drafted: int = 0,
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        rows = max(num_slots, max_rows or 0)
        self.table = (
            packed_resets([SlotReset(0)])[1:].repeat(1, num_slots).to(device)
        )  # [4, S] int32
        self.boundary = boundary.to(device)
        self.think_end_id = -1 if think_end_id is None else think_end_id
        self.w1 = scorer.w1.to(device)
        self.head = pack_head(scorer.b1, scorer.w2, scorer.b2).to(device)
        # Fixed addresses, because a captured graph writes them at every replay.
        self._hidden = (
            torch.zeros((rows, scorer.hidden_size), dtype=capture_dtype, device=device)
            if capture_dtype is not None
            else None
        )
        self._drafted = drafted
        self._drafts = (
            torch.zeros((rows * drafted, scorer.hidden_size), dtype=hidden_dtype, device=device)
            if drafted
            else None
        )
        self._kept: torch.Tensor | None = None
        self.out = torch.full((rows, 2), torch.nan, dtype=torch.float32, device=device)
        self.workspace = torch.zeros(workspace_size(rows), dtype=torch.int32, device=device)

    @property
    def captures(self) -> bool:
        """Whether hidden states are kept for the host."""
        return self._hidden is not None

    def reset(self, resets: Sequence[SlotReset]) -> None:
        """Prepare slots for new or resumed requests, ordinary ones included.

        Slots are reused, so this must run on the forward stream, after the last forward that
        used the slot and before the first that uses it again.
        """
        if not resets:
            return
        # A launch that an error cut short would leave its count of blocks behind.
        self.workspace[:1].zero_()
        packed = self._upload(packed_resets(resets))
        self.table.index_copy_(1, packed[0].long(), packed[1:])

    def score(
        self,
        hidden: torch.Tensor,
        row_index: torch.Tensor | None,
        slot_ids: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Score the step boundaries of one forward pass; safe inside a CUDA graph.

        Args:
            hidden: [T, D] final-norm hidden states.
            row_index: [B] int64, row of each request's last token; None when row i is request i.
            slot_ids: [B] int64.
            input_ids: [T] int64, the tokens this pass consumed.
            positions: [T] int64, their positions in their sequences.
        """
        batch = slot_ids.shape[0]
        if self._hidden is not None:
            # Some models widen what they give the head; what is kept has the model's own dtype.
            last = hidden[:batch] if row_index is None else hidden.index_select(0, row_index)
            self._hidden[:batch].copy_(last)
        step_score_(
            hidden,
            row_index,
            slot_ids,
            input_ids,
            positions,
            self.boundary,
            self.think_end_id,
            self.table,
            self.out,
            self.workspace,
            self.w1,
            self.head,
        )

    def keep_drafts(self, hidden: torch.Tensor) -> None:
        """Keep a verify pass's [B * n, D] hidden states for :meth:`score_drafts`.

        Safe inside a CUDA graph. SGLang's own copy may be of another layer, or before the norm.
        """
        assert self._drafts is not None
        self._drafts[: hidden.shape[0]].copy_(hidden)

    def kept_drafts(self, batch: int) -> torch.Tensor | None:
        """What :meth:`keep_drafts` writes for that many requests; None without drafts."""
        return None if self._drafts is None else self._drafts[: batch * self._drafted]

    def score_drafts(
        self,
        accepted: torch.Tensor,
        slot_ids: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Score the step boundaries among the tokens that a verify pass consumed.

        One launch for every depth of the drafts: a request has one row in each, as in a decode
        pass, and its steps are taken in the order of the text.

        Args:
            accepted: [B, depth] int, rows of the accepted drafts, the last committed token first;
                -1 = none.
            slot_ids: [B] int64.
            input_ids: [B * n] int64, the drafted tokens.
            positions: [B * n] int64, their positions in their sequences.

        Returns:
            [B, depth, 2] fp32, as :meth:`results` has it of a pass.
        """
        assert self._drafts is not None
        batch, hidden = slot_ids.shape[0], self._drafts[: input_ids.shape[0]]
        results = []
        for rows in accepted.to(torch.int64).unbind(1):
            consumed = rows >= 0
            # Slot 0 pads: nothing is scored in it.
            slots = torch.where(consumed, slot_ids, 0)
            self.score(hidden, rows.clamp(min=0), slots, input_ids, positions)
            results.append(self.results(batch))
        return torch.stack(results, 1)

    def results(self, batch: int) -> torch.Tensor:
        """Copy of the last pass's [B, 2] (step score, score sum), free of graph buffers."""
        return self.out[:batch].clone()

    def last_hidden(self, batch: int) -> torch.Tensor | None:
        """Copy of the last pass's [B, D] hidden states of each request's last token."""
        return None if self._hidden is None else self._hidden[:batch].clone()

    def keep_rows(self, hidden: torch.Tensor, rows: Sequence[int]) -> None:
        """Keep rows of a prefill pass's [T, D] hidden states until :meth:`kept_rows`."""
        kept = hidden.index_select(0, self._upload(torch.tensor(rows, dtype=torch.int64)))
        self._kept = kept if self._hidden is None else kept.to(self._hidden.dtype)

    def kept_rows(self) -> torch.Tensor | None:
        """The [K, D] rows kept last, once."""
        kept, self._kept = self._kept, None
        return kept

    def _upload(self, host: torch.Tensor) -> torch.Tensor:
        device = self.out.device
        if device.type == "cuda":
            host = host.pin_memory()
        return host.to(device, non_blocking=True)


def packed_resets(resets: Sequence[SlotReset]) -> torch.Tensor:
    """[5, N] int32: the numbers of these slots, then what the op keeps of each."""
    sums = torch.tensor([r.score_sum for r in resets], dtype=torch.float32).view(torch.int32)
    fields = [
        (r.slot, r.score_from, r.thinking, bits, r.num_steps)
        for r, bits in zip(resets, sums.tolist(), strict=True)
    ]
    return torch.tensor(fields, dtype=torch.int32).T.contiguous()
