"""Attention of the plain-CPU platform: all requests of a batch at once.

SGLang's ``torch_native`` backend attends to one request after the other, and with many short traces
most of a decode step is that loop. Here requests of similar length share one call: their keys and
values are gathered from the pool into rows that are padded to the longest. What it does not cover,
and long prompts, go through SGLang's loop. Knows nothing of STEP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

LONGEST = 128  # new tokens of a request that is still padded to others; beyond, a loop costs little
CELLS = 1 << 16  # positions that are gathered at once: 32 MiB of keys at 128 floats a position


@dataclass(frozen=True)
class Part:
    """Requests that one call attends to: B of them, Q new tokens and L positions when padded.

    A padded place repeats its request's last token or position, so that nothing is read that is not
    its own, and what is written twice is the same.
    """

    tokens: torch.Tensor  # [B, Q] int64, rows of the query
    slots: torch.Tensor  # [B * L] int64, rows of the pool
    visible: torch.Tensor | None  # [B, 1, Q, L] bool; None = every position to every token


@dataclass(frozen=True)
class Plan:
    """How a pass is attended to, the same in all of its layers."""

    parts: tuple[Part, ...]
    alone: tuple[int, ...]  # requests with long prompts, for SGLang's loop


def similar(new: Sequence[int], total: Sequence[int]) -> Iterator[list[int]]:
    """Indices of requests in parts in which no more than half of a dimension is padding.

    Args:
        new: tokens of each request that this pass computes.
        total: positions of each request, these tokens included.
    """
    part: list[int] = []
    for i in sorted(range(len(new)), key=lambda i: (new[i].bit_length(), total[i]), reverse=True):
        if part:
            queries = max(new[part[0]], new[i])  # of one bit length: less than twice each other
            longest = total[part[0]]
            fits = (len(part) + 1) * longest * max(1, queries // 8) <= CELLS
            if (
                new[i].bit_length() != new[part[0]].bit_length()
                or 2 * total[i] < longest
                or not fits
            ):
                yield part
                part = []
        part.append(i)
    if part:
        yield part


def plan(
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    new: list[int],
    total: list[int],
    trees: torch.Tensor | None = None,
) -> Plan:
    """Divide a pass into parts.

    Args:
        req_to_token: [requests, positions] pool slot of every position.
        requests: [B] int64, rows of ``req_to_token``.
        new: tokens of each request that this pass computes, in the order of the query's rows.
        total: positions of each request, these tokens included.
        trees: [B, n, n] bool, which of its n new tokens each of them sees; None = those before it.
    """
    first, starts = 0, []
    for length in new:
        starts.append(first)
        first += length
    short = [i for i, length in enumerate(new) if 0 < length <= LONGEST]
    parts = []
    for part in similar([new[i] for i in short], [total[i] for i in short]):
        rows = [short[i] for i in part]
        queries = torch.tensor([new[i] for i in rows])[:, None]
        lengths = torch.tensor([total[i] for i in rows])[:, None]
        token = torch.minimum(torch.arange(int(queries.max())), queries - 1)  # [B, Q]
        position = torch.minimum(torch.arange(int(lengths.max())), lengths - 1)  # [B, L]
        slots = req_to_token[requests[rows][:, None], position].flatten().long()
        visible = None
        last = token + lengths - queries  # [B, Q], the position of each new token
        if token.shape[1] > 1 or int(lengths.min()) < position.shape[1]:
            visible = (torch.arange(position.shape[1]) <= last[:, :, None])[:, None]
        if trees is not None and visible is not None:
            visible = _in_trees(visible, trees[rows], lengths)
        parts.append(Part(token + torch.tensor([starts[i] for i in rows])[:, None], slots, visible))
    return Plan(tuple(parts), tuple(i for i, length in enumerate(new) if length > LONGEST))


def _in_trees(visible: torch.Tensor, trees: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[B, 1, n, L] bool: every position before the drafts, and of the drafts the own branch.

    Args:
        visible: [B, 1, n, L] as if the drafts were a text.
        trees: [B, n, n] bool.
        lengths: [B, 1] positions, the drafts included.
    """
    drafted = trees.shape[1]
    seen = visible.clone()
    for row, length in enumerate(lengths[:, 0].tolist()):
        seen[row, 0, :, length - drafted : length] = trees[row]
    return seen


