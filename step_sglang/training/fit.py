"""Fits the scorer's MLP: optimizer, early stopping, and the scale of its scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from step_sglang.scoring.scorer import HIDDEN_UNITS, Scorer, ScorerInfo
from step_sglang.training.data import Chunks, build_labels, score_steps
from step_sglang.training.errors import TrainError
from step_sglang.training.metrics import (
    FRACTIONS,
    RUNNING_MEAN,
    auc,
    signals_at,
    within_auc,
)
from step_sglang.training.objectives import (
    OBJECTIVES,
    PairSampler,
    bce_losses,
    pairwise_losses,
)
from step_sglang.training.reader import Reader
from step_sglang.training.table import Floats, TraceTable

_SCALE_PAIRS = 20_000
# Of W1 in a scorer file, which is what the op streams. Rounding it to bfloat16 changes a score by
# less than a model's own bfloat16 hidden states do (bench/weights_dtype.py), for half the bytes.
WEIGHT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """The paper's recipe (section 4.1) unless told otherwise."""

    objective: str = "bce"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch: int = 128  # steps
    epochs: int = 20  # at most
    patience: int = 5  # epochs without a better validation figure
    seed: int = 0
    memory_mb: int = 512  # of hidden states at a time
    dtype: str = "bfloat16"  # of W1 in the file

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise TrainError(
                f"--objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}"
            )
        if self.dtype not in WEIGHT_DTYPES:
            raise TrainError(
                f"--dtype must be one of {', '.join(WEIGHT_DTYPES)}, not {self.dtype!r}"
            )
        if min(self.batch, self.epochs, self.patience, self.memory_mb) < 1:
            raise TrainError("batch, epochs, patience and memory must be at least 1")


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures on the validation questions."""

    loss: float  # mean training loss
    step_auc: float
    step_f1: float  # at a score of 0.5
    within: float  # within-question AUC of the running mean, mean over the fractions


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained network with its history."""

    network: ScorerNetwork
    history: tuple[Epoch, ...]
    best_epoch: int  # counted from 1
    positive_weight: float
    seconds: float


