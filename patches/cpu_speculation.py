"""Speculative decoding on the plain-CPU platform: SGLang's tree kernels, in torch.

SGLang has them for accelerators only. Each function here does what the kernel of the same name is
documented to do, request by request: slow, and plain enough to be read against the definition. Only
this platform uses them; on a GPU SGLang's own run. Knows nothing of STEP.

Words of SGLang: a *draft* is a tree of guessed tokens whose root is the last committed token, one
row of the verify pass a node. ``retrieve_index`` numbers the nodes over the batch,
``retrieve_next_token`` has a node's first child and ``retrieve_next_sibling`` the next child of the
same parent, -1 = none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from step_sglang.patches.cpu_attention import BatchedAttentionBackend


def install() -> None:
    """Put the functions where SGLang's workers look for them, before a worker is made."""
    os.environ["SGLANG_NATIVE_MOVE_KV_CACHE"] = "1"  # moves accepted drafts' memory by torch
    with _importable_without_kernels():
        from sglang.kernels.ops.speculative import reconstruct_tree  # noqa: F401
    from sglang.srt.mem_cache import allocation, memory_pool
    from sglang.srt.speculative import (
        draft_utils,
        eagle_utils,
        eagle_worker_common,
        ngram_worker,
        spec_utils,
    )

    for module, functions in (
        (draft_utils.DraftBackendFactory, (create_decode_backend, create_draft_extend_backend)),
        (eagle_worker_common, (assign_draft_cache_locs_contiguous_func, fill_bonus_tokens_func)),
        (allocation, (assign_req_to_token_pool_func,)),
        (memory_pool, (copy_all_layer_kv_cache_func,)),
        (ngram_worker, (reconstruct_indices_from_tree_mask_func,)),
        (spec_utils, (fill_front_out_cache_loc_func, fill_accept_out_cache_loc_func)),
        (
            eagle_utils,
            (
                build_tree_kernel_efficient_func,
                top_k_renorm_prob,
                top_p_renorm_prob,
                tree_speculative_sampling_target_only,
                verify_tree_greedy_func,
            ),
        ),
    ):
        for function in functions:
            if not hasattr(module, function.__name__):
                raise AttributeError(f"{module} has no {function.__name__}")
            setattr(module, function.__name__, function)


@contextmanager
def _importable_without_kernels() -> Iterator[None]:
    """``sgl_kernel`` needs a CUDA driver to be imported; one module wants one name of it."""
    name = "sgl_kernel.speculative"
    if "sgl_kernel" in sys.modules:
        yield
        return
    stand_in, package = ModuleType(name), ModuleType("sgl_kernel")
    stand_in.__dict__["reconstruct_indices_from_tree_mask"] = None
    package.__dict__["speculative"] = stand_in
    sys.modules.update({"sgl_kernel": package, name: stand_in})
    try:
        yield
    finally:
        # Whoever asks later whether the kernels are there must be told the truth.
        del sys.modules["sgl_kernel"], sys.modules[name]


def copy_all_layer_kv_cache_func(*args: Any) -> None:
    """Nothing: it is called to compile a kernel that the native move does without."""


def assign_req_to_token_pool_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Enter newly allocated pool slots into the requests' tables.

    Args:
        req_pool_indices: [B] int64, rows of ``req_to_token``.
        req_to_token: [requests, positions], written.
        start_offset: [B] first new position of each.
        end_offset: [B] position after the last.
        out_cache_loc: the slots, one request after the other.
        batch_size: B.
    """
    first = 0
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in spans:
        req_to_token[row, start:end] = out_cache_loc[first : first + end - start]
        first += end - start


class DraftSteps:
    """Attention of a draft model's steps, each of which sees the drafts of those before it.

    Args:
        runner: SGLang's runner of the draft model.
        steps: drafts of a request; the first comes from the pass before.
    """

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [BatchedAttentionBackend(runner) for _ in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan all of the steps of a batch, before the first."""
        lengths = forward_batch.seq_lens.tolist()
        for step, backend in enumerate(self.attn_backends, start=1):
            backend.plan_decode(forward_batch, [length + step for length in lengths])


