"""The tree kernels of the plain-CPU platform against their definitions."""

from __future__ import annotations

import pytest
import torch

from step_sglang.patches.cpu_speculation import (
    build_tree_kernel_efficient_func,
    fill_accept_out_cache_loc_func,
    fill_front_out_cache_loc_func,
    reconstruct_indices_from_tree_mask_func,
    top_k_renorm_prob,
    top_p_renorm_prob,
    tree_speculative_sampling_target_only,
    verify_tree_greedy_func,
)

# Node 1 and 2 hang below the root, 3 below 1, 4 below 3.
PARENTS = [-1, 0, 0, 1, 3]
N = len(PARENTS)
FIRST_CHILD, NEXT_SIBLING = [1, 3, -1, 4, -1], [-1, 2, -1, -1, -1]


def ancestors() -> torch.Tensor:
    """[N, N] bool: node j is node i or above it."""
    mask = torch.eye(N, dtype=torch.bool)
    for node in range(N):
        above = PARENTS[node]
        while above >= 0:
            mask[node, above] = True
            above = PARENTS[above]
    return mask


def links(batch: int = 1) -> dict[str, torch.Tensor]:
    return {
        "index": torch.arange(batch * N).view(batch, N),
        "next_token": torch.tensor([FIRST_CHILD] * batch),
        "next_sibling": torch.tensor([NEXT_SIBLING] * batch),
    }


def test_a_mask_is_read_as_the_tree_that_it_describes() -> None:
    positions, index = torch.zeros(2 * N, dtype=torch.int64), torch.zeros(2, N, dtype=torch.int64)
    first, sibling = torch.zeros_like(index), torch.zeros_like(index)
    mask = ancestors().flatten().repeat(2)
    reconstruct_indices_from_tree_mask_func(
        mask, torch.tensor([7, 30]), positions, index, first, sibling, 2, N
    )
    depth = [0, 1, 1, 2, 3]
    assert positions.tolist() == [7 + d for d in depth] + [30 + d for d in depth]
    assert index.flatten().tolist() == list(range(2 * N))
    assert first.tolist() == [FIRST_CHILD] * 2
    assert sibling.tolist() == [NEXT_SIBLING] * 2


@pytest.mark.parametrize("mode", [0, 1])
def test_a_chain_of_drafts_sees_what_is_before_it(mode: int) -> None:
    """Three drafts below the root, one of each step, as a draft model makes them."""
    n, lengths = 4, torch.tensor([2, 5])
    size = int(((lengths + n) * n).sum()) if mode == 0 else 2 * n * n
    mask = torch.zeros(size, dtype=torch.bool)
    positions, index = torch.zeros(2 * n, dtype=torch.int64), torch.zeros(2, n, dtype=torch.int64)
    first, sibling = torch.zeros_like(index), torch.zeros_like(index)
    parents = torch.tensor([[-1, 0, 1]] * 2)
    chosen = torch.tensor([[0, 1, 2]] * 2)
    build_tree_kernel_efficient_func(
        parents, chosen, lengths, mask, positions, index, first, sibling, 1, 3, n, mode
    )
    assert positions.tolist() == [2, 3, 4, 5, 5, 6, 7, 8]
    assert first.tolist() == [[1, 2, 3, -1]] * 2 and sibling.tolist() == [[-1] * n] * 2
    chain = torch.ones(n, n, dtype=torch.bool).tril()
    start = 0
    for length in lengths.tolist() if mode == 0 else (0, 0):
        seen = mask[start : start + n * (length + n)].view(n, length + n)
        assert seen[:, :length].all() and torch.equal(seen[:, length:], chain)
        start += n * (length + n)


def test_greedy_takes_the_branch_of_the_models_own_tokens() -> None:
    predicts = torch.zeros(N, dtype=torch.int32)
    accepted = torch.full((1, 4), -1, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    drafted = torch.tensor([[9, 5, 6, 7, 8]])
    wanted = torch.tensor([[5, 7, 1, 2, 3]])  # below the root 5, below that 7, then not 8
    linked = links()
    verify_tree_greedy_func(
        predicts, accepted, count, drafted, linked["index"], linked["next_token"],
        linked["next_sibling"], wanted,
    )  # fmt: skip
    assert accepted.tolist() == [[0, 1, 3, -1]] and count.tolist() == [2]
    assert [int(predicts[node]) for node in (0, 1, 3)] == [5, 7, 2]


def test_sampling_along_a_tree_keeps_the_models_distribution() -> None:
    """The first token after the root, whatever was drafted: 20,000 draws of five tokens."""
    torch.manual_seed(0)
    draws, vocabulary = 20_000, 5
    wanted = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    probabilities = wanted.expand(draws, N, vocabulary).contiguous()
    predicts = torch.zeros(draws * N, dtype=torch.int32)
    accepted = torch.full((draws, 4), -1, dtype=torch.int32)
    linked = links(draws)
    tree_speculative_sampling_target_only(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=torch.zeros(draws, dtype=torch.int32),
        candidates=torch.tensor([[0, 1, 3, 0, 2]] * draws),
        retrive_index=linked["index"],
        retrive_next_token=linked["next_token"],
        retrive_next_sibling=linked["next_sibling"],
        uniform_samples=torch.rand(draws, N),
        uniform_samples_for_final_sampling=torch.rand(draws),
        target_probs=probabilities,
        draft_probs=torch.zeros_like(probabilities),
        threshold_single=1.0,
        threshold_acc=1.0,
        deterministic=True,
    )
    first = predicts.view(draws, N)[:, 0].long()
    found = torch.bincount(first, minlength=vocabulary) / draws
    # Five standard errors of a proportion.
    assert torch.all((found - wanted).abs() < 5 * (wanted * (1 - wanted) / draws).sqrt())
    drafted = (accepted[:, 1] >= 0).float().mean()
    assert abs(float(drafted) - float(wanted[1] + wanted[3])) < 0.02


def test_slots_of_what_was_accepted() -> None:
    slots = torch.arange(100, 100 + 2 * N)
    front = torch.zeros(6, dtype=torch.int64)
    fill_front_out_cache_loc_func(torch.tensor([3, 1]), slots, front)
    assert front.tolist() == [100, 101, 102, 105, 0, 0]
    chosen = torch.zeros(6, dtype=torch.int64)
    fill_accept_out_cache_loc_func(torch.tensor([[0, 1, 3], [5, -1, -1]]), slots, chosen, 6)
    assert chosen.tolist() == [100, 101, 103, 105, 0, 0]


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    torch.testing.assert_close(
        top_k_renorm_prob(probabilities, torch.tensor([2])),
        torch.tensor([[0.0, 4 / 7, 3 / 7, 0.0]]),
    )
    torch.testing.assert_close(
        top_p_renorm_prob(probabilities, torch.tensor([0.5])),
        torch.tensor([[0.0, 4 / 7, 3 / 7, 0.0]]),
    )
