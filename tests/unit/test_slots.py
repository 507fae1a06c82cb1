"""The op's per-slot state: what a reset leaves in a slot, and in the others."""

from __future__ import annotations

import math

import torch

from step_sglang.scoring.boundary import bitmap
from step_sglang.scoring.op import HIDDEN_UNITS, NUM_STEPS, SCORE_FROM, SCORE_SUM, THINKING
from step_sglang.scoring.scorer import Scorer
from step_sglang.scoring.slots import NEVER, SlotReset, SlotState


def make_state(
    num_slots: int,
    capture: torch.dtype | None = None,
    max_rows: int | None = None,
    drafted: int = 0,
) -> SlotState:
    g = torch.Generator().manual_seed(0)
    scorer = Scorer(
        torch.randn(HIDDEN_UNITS, 16, generator=g),
        torch.zeros(HIDDEN_UNITS),
        torch.randn(HIDDEN_UNITS, generator=g) / HIDDEN_UNITS,
        torch.zeros(1),
    )
    return SlotState(
        num_slots,
        scorer,
        bitmap([5]),
        9,
        torch.device("cpu"),
        capture,
        max_rows,
        drafted,
        torch.float32 if drafted else None,
    )


def contents(state: SlotState, slot: int) -> tuple[int, int, float, int]:
    sums = state.table[SCORE_SUM].view(torch.float32)
    rows = (state.table[SCORE_FROM], state.table[THINKING], sums, state.table[NUM_STEPS])
    first, thinking, score_sum, num_steps = (row[slot].item() for row in rows)
    return int(first), int(thinking), float(score_sum), int(num_steps)


FRESH = (NEVER, 1, 0.0, 0)


def test_a_reset_sets_its_slots_and_no_other() -> None:
    state = make_state(5)
    state.reset([SlotReset(3, 7, 1.7, 3, thinking=False), SlotReset(1, score_from=2)])
    assert contents(state, 3) == (7, 0, torch.tensor(1.7).item(), 3)
    assert contents(state, 1) == (2, 1, 0.0, 0)
    assert [contents(state, slot) for slot in (0, 2, 4)] == [FRESH] * 3
    state.reset([SlotReset(3)])
    assert contents(state, 3) == FRESH
    state.reset([])