class ScorerNetwork(nn.Module):
    """Linear(d, 512), ReLU, Linear(512, 1); logits [B] for fp32 hidden states [B, d]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, HIDDEN_UNITS)
        self.second = nn.Linear(HIDDEN_UNITS, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.second(torch.relu(self.first(hidden)))
        return logits.squeeze(-1)

    def round_w1(self, dtype: torch.dtype) -> None:
        """Round W1 to a dtype, in which :meth:`as_scorer` then loses nothing."""
        with torch.no_grad():
            self.first.weight.copy_(self.first.weight.to(dtype))

    def as_scorer(self, info: ScorerInfo, dtype: torch.dtype = torch.float32) -> Scorer:
        """The weights as a scorer; ``dtype`` is that of W1."""
        return Scorer(
            self.first.weight.detach().to(dtype, copy=True),
            self.first.bias.detach().clone(),
            self.second.weight.detach().reshape(-1).clone(),
            self.second.bias.detach().clone(),
            info,
        )

    @classmethod
    def from_scorer(cls, scorer: Scorer) -> ScorerNetwork:
        """The inverse of :meth:`as_scorer`, in fp32."""
        network = cls(scorer.hidden_size)
        with torch.no_grad():
            network.first.weight.copy_(scorer.w1)
            network.first.bias.copy_(scorer.b1)
            network.second.weight.copy_(scorer.w2.reshape(1, -1))
            network.second.bias.copy_(scorer.b2)
        return network


def fit(
    reader: Reader,
    train: Sequence[int],
    validation: Sequence[int],
    recipe: Recipe,
    report: Callable[[int, Epoch], None] = lambda number, epoch: None,
) -> Fitted:
    """Train on some questions, choose the epoch on others.

    The epoch is chosen by 0.75 step AUC + 0.25 F1 with bce (the paper's figure), and by the
    within-question AUC of the running mean with pairwise, whose scores have no scale until
    they are fitted to the validation steps at the end.

    Raises:
        TrainError: pairwise, and no training question has both a correct and a wrong trace; or
            the loss is no number.
    """
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    network = ScorerNetwork(reader.meta.hidden_size)
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    chunks = Chunks(reader, train, recipe.memory_mb << 20, recipe.seed)
    weight = (chunks.rows - chunks.positive_rows) / chunks.positive_rows
    table = build_labels(reader, validation)
    generator = torch.Generator().manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    history: list[Epoch] = []
    best, best_epoch, kept = -np.inf, 0, _copy(network)
    for number in range(1, recipe.epochs + 1):
        total, batches = 0.0, 0
        for chunk in chunks:
            losses = (
                bce_losses(network, chunk, recipe.batch, weight, generator)
                if recipe.objective == "bce"
                else pairwise_losses(network, chunk, recipe.batch, rng)
            )
            for loss in losses:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total, batches = total + loss.item(), batches + 1
        if not batches:
            raise TrainError(
                "no training question has both a correct and a wrong trace with steps, which "
                "--objective pairwise needs: collect more traces per question, or use bce"
            )
        if not np.isfinite(total):
            raise TrainError(
                f"the training loss of epoch {number} is {total}: the learning rate "
                f"{recipe.learning_rate:g} is too high, or the hidden states in {reader.folder} "
                "are too large"
            )
        epoch = validation_epoch(table, score_steps(reader, validation, network), total / batches)
        history.append(epoch)
        report(number, epoch)
        figure = 0.75 * epoch.step_auc + 0.25 * epoch.step_f1
        if recipe.objective == "pairwise" and not np.isnan(epoch.within):
            figure = epoch.within
        if figure > best:
            best, best_epoch, kept = figure, number, _copy(network)
        elif number - best_epoch >= recipe.patience:
            break
    network.load_state_dict(kept)
    if recipe.objective == "pairwise":
        fit_scale(network, table, score_steps(reader, validation, network))
    return Fitted(network, tuple(history), best_epoch, weight, time.monotonic() - started)


def validation_epoch(table: TraceTable, scores: Floats, loss: float) -> Epoch:
    """The validation figures of one epoch."""
    label = table.correct[table.step_trace]
    positive = scores > 0.5
    f1 = 2 * float((positive & label).sum()) / max(1, int(positive.sum() + label.sum()))
    usable = table.num_steps > 0
    within = [
        within_auc(
            signals_at(table, scores, fraction)[RUNNING_MEAN][usable],
            table.correct[usable],
            table.question[usable],
        )
        for fraction in FRACTIONS
    ]
    return Epoch(loss, auc(scores, label), f1, float(np.mean(within)))


def fit_scale(network: ScorerNetwork, table: TraceTable, scores: Floats) -> None:
    """Rescale and centre the logits on the validation steps, inside the last layer.

    A ranking loss leaves the centre undetermined and overfits the scale, but a running mean of
    sigmoids, and a vote weighted by it, depend on both. The scale is fitted to pairs within
    questions, because a ranking loss says nothing across questions; the centre is the mean logit.
    The order of step scores does not change.
    """
    sampler = PairSampler(table)
    clipped = np.clip(scores, 1e-9, 1 - 1e-9)
    logits = np.log(clipped / (1 - clipped))
    slope = 1.0
    spread = float(logits.std())
    if sampler.questions and spread > 0:
        good, bad = sampler.draw(_SCALE_PAIRS, np.random.default_rng(0))
        difference = (logits[good] - logits[bad]) / spread
        model = LogisticRegression(fit_intercept=False)
        sides = np.concatenate([difference, -difference])[:, None]
        model.fit(sides, np.repeat([True, False], len(difference)))
        # At least a tenth of a unit per spread: a useless scorer must not become a constant.
        slope = max(float(model.coef_[0, 0]), 0.1) / spread
    with torch.no_grad():
        network.second.weight.mul_(slope)
        network.second.bias.sub_(float(logits.mean())).mul_(slope)


def _copy(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
