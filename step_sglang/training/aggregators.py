"""Learned judges of a trace so far: what could stand in place of the mean of step scores.

Each reads the hidden states of a trace's steps in order and gives a logit after every step. What
the engine runs is the paper's MLP: this is for `bench/signals.py`, which compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from step_sglang.training.reader import Reader
from step_sglang.training.signals import auc_by_question, own_fraction
from step_sglang.training.table import Floats, TraceTable, build_table

_EARLY = (0.25, 0.5)  # moments by which the epoch is chosen
_QUESTIONS = 8  # in a batch
_PREFIX = 8  # steps that the early objectives look at: half of a typical trace
_LONGEST = 32  # steps that training looks at; the few longer traces are judged whole all the same


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Sequences:
    """The traces of some questions, n each, padded to the longest. Q questions, S steps."""

    table: TraceTable
    inputs: Tensor  # [Q, n, S, D] fp32
    mask: Tensor  # [Q, n, S] bool
    correct: Tensor  # [Q, n] bool

    def flat(self, values: Tensor) -> Floats:
        """[S in all] of [Q, n, S], in the order of the table."""
        found: Floats = values[self.mask].double().numpy()
        return found


@dataclass(frozen=True)
class Features:
    """What a judge reads beside the hidden state of the step."""

    position: bool = False  # steps and tokens so far
    siblings: bool = False  # the difference to the mean state of the group at the same step


def load_sequences(reader: Reader, shards: Sequence[int]) -> Sequences:
    """Pad the steps of some questions."""
    table = build_table([reader.traces(shard) for shard in shards])
    n, longest = reader.meta.n, int(table.num_steps.max(initial=1))
    inputs = torch.zeros(len(shards), n, longest, reader.meta.hidden_size)
    mask = torch.zeros(len(shards), n, longest, dtype=torch.bool)
    steps = table.num_steps.reshape(len(shards), n)
    for q, shard in enumerate(shards):
        hidden = reader.load(shard).hidden.float()
        start = 0
        for i, count in enumerate(steps[q].tolist()):
            inputs[q, i, :count] = hidden[start : start + count]
            mask[q, i, :count] = True
            start += count
    correct = torch.from_numpy(table.correct.reshape(len(shards), n).copy())
    return Sequences(table, inputs, mask, correct)


class Scale:
    """Standardises hidden states by the training questions, and adds features."""

    def __init__(self, train: Sequences, features: Features) -> None:
        rows = train.inputs[train.mask]
        self.mean, self.spread = rows.mean(0), rows.std(0) + 1e-6
        self.features = features
        self.width = rows.shape[1] * (2 if features.siblings else 1) + 2 * features.position

    def __call__(self, found: Sequences, questions: Sequence[int], steps: int) -> Tensor:
        """[q, n, steps, width] of the first steps of some questions."""
        chosen = list(questions)
        mask = found.mask[chosen][:, :, :steps, None]
        x = (found.inputs[chosen][:, :, :steps] - self.mean) / self.spread * mask
        parts = [x]
        if self.features.siblings:
            count = mask.sum(1, keepdim=True).clamp(min=1)
            parts.append((x - x.sum(1, keepdim=True) / count) * mask)
        if self.features.position:
            number = torch.arange(1, x.shape[2] + 1).expand(x.shape[:3])
            tokens = torch.zeros(found.mask.shape)
            tokens[found.mask] = torch.from_numpy(found.table.positions).float() + 1
            far = tokens[chosen][:, :, :steps]
            parts += [(number / 20)[..., None], (far / 300)[..., None]]
        return torch.cat(parts, dim=-1)


class MeanOfLogits(nn.Module):
    """The paper's MLP, trained through the running mean of its logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 512), nn.Linear(512, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S] logits after every step of [B, S, width]."""
        logits = self.second(torch.relu(self.first(x)))[..., 0]
        mean: Tensor = logits.cumsum(1) / torch.arange(1, x.shape[1] + 1)
        return mean


class Recurrent(nn.Module):
    """A GRU over the steps."""

    def __init__(self, width: int, units: int = 64) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(width, units, batch_first=True), nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        logits: Tensor = self.head(self.cell(x)[0])[..., 0]
        return logits


