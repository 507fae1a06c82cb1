"""A logistic regression on the same hidden states: the baseline a scorer has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import nn

from step_sglang.training.data import build_labels
from step_sglang.training.errors import TrainError
from step_sglang.training.reader import Reader

_MAX_BYTES = 128 << 20  # of fp32 rows; more are thinned out evenly


class LinearNetwork(nn.Module):
    """Logits [B] = hidden [B, d] times a weight, plus a bias."""

    def __init__(self, weight: NDArray[np.float64], bias: float) -> None:
        super().__init__()
        self.weight = torch.from_numpy(weight).float()
        self.bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return hidden @ self.weight + self.bias


def fit_linear_probe(reader: Reader, shards: Sequence[int], seed: int = 0) -> LinearNetwork:
    """Fit scikit-learn's logistic regression, classes balanced, inputs standardised.

    Raises:
        TrainError: the states are too large for float32.
    """
    table = build_labels(reader, shards)
    total = int(table.offsets[-1])
    limit = _MAX_BYTES // (4 * reader.meta.hidden_size)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
    rows = np.empty((len(chosen), reader.meta.hidden_size), np.float32)
    start = filled = 0
    for shard in shards:
        hidden = reader.load(shard).hidden
        first = filled
        filled = int(np.searchsorted(chosen, start + len(hidden)))
        rows[first:filled] = hidden[torch.from_numpy(chosen[first:filled] - start)].float().numpy()
        start += len(hidden)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, spread = rows.mean(0), rows.std(0) + 1e-6
    if not np.isfinite(spread).all():
        raise TrainError(
            f"the hidden states in {reader.folder} are as large as {np.abs(rows).max():.0e}, whose "
            "squares float32 cannot hold: no scorer can be trained on them. Those of a language "
            "model are below 1e6; is the model, or its dtype, what it should be?"
        )
    rows -= mean
    rows /= spread
    model = LogisticRegression(class_weight="balanced", max_iter=200, tol=1e-3)
    model.fit(rows, table.correct[table.step_trace][chosen])
    weight = model.coef_[0].astype(np.float64) / spread
    return LinearNetwork(weight, float(model.intercept_[0]) - float(weight @ mean))
