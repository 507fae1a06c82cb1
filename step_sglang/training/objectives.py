"""The two training losses, as epochs of batches over a chunk.

`bce` is the paper's: every step carries its trace's label. `pairwise` compares a correct with a
wrong trace of the same question, so recognising hard questions earns nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from step_sglang.training.data import Chunk
from step_sglang.training.table import Ints, TraceTable

OBJECTIVES = ("bce", "pairwise")


def bce_losses(
    network: torch.nn.Module,
    chunk: Chunk,
    batch: int,
    positive_weight: float,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """One loss per batch of steps, every step once (paper section 3.2)."""
    weight = torch.tensor(positive_weight)
    for rows in torch.randperm(len(chunk.label), generator=generator).split(batch):  # type: ignore[no-untyped-call]
        logits = network(chunk.hidden[rows].float())
        yield functional.binary_cross_entropy_with_logits(
            logits, chunk.label[rows], pos_weight=weight
        )


class PairSampler:
    """Draws steps of a correct and a wrong trace of one question, equally far along."""

    def __init__(self, table: TraceTable) -> None:
        steps = table.num_steps
        self._offsets, self._steps = table.offsets, steps
        good: list[Ints] = []
        bad: list[Ints] = []
        for question in range(int(table.question.max(initial=-1)) + 1):
            rows = np.flatnonzero((table.question == question) & (steps > 0))
            right, wrong = rows[table.correct[rows]], rows[~table.correct[rows]]
            if len(right) and len(wrong):
                good.append(right)
                bad.append(wrong)
        self.questions = len(good)
        self._good, self._good_count = _padded(good)
        self._bad, self._bad_count = _padded(bad)

    def draw(self, pairs: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """[pairs] step rows of correct traces and of the wrong traces they are compared with."""
        question = rng.integers(self.questions, size=pairs)
        along = rng.random(pairs)
        return (
            self._step(self._pick(self._good, self._good_count, question, rng), along),
            self._step(self._pick(self._bad, self._bad_count, question, rng), along),
        )

    def _pick(
        self, traces: Ints, count: Ints, question: Ints, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        column = (rng.random(len(question)) * count[question]).astype(np.int64)
        picked: NDArray[np.int64] = traces[question, column]
        return picked

    def _step(self, trace: Ints, along: NDArray[np.float64]) -> Ints:
        # along < 1, so the last step is num_steps - 1
        row: Ints = self._offsets[trace] + (along * self._steps[trace]).astype(np.int64)
        return row


def pairwise_losses(
    network: torch.nn.Module, chunk: Chunk, batch: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """One loss per batch: log(1 + exp(-(correct - wrong))); as many batches as bce would make."""
    sampler = PairSampler(chunk.table)
    if not sampler.questions:
        return
    pairs = max(1, batch // 2)
    for _ in range(-(-len(chunk.label) // batch)):
        good, bad = sampler.draw(pairs, rng)
        rows = torch.from_numpy(np.concatenate([good, bad]))
        logits = network(chunk.hidden[rows].float())
        yield functional.softplus(logits[pairs:] - logits[:pairs]).mean()


def _padded(rows: list[Ints]) -> tuple[Ints, Ints]:
    count = np.asarray([len(row) for row in rows], np.int64)
    table = np.zeros((len(rows), int(count.max(initial=0))), np.int64)
    for row, into in zip(rows, table, strict=True):
        into[: len(row)] = row
    return table, count
