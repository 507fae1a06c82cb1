"""The check at every start: it passes on a right op, and finds each way to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from step_sglang.errors import StepError
from step_sglang.scoring import op, self_check
from step_sglang.scoring.boundary import bitmap
from step_sglang.scoring.op import HIDDEN_UNITS, NUM_STEPS, THINKING
from step_sglang.scoring.scorer import Scorer
from step_sglang.scoring.slots import SlotState


def make_slots(
    think_end: int | None = 9, w1_dtype: torch.dtype = torch.float32, dim: int = 64, rows: int = 20
) -> SlotState:
    g = torch.Generator().manual_seed(0)
    scorer = Scorer(
        (torch.randn(HIDDEN_UNITS, dim, generator=g) / dim**0.5).to(w1_dtype),
        torch.randn(HIDDEN_UNITS, generator=g),
        torch.randn(HIDDEN_UNITS, generator=g) / HIDDEN_UNITS**0.5,
        torch.zeros(1),
    )
    return SlotState(rows, scorer, bitmap([31, 77]), think_end, torch.device("cpu"))


@pytest.mark.parametrize("think_end", [9, None])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w1", [torch.float32, torch.bfloat16])
def test_a_right_op_passes_and_leaves_nothing_behind(
    think_end: int | None, hidden: torch.dtype, w1: torch.dtype
) -> None:
    slots = make_slots(think_end, w1)
    table, out = slots.table.clone(), slots.out.clone()
    self_check.check_op(slots, hidden)
    assert torch.equal(slots.table, table)
    torch.testing.assert_close(slots.out, out, equal_nan=True)
    assert "library" in self_check.describe_op(slots)


def _half_of_w1(args: list[Any]) -> None:
    args[10] = args[10].clone()
    args[10][:, ::2] = 0


def _ignores_thinking(args: list[Any]) -> None:
    args[7][THINKING] = 1


WRONG: dict[str, Callable[[list[Any]], None]] = {
    "half of a row of W1 is not read": _half_of_w1,
    "think-end is ignored": _ignores_thinking,
    "another bitmap": lambda args: args.__setitem__(5, torch.zeros_like(args[5])),
    "every row is a step": lambda args: args[3].fill_(31),
    "padding is scored": lambda args: args[2].copy_(torch.arange(len(args[2]))),
    "prompts are scored": lambda args: args[4].fill_(8),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_op_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        changed = list(args)
        for at in (2, 3, 4):
            changed[at] = changed[at].clone()
        WRONG[fault](changed)
        op.step_score_(*changed)

    monkeypatch.setattr(self_check, "step_score_", wrong)
    with pytest.raises(StepError, match=r"wrong scores on this machine .*largest difference"):
        self_check.check_op(make_slots(), torch.float32)


def test_an_op_that_writes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "step_score_", lambda *args: None)
    with pytest.raises(StepError, match="wrong scores"):
        self_check.check_op(make_slots(), torch.float32)


def test_a_step_that_is_not_counted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncounted(*args: Any) -> None:
        op.step_score_(*args)
        args[7][NUM_STEPS] = 0

    monkeypatch.setattr(self_check, "step_score_", uncounted)
    with pytest.raises(StepError, match="wrong scores"):
        self_check.check_op(make_slots(), torch.float32)


def test_a_dirty_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def dirty(*args: Any) -> None:
        op.step_score_(*args)
        args[9][0] = 1

    monkeypatch.setattr(self_check, "step_score_", dirty)
    with pytest.raises(StepError, match="workspace dirty"):
        self_check.check_op(make_slots(), torch.float32)


def test_a_server_with_fewer_rows_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU op has no use for a workspace, so its size is looked at where it is passed."""
    sizes: list[tuple[int, int]] = []

    def measured(*args: Any) -> None:
        sizes.append((args[9].numel(), op.workspace_size(len(args[2]))))
        op.step_score_(*args)

    monkeypatch.setattr(self_check, "step_score_", measured)
    self_check.check_op(make_slots(rows=2), torch.float32)
    assert all(found >= needed for found, needed in sizes) and len(sizes) == 1