def create_decode_backend(factory: Any) -> DraftSteps | None:
    """``DraftBackendFactory.create_decode_backend``.

    Raises:
        ValueError: the draft model is to draft a tree.
    """
    if factory.topk > 1:
        raise ValueError(
            "on the plain-CPU platform a draft model drafts chains: set --speculative-eagle-topk 1"
        )
    if factory.speculative_num_steps <= 1:
        return None
    return DraftSteps(factory.draft_model_runner, factory.speculative_num_steps)


def create_draft_extend_backend(factory: Any) -> BatchedAttentionBackend:
    """``DraftBackendFactory.create_draft_extend_backend``."""
    return BatchedAttentionBackend(factory.draft_model_runner)


def assign_draft_cache_locs_contiguous_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    positions: torch.Tensor | None = None,
    mrope: torch.Tensor | None = None,
) -> None:
    """Pool slots that a draft model writes.

    Args:
        req_pool_indices: [B] int64, rows of ``req_to_token``.
        req_to_token: [requests, positions] pool slot of every position.
        seq_lens: [B] position of the first draft.
        out_cache_loc: [B * topk * num_cols] int64, written.
        topk: branches of each.
        num_cols: drafts of a branch.
        positions: not asked for without an accelerator.
        mrope: not asked for without an accelerator.
    """
    count = topk * num_cols
    at = seq_lens.to(torch.int64)[:, None] + torch.arange(count)
    out_cache_loc.copy_(req_to_token[req_pool_indices.to(torch.int64)[:, None], at].flatten())


