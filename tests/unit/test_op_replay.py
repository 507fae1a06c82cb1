"""The op recorded once and replayed on the recorded tensors, as a graph does, without a server."""

from __future__ import annotations

import pytest
import torch

from step_sglang.scoring import op
from step_sglang.scoring.boundary import bitmap
from step_sglang.scoring.scorer import Scorer
from step_sglang.scoring.slots import SlotReset, SlotState
from tests.server.recorded_graphs import Tape

BOUNDARY, OTHER = 5, 6


def make_slots() -> SlotState:
    g = torch.Generator().manual_seed(0)
    scorer = Scorer(
        torch.randn(op.HIDDEN_UNITS, 16, generator=g),
        torch.zeros(op.HIDDEN_UNITS),
        torch.randn(op.HIDDEN_UNITS, generator=g) / op.HIDDEN_UNITS,
        torch.zeros(1),
    )
    return SlotState(9, scorer, bitmap([BOUNDARY]), None, torch.device("cpu"))


def test_a_replay_scores_what_is_in_the_buffers_then() -> None:
    slots, eager = make_slots(), make_slots()
    embedding = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    ids, slot_ids, positions = (torch.zeros(4, dtype=torch.int64) for _ in range(3))

    def forward() -> torch.Tensor:
        hidden = torch.nn.functional.silu(embedding[ids]) * 2
        slots.score(hidden, None, slot_ids, ids, positions)
        return hidden

    with Tape() as tape:
        hidden = forward()
    # Traces that begin after the recording; the last row pads, and its id is stale.
    for batch in ((1, 2, 3), (4, 2, 1)):
        for state in (slots, eager):
            state.reset([SlotReset(slot, score_from=3) for slot in batch])
        for step in range(3, 8):
            ids.copy_(torch.tensor([BOUNDARY, OTHER, BOUNDARY, BOUNDARY]).roll(step))
            slot_ids.copy_(torch.tensor([*batch, 0]))
            positions.copy_(torch.tensor([step, step, step, 0]))
            tape.replay()
            expected = torch.nn.functional.silu(embedding[ids]) * 2
            assert torch.equal(hidden, expected)
            eager.score(expected, None, slot_ids, ids, positions)
            assert torch.equal(slots.table, eager.table)
            torch.testing.assert_close(slots.results(4), eager.results(4), equal_nan=True)
            assert slots.results(4)[3, 0].isnan()


def test_what_reads_the_device_cannot_be_recorded() -> None:
    with pytest.raises(RuntimeError, match="reads the device"), Tape():
        torch.arange(3).sum().item()
    with pytest.raises(RuntimeError, match="reads the device"), Tape():
        torch.arange(3).nonzero()
