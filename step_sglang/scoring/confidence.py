"""DeepConf's token confidence, from the logits of one pass. No host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def token_confidences(logits: torch.Tensor, top_ks: Sequence[int]) -> torch.Tensor:
    """Minus the mean log-probability of the k most likely candidates (arXiv 2508.15260, eq. 2).

    Args:
        logits: [B, V] before temperature and penalties; not changed.
        top_ks: [K] numbers of candidates, ascending; more than V count as V.

    Returns:
        [B, K] fp32, nats.
    """
    sizes = [min(k, logits.shape[1]) for k in top_ks]
    if sizes[-1] == 1:
        best = logits.amax(dim=1, keepdim=True).float()
    else:
        best = logits.topk(sizes[-1], dim=1).values.float()
    totals = best.cumsum(dim=1)
    normalizer = logits.float().logsumexp(dim=1)
    return torch.stack([normalizer - totals[:, k - 1] / k for k in sizes], dim=1)
