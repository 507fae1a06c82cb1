"""What data-parallel attention does to a batch, on SGLang's own functions: relabels and padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from step_sglang.patches import forward, pruning
from step_sglang.pruning.groups import GroupRegistry
from step_sglang.scoring.slots import SlotReset
from tests.unit.test_slots import contents, make_state


def test_nobody_starts_in_a_decode_batch_that_became_an_extend() -> None:
    """So that no slot is set anew: the device is ahead of what the host knows of it."""
    reqs = [Req.__new__(Req) for _ in range(3)]
    for req in reqs:
        req.refresh_fill_ids = lambda: None
    batch: Any = SimpleNamespace(
        reqs=reqs,
        batch_size=lambda: len(reqs),
        seq_lens_cpu=torch.tensor([4, 5, 6]),
        encoder_swa_reset=None,
        forward_mode=ForwardMode.DECODE,
        decoding_reqs=None,
    )
    ScheduleBatch.convert_decode_to_extend(batch)
    assert forward.is_prefill(batch.forward_mode)
    assert forward._starting(batch) == []


def padded(mode: ForwardMode, slots: list[int], tokens: int) -> Any:
    """A pass of two requests of slots that is padded to so many tokens, as SGLang pads it."""
    batch = ForwardBatch.__new__(ForwardBatch)
    fields: dict[str, Any] = {
        "forward_mode": mode,
        "req_pool_indices": torch.tensor(slots),
        "input_ids": torch.tensor([5, 5]),
        "positions": torch.tensor([6, 7]),
        "extend_seq_lens": torch.ones(len(slots), dtype=torch.int32),
    }
    rows = tokens if mode.is_decode() else len(slots)
    for name, size in (("req_pool_indices", rows), ("input_ids", tokens), ("positions", tokens)):
        fields[name] = batch._pad_tensor_to_size(fields[name], size)
    for name, value in fields.items():
        object.__setattr__(batch, name, value)
    return batch


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.EXTEND])
def test_padded_rows_score_nothing(mode: ForwardMode) -> None:
    state = make_state(4, max_rows=8)
    state.reset([SlotReset(3, 4), SlotReset(1, 4)])
    groups = GroupRegistry()
    groups.join("g")
    active = forward._Active(state, groups)
    forward._score(active, torch.randn(6, 16), padded(mode, [3, 1], 6))
    assert [contents(state, slot)[3] for slot in range(4)] == [0, 1, 0, 1]
    scores = state.results(6 if mode.is_decode() else 2)[:, 0]
    assert scores.isnan().tolist() == [False, False, True, True, True, True][: len(scores)]


def test_an_idle_rank_scores_nothing() -> None:
    state = make_state(4, max_rows=8)
    groups = GroupRegistry()
    groups.join("waits")
    active = forward._Active(state, groups)
    batch = padded(ForwardMode.DECODE, [], 2)
    object.__setattr__(batch, "forward_mode", ForwardMode.IDLE)
    forward._score(active, torch.randn(2, 16), batch)
    assert [contents(state, slot)[3] for slot in range(4)] == [0] * 4


def test_ranks_with_other_batches_are_not_asked() -> None:
    """Alone with its attention, a rank would wait for ever for those that prune nothing."""
    scheduler = SimpleNamespace(
        attn_tp_group=SimpleNamespace(world_size=1, rank=1, ranks=[1]),
        tp_group=SimpleNamespace(world_size=2, rank=1, ranks=[0, 1]),
    )
    assert pruning.agree(scheduler, [3, 1]) == [3, 1]