def test_it_does_not_depend_on_the_default_dtype() -> None:
    """SGLang changes it while it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = make_state(2)
        state.reset([SlotReset(1, 4, 1.7, 2)])
    finally:
        torch.set_default_dtype(before)
    assert contents(state, 1) == (4, 1, torch.tensor(1.7).item(), 2)


def test_scores_go_on_from_a_reset() -> None:
    state = make_state(3)
    state.reset([SlotReset(2, 4, 1.5, 3)])
    hidden = torch.randn(2, 16)
    args = (torch.tensor([0, 2]), torch.tensor([5, 5]), torch.tensor([6, 6]))
    state.score(hidden, None, *args)
    (unscored, nothing), (score, total) = state.results(2).tolist()
    assert math.isnan(unscored) and nothing == 0.0  # slot 0 is nobody's
    assert 0 < score < 1 and abs(total - 1.5 - score) < 1e-6
    assert contents(state, 2)[3] == 4


def test_hidden_states_are_kept_of_each_requests_last_token() -> None:
    state = make_state(4, capture=torch.float32)
    hidden = torch.randn(5, 16)
    ids = torch.tensor([1] * 5)
    state.score(hidden, torch.tensor([4, 1]), torch.tensor([1, 2]), ids, ids)
    kept = state.last_hidden(2)
    assert kept is not None and torch.equal(kept, hidden[[4, 1]])
    state.score(hidden[:3], None, torch.tensor([1, 2, 3]), ids[:3], ids[:3])
    kept = state.last_hidden(3)
    assert kept is not None and torch.equal(kept, hidden[:3])


def test_a_batch_may_have_more_rows_than_there_are_slots() -> None:
    """Engines pad: 3 requests on 8 ranks become 8 rows, and row 0 of the pool pads."""
    state = make_state(4, capture=torch.float32, max_rows=8)
    hidden = torch.randn(8, 16)
    slot_ids = torch.tensor([1, 2, 3, 0, 0, 0, 0, 0])
    ids = torch.full((8,), 5)
    state.reset([SlotReset(slot, 4) for slot in (1, 2, 3)])
    state.score(hidden, None, slot_ids, ids, torch.tensor([6, 6, 6, 0, 0, 0, 0, 0]))
    scores = state.results(8)[:, 0]
    assert scores.isnan().tolist() == [False] * 3 + [True] * 5
    kept = state.last_hidden(8)
    assert kept is not None and torch.equal(kept, hidden)


def test_hidden_states_that_a_model_widened_are_kept_in_its_own_dtype() -> None:
    state = make_state(4, capture=torch.bfloat16)
    hidden = torch.randn(5, 16)
    ids = torch.tensor([1] * 5)
    state.score(hidden, torch.tensor([4, 1]), torch.tensor([1, 2]), ids, ids)
    kept = state.last_hidden(2)
    assert kept is not None and torch.equal(kept, hidden[[4, 1]].bfloat16())
    state.keep_rows(hidden, [3])
    kept = state.kept_rows()
    assert kept is not None and torch.equal(kept, hidden[[3]].bfloat16())


def test_a_reset_cleans_the_workspace() -> None:
    """The op leaves its count of blocks at zero, unless an error cut a launch short."""
    state = make_state(3)
    state.workspace[0] = 5
    state.reset([SlotReset(1, 4)])
    assert state.workspace[0] == 0


def test_of_drafts_the_accepted_are_scored_as_one_by_one() -> None:
    """Every node is a boundary: those that are not accepted score nothing, and count nothing."""
    drafted, depth = 4, 3
    state, alone = make_state(4, drafted=drafted), make_state(4)
    for each in (state, alone):
        each.reset([SlotReset(slot, 4) for slot in (1, 2, 3)])
    hidden = torch.randn(3 * drafted, 16)
    ids, slot_ids = torch.full((3 * drafted,), 5), torch.tensor([3, 1, 2])
    positions = torch.tensor([6, 7, 7, 8] * 3)
    accepted = torch.tensor([[0, 2, 3], [4, -1, -1], [8, 9, -1]], dtype=torch.int32)
    state.keep_drafts(hidden)
    values = state.score_drafts(accepted, slot_ids, ids, positions)
    assert values.shape == (3, depth, 2)
    assert values[:, :, 0].isnan().tolist() == (accepted < 0).tolist()
    for request, slot in enumerate(slot_ids.tolist()):
        for place, row in enumerate(accepted[request].tolist()):
            if row >= 0:
                one = slice(row, row + 1)
                alone.score(hidden[one], None, slot_ids[[request]], ids[one], positions[one])
                assert torch.equal(alone.results(1)[0], values[request, place])
        assert contents(state, slot) == contents(alone, slot)
        assert contents(state, slot)[3] == int((accepted[request] >= 0).sum())


def test_a_think_end_among_drafts_ends_scoring_behind_it() -> None:
    state = make_state(3, drafted=3)
    state.reset([SlotReset(1, 4), SlotReset(2, 4)])
    state.keep_drafts(torch.randn(6, 16))
    ids = torch.tensor([5, 9, 5] * 2)
    positions = torch.tensor([6, 7, 8] * 2)
    # The second request's think-end token is not accepted, so it thinks on.
    accepted = torch.tensor([[0, 1, 2], [3, 5, -1]])
    values = state.score_drafts(accepted, torch.tensor([1, 2]), ids, positions)
    scored = ~values[:, :, 0].isnan()
    assert scored.tolist() == [[True, False, False], [True, True, False]]
    assert [contents(state, slot)[1] for slot in (1, 2)] == [0, 1]