class Attention(nn.Module):
    """A learned weight of every step, so that a telling one counts more than the others."""

    def __init__(self, width: int, units: int = 128) -> None:
        super().__init__()
        self.value, self.weight, self.head = (
            nn.Linear(width, units),
            nn.Linear(width, 4),
            nn.Linear(4 * units, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        values = torch.relu(self.value(x))
        weights = self.weight(x).clamp(-8, 8).exp()
        total = (weights[..., None] * values[:, :, None]).cumsum(1)
        pooled = total / weights.cumsum(1)[..., None]
        logits: Tensor = self.head(pooled.flatten(2))[..., 0]
        return logits


KINDS = {"mean of logits": MeanOfLogits, "GRU": Recurrent, "attention": Attention}


def pairwise_loss(logits: Tensor, mask: Tensor, correct: Tensor) -> Tensor:
    """Correct against wrong traces of one question at the same step, early steps alike late ones.

    Args:
        logits: [Q, n, S].
        mask: [Q, n, S].
        correct: [Q, n].
    """
    difference = logits[:, :, None] - logits[:, None]  # [Q, n, n, S]
    pairs = (
        correct[:, :, None, None] & ~correct[:, None, :, None] & mask[:, :, None] & mask[:, None]
    )
    count = pairs.sum((1, 2))
    losses = (F.softplus(-difference) * pairs).sum((1, 2)) / count.clamp(min=1)  # [Q, S]
    return losses.sum() / (count > 0).sum().clamp(min=1)


def bce_loss(logits: Tensor, mask: Tensor, correct: Tensor) -> Tensor:
    """Every step carries its trace's label; classes balanced."""
    label = correct[..., None].expand(mask.shape)[mask].float()
    weight = (1 - label).sum() / label.sum().clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits[mask], label, pos_weight=weight)


def early(loss: Loss) -> Loss:
    """The same loss over the first steps alone, where pruning decides."""

    def of_prefixes(logits: Tensor, mask: Tensor, correct: Tensor) -> Tensor:
        return loss(logits[..., :_PREFIX], mask[..., :_PREFIX], correct)

    return of_prefixes


LOSSES: dict[str, Loss] = {
    "bce": bce_loss,
    "pairwise": pairwise_loss,
    "early bce": early(bce_loss),
    "early pairwise": early(pairwise_loss),
}


def fit_judge(
    kind: str,
    loss: str,
    features: Features,
    train: Sequences,
    validation: Sequences,
    seed: int,
    epochs: int = 15,
    patience: int = 4,
) -> tuple[nn.Module, Scale]:
    """Train a judge; the epoch is the best by AUC within the question at 25 and 50 %."""
    torch.manual_seed(seed)
    scale = Scale(train, features)
    model = KINDS[kind](scale.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    rng = np.random.default_rng(seed)
    best, best_epoch, kept = -1.0, 0, model.state_dict()
    for epoch in range(epochs):
        model.train()
        order = rng.permutation(len(train.correct))
        for start in range(0, len(order), _QUESTIONS):
            chosen = order[start : start + _QUESTIONS].tolist()
            mask = train.mask[chosen]
            steps = min(_LONGEST, int(mask.any(0).any(0).sum()))
            x = F.dropout(scale(train, chosen, steps), 0.1)
            logits = model(x.flatten(0, 1)).view(*x.shape[:3])
            value = LOSSES[loss](logits, mask[:, :, :steps], train.correct[chosen])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        figure = _figure(judge(model, scale, validation), validation.table)
        if figure > best:
            best, best_epoch = figure, epoch
            kept = {name: part.clone() for name, part in model.state_dict().items()}
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(kept)
    return model, scale


def judge(model: nn.Module, scale: Scale, found: Sequences) -> Floats:
    """[S] logits after every step, in the order of the table."""
    model.eval()
    parts, longest = [], found.mask.shape[2]
    with torch.inference_mode():
        for start in range(0, len(found.correct), _QUESTIONS):
            chosen = list(range(start, min(start + _QUESTIONS, len(found.correct))))
            x = scale(found, chosen, longest)
            parts.append(model(x.flatten(0, 1)).view(*x.shape[:3]))
    return found.flat(torch.cat(parts))


def _figure(values: Floats, table: TraceTable) -> float:
    found: list[NDArray[np.float64]] = []
    for fraction in _EARLY:
        moment = own_fraction(table, fraction)
        found.append(auc_by_question(table, moment, moment.pick(values)))
    return float(np.nanmean(found))