def drafted_trees(draft: Any, prefixes: Sequence[int]) -> torch.Tensor:
    """[B, n, n] bool of a verify pass: which drafted tokens each of them sees.

    Args:
        draft: SGLang's verify input; its mask lists for every request and drafted token all of the
            earlier positions first.
        prefixes: those positions of each request.
    """
    n = draft.draft_token_num
    mask, first, trees = draft.custom_mask, 0, []
    for prefix in prefixes:
        rows = mask[first : first + n * (prefix + n)].view(n, prefix + n)
        trees.append(rows[:, prefix:])
        first += n * (prefix + n)
    return torch.stack(trees).bool()


def attend(
    part: Part,
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None,
) -> None:
    """Causal attention of a part's new tokens to all of its positions.

    Args:
        part: the requests.
        query: [T, H, D], new tokens of all requests.
        output: [T, H, E], where the part's rows are written.
        keys: [slots, K, D], the pool; H is a multiple of K.
        values: [slots, K, E].
        scale: of the scores; None = 1 / sqrt(D).
    """
    batch, new = part.tokens.shape
    heads, kv_heads = query.shape[1], keys.shape[1]
    groups = heads // kv_heads
    # The heads that share a key become rows of its query: [B, K, groups * Q, D].
    asked = query[part.tokens].view(batch, new, kv_heads, groups, -1)
    asked = asked.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * new, -1)

    def gathered(pool: torch.Tensor) -> torch.Tensor:  # [B, K, L, D]
        rows = pool.index_select(0, part.slots).to(query.dtype)
        return rows.view(batch, -1, kv_heads, pool.shape[2]).transpose(1, 2)

    visible = part.visible
    if visible is not None:
        visible = visible.repeat(1, 1, groups, 1).expand(batch, kv_heads, -1, -1)
    found = scaled_dot_product_attention(
        asked, gathered(keys), gathered(values), attn_mask=visible, scale=scale
    )
    found = found.view(batch, kv_heads, groups, new, -1).permute(0, 3, 1, 2, 4)
    output[part.tokens] = found.reshape(batch, new, heads, -1)


class BatchedAttentionBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """``torch_native`` with its loop over requests replaced where that is possible."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the pass; all of its layers follow the plan."""
        super().init_forward_metadata(forward_batch)
        total = forward_batch.seq_lens.tolist()
        trees = None
        if forward_batch.forward_mode.is_target_verify():
            trees = drafted_trees(forward_batch.spec_info, total)
            new = [trees.shape[1]] * len(total)
            total = [length + trees.shape[1] for length in total]
        elif forward_batch.forward_mode.is_decode_or_idle():
            new = [1] * len(total)
        else:
            new = forward_batch.extend_seq_lens.tolist()
        self.forward_metadata = plan(
            self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices, new, total, trees
        )

    def plan_decode(self, forward_batch: Any, total: list[int]) -> None:
        """Plan a pass of one new token for each request.

        Args:
            forward_batch: SGLang's, for its requests.
            total: positions of each request, the new one included.
        """
        self.forward_metadata = plan(
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            [1] * len(total),
            total,
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Positions of a row that pads a batch: as torch's softmax needs one, it is not 0."""
        return 1

    def _run_sdpa_forward_decode(
        self, query: torch.Tensor, output: torch.Tensor, *pool: Any, **how: Any
    ) -> None:
        if not covered(pool, how):
            super()._run_sdpa_forward_decode(query, output, *pool, **how)
            return
        for part in self.forward_metadata.parts:
            attend(part, query, output, pool[0], pool[1], how["scaling"])

    def _run_sdpa_forward_extend(
        self, query: torch.Tensor, output: torch.Tensor, *pool: Any, **how: Any
    ) -> None:
        if not covered(pool, how) or not how["causal"]:
            super()._run_sdpa_forward_extend(query, output, *pool, **how)
            return
        for part in self.forward_metadata.parts:
            attend(part, query, output, pool[0], pool[1], how["scaling"])
        if not self.forward_metadata.alone:
            return  # a pass that verifies drafts says nothing of new tokens, nor needs to
        *pools, requests, total, cached, new, encoder = pool
        ends = torch.cumsum(new, 0).tolist()
        for i in self.forward_metadata.alone:
            one, rows = slice(i, i + 1), slice(ends[i] - int(new[i]), ends[i])
            of_one = (requests[one], total[one], cached[one], new[one], encoder)
            super()._run_sdpa_forward_extend(query[rows], output[rows], *pools, *of_one, **how)


def covered(pool: tuple[Any, ...], how: dict[str, Any]) -> bool:
    """Whether the batch form does what these arguments of SGLang's loop ask for."""
    plain = not how["is_cross_attn"] and how["sliding_window_size"] is None
    return plain and pool[-1] is None  # no encoder's positions come first