def extend_cache_locs(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> torch.Tensor:
    """Pool slots of every request's draft: ``assign_extend_cache_locs_func``.

    Args:
        req_pool_indices: [B] int64, rows of ``req_to_token``.
        req_to_token: [requests, positions] pool slot of every position.
        start_offset: [B] position of the first drafted token.
        end_offset: [B] position after the last, ``draft_token_num`` further on.
        batch_size: B.
        draft_token_num: n.
        device: of the result.

    Returns:
        [B * n] int64.
    """
    positions = start_offset.to(torch.int64)[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.to(torch.int64)[:, None], positions].flatten().long()


def fill_front_out_cache_loc_func(
    num_front: torch.Tensor, out_cache_loc: torch.Tensor, front_out_cache_loc: torch.Tensor
) -> None:
    """Slots of the first ``num_front`` [B] nodes of every request, one request after the other.

    Args:
        num_front: [B] how many of each.
        out_cache_loc: [B * n] slots of the verify pass.
        front_out_cache_loc: [at least the sum] int64, written.
    """
    window = out_cache_loc.view(len(num_front), -1)
    wanted = torch.arange(window.shape[1]) < num_front[:, None]
    chosen = window[wanted]
    front_out_cache_loc[: len(chosen)] = chosen


def fill_accept_out_cache_loc_func(
    accept_index: torch.Tensor,
    out_cache_loc: torch.Tensor,
    accept_out_cache_loc: torch.Tensor,
    size: int,
) -> None:
    """Slots of the accepted nodes, without the places that pad.

    Args:
        accept_index: [B, depth] int, global node numbers, -1 = none.
        out_cache_loc: [B * n] slots of the verify pass.
        accept_out_cache_loc: [size] int64, written from the front.
        size: B * depth.
    """
    nodes = accept_index.flatten()
    chosen = out_cache_loc[nodes[nodes >= 0].long()]
    accept_out_cache_loc[: len(chosen)] = chosen


def fill_bonus_tokens_func(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """The last committed token of every request, with which its next draft begins.

    Args:
        accept_tokens: [B * depth] committed tokens, padded.
        accept_lens: [B] how many of each.
        bonus_tokens: [B], written.
        accept_stride: depth.
        batch_size: B.
    """
    rows = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(rows.gather(1, accept_lens.long()[:, None] - 1)[:, 0])


def reconstruct_indices_from_tree_mask_func(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Links and positions of the trees that a mask describes.

    Args:
        tree_mask: [B * n * n] bool, node j is an ancestor of node i, or i itself.
        verified_seq_len: [B] position of the root.
        positions: [B * n] int64, written.
        retrieve_index: [B, n] int64, written.
        retrieve_next_token: [B, n] int64, written.
        retrieve_next_sibling: [B, n] int64, written.
        batch_size: B.
        draft_token_num: n.
    """
    ancestors = tree_mask.view(batch_size, draft_token_num, draft_token_num).tril(-1)
    depth = ancestors.sum(-1)
    positions.copy_((verified_seq_len[:, None] + depth).flatten())
    nodes = torch.arange(batch_size * draft_token_num)
    retrieve_index.copy_(nodes.view(batch_size, draft_token_num))
    numbers = torch.arange(draft_token_num)
    parents = torch.where(ancestors.any(-1), (ancestors * numbers).argmax(-1), -1)
    _link(parents, retrieve_next_token, retrieve_next_sibling)


def _link(parents: torch.Tensor, first_child: torch.Tensor, next_sibling: torch.Tensor) -> None:
    """Children in the order of their numbers.

    Args:
        parents: [B, n] number of each node's parent in its tree, -1 = the root.
        first_child: [B, n], written.
        next_sibling: [B, n], written.
    """
    first_child.fill_(-1)
    next_sibling.fill_(-1)
    for tree, of_tree in enumerate(parents.tolist()):
        for node in range(len(of_tree) - 1, 0, -1):
            parent = of_tree[node]
            if parent >= 0:
                next_sibling[tree, node] = first_child[tree, parent]
                first_child[tree, parent] = node


def build_tree_kernel_efficient_func(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """The trees of a draft model's best candidates, with the mask that attention wants.

    Args:
        parent_list: [B, P] for every expanded node the candidate that it was.
        top_scores_index: [B, n - 1] int64, the candidates that were kept, ascending; candidate c
            hangs below expanded node c // topk, 0 = the root.
        seq_lens: [B] position of the root.
        tree_mask: bool, written; [sum of (length + n) * n] with every earlier position, or
            [B * n * n] of the drafts alone.
        positions: [B * n] int64, written.
        retrieve_index: [B, n] int64, written.
        retrieve_next_token: [B, n] int64, written.
        retrieve_next_sibling: [B, n] int64, written.
        topk: candidates of every expanded node.
        spec_steps: levels below the root.
        num_verify_tokens: n.
        tree_mask_mode: 0 = all positions, 1 = drafts alone.
    """
    n = num_verify_tokens
    parents = torch.full((len(seq_lens), n), -1, dtype=torch.int64)
    for tree, chosen in enumerate(top_scores_index.tolist()):
        number = {candidate: i + 1 for i, candidate in enumerate(chosen)}
        for i, candidate in enumerate(chosen):
            expanded = candidate // topk
            above = 0 if expanded == 0 else number[int(parent_list[tree, expanded])]
            parents[tree, i + 1] = above
    mask = _with_ancestors(parents)
    depth = mask.sum(-1) - 1
    positions.copy_((seq_lens[:, None] + depth).flatten())
    retrieve_index.copy_(torch.arange(len(seq_lens) * n).view(len(seq_lens), n))
    _link(parents, retrieve_next_token, retrieve_next_sibling)
    if tree_mask_mode:
        tree_mask.view(-1)[: mask.numel()] = mask.flatten()
        return
    whole = [
        torch.cat([torch.ones(n, int(length), dtype=torch.bool), mask[i]], 1).flatten()
        for i, length in enumerate(seq_lens)
    ]
    flat = torch.cat(whole)
    tree_mask.view(-1)[: len(flat)] = flat


def _with_ancestors(parents: torch.Tensor) -> torch.Tensor:
    """[B, n, n] bool: node j is node i or above it."""
    trees, n = parents.shape
    mask = torch.zeros(trees, n, n, dtype=torch.bool)
    rows = torch.arange(trees)
    for node in range(n):  # a parent's number is smaller
        above = parents[:, node]
        inherited = mask[rows, above.clamp(min=0)]
        mask[:, node] = inherited & (above >= 0)[:, None]
        mask[:, node, node] = True
    return mask


def verify_tree_greedy_func(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the tree as long as a child is the token that the model itself would take.

    Args:
        predicts: [B * n] int32, written: the token after every accepted node.
        accept_index: [B, depth] int32, written: numbers of the accepted nodes, the root first.
        accept_token_num: [B] int32, written: accepted nodes without the root.
        candidates: [B, n] the drafted tokens.
        retrieve_index: [B, n].
        retrieve_next_token: [B, n].
        retrieve_next_sibling: [B, n].
        target_predict: [B, n] the model's own token after every node.
        topk: unused, SGLang's signature.

    Returns:
        The first three.
    """
    links = (retrieve_next_token.tolist(), retrieve_next_sibling.tolist())
    drafted, wanted, numbers = candidates.tolist(), target_predict.tolist(), retrieve_index.tolist()
    for tree in range(len(drafted)):
        node, accepted = 0, 0
        accept_index[tree, 0] = numbers[tree][0]
        while accepted + 1 < accept_index.shape[1]:
            child = links[0][tree][node]
            while child >= 0 and drafted[tree][child] != wanted[tree][node]:
                child = links[1][tree][child]
            if child < 0:
                break
            predicts[numbers[tree][node]] = wanted[tree][node]
            accepted += 1
            node = child
            accept_index[tree, accepted] = numbers[tree][node]
        accept_token_num[tree] = accepted
        predicts[numbers[tree][node]] = wanted[tree][node]
    return predicts, accept_index, accept_token_num


def tree_speculative_sampling_target_only(
    *,
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
) -> None:
    """Sample along the tree so that the tokens are distributed as without speculation.

    At a node one uniform number runs through the cumulated probability of its children; the child
    in whose part it lies is accepted. Where it lies beyond them, the token is drawn from what the
    children did not take. (With thresholds below 1 SGLang accepts more than that.)

    Args:
        predicts: [B * n] int32, written: the token after every accepted node.
        accept_index: [B, depth] int32, written: numbers of the accepted nodes, the root first.
        accept_token_num: [B] int32, written: accepted nodes without the root.
        candidates: [B, n] the drafted tokens.
        retrive_index: [B, n].
        retrive_next_token: [B, n].
        retrive_next_sibling: [B, n].
        uniform_samples: [B, n] in [0, 1), a node's decides about its children.
        uniform_samples_for_final_sampling: [B] in [0, 1).
        target_probs: [B, n, V] the model's distribution after every node.
        draft_probs: [B, n, V], written: what the children took of it.
        threshold_single: a child at least this probable is accepted.
        threshold_acc: scales the cumulated probability down.
        deterministic: unused, SGLang's signature.
    """
    numbers, drafted = retrive_index.tolist(), candidates.tolist()
    for tree in range(len(drafted)):
        node, accepted = 0, 0
        accept_index[tree, 0] = numbers[tree][0]
        coin = float(uniform_samples[tree, 0])
        while accepted + 1 < accept_index.shape[1]:
            cumulated, child = 0.0, int(retrive_next_token[tree, node])
            while child >= 0:
                token = drafted[tree][child]
                likely = float(target_probs[tree, node, token])
                cumulated += likely
                if coin <= cumulated / threshold_acc or likely >= threshold_single:
                    break
                draft_probs[tree, node, token] = target_probs[tree, node, token]
                child = int(retrive_next_sibling[tree, child])
            if child < 0:
                break
            predicts[numbers[tree][node]] = token
            accepted += 1
            node = child
            coin = float(uniform_samples[tree, node])
            accept_index[tree, accepted] = numbers[tree][node]
        accept_token_num[tree] = accepted
        rest = target_probs[tree, node]
        if accepted + 1 < accept_index.shape[1]:  # else nothing was asked of the last node
            rest = (rest - draft_probs[tree, node]).clamp(min=0)
        cumulative = rest.double().cumsum(0)
        wanted = float(uniform_samples_for_final_sampling[tree]) * float(cumulative[-1])
        chosen = int(torch.searchsorted(cumulative, wanted, right=True))
        predicts[numbers[tree][node]] = min(chosen, len(cumulative) - 1)


def top_k_renorm_prob(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """[R, V] with the ``top_ks`` [R] most probable tokens of each row kept, and summing to 1."""
    ordered = probs.sort(-1, descending=True).values
    last = ordered.gather(-1, (top_ks.long().clamp(1, probs.shape[-1]) - 1)[:, None])
    kept = probs.masked_fill(probs < last, 0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_prob(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """[R, V] with the fewest tokens kept that hold ``top_ps`` [R] of each row, and summing to 1."""
    ordered, tokens = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probs).scatter(
        -1, tokens, ordered.masked_fill(before > top_ps[:, None], 0)
    )
    return kept / kept.sum(-1, keepdim=True)
