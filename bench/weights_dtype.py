"""How much a step score changes when the scorer's W1 is rounded to bfloat16.

    python bench/weights_dtype.py

Scores random hidden states of unit variance with W1 in float32 and in bfloat16, through the op.
Prints the difference's mean, its 99th percentile and its largest value, beside what rounding the
hidden states themselves to bfloat16 changes, as a model that computes in it does, and beside the
spread of the scores.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace

import torch

from step_sglang.reasoner import scorer_path
from step_sglang.scoring.boundary import bitmap
from step_sglang.scoring.scorer import Scorer, load_scorer
from step_sglang.scoring.slots import SlotReset, SlotState

ROWS, BATCH = 16384, 512


def random_scorer(dim: int) -> Scorer:
    """As torch initialises the MLP of the paper, with an output layer that spreads the scores."""
    generator = torch.Generator().manual_seed(0)
    w1 = (torch.rand(512, dim, generator=generator) * 2 - 1) / dim**0.5
    b1 = (torch.rand(512, generator=generator) * 2 - 1) / dim**0.5
    w2 = torch.randn(512, generator=generator) / 512**0.5 * 6
    return Scorer(w1, b1, w2, torch.zeros(1))


def scores(scorer: Scorer, hidden: torch.Tensor) -> torch.Tensor:
    """[N] step scores of hidden states [N, D], through the op."""
    slots = SlotState(BATCH, scorer, bitmap([7]), None, torch.device("cpu"))
    ids, positions = torch.full((BATCH,), 7), torch.full((BATCH,), 9)
    found = []
    for part in hidden.split(BATCH):
        slots.reset([SlotReset(slot, score_from=0) for slot in range(BATCH)])
        slots.score(part, None, torch.arange(BATCH), ids, positions)
        found.append(slots.results(BATCH)[:, 0])
    return torch.cat(found)


def main() -> None:
    """Print the table."""
    print(f"python {shlex.join(sys.argv)}\n")
    print("scorer        D  rounded        mean      99 %      largest   spread of scores")
    for name, scorer in (
        ("embedded", load_scorer(scorer_path())),
        ("random", random_scorer(4096)),
    ):
        rounded = replace(scorer, w1=scorer.w1.to(torch.bfloat16))
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(ROWS, scorer.hidden_size, generator=generator)
        exact = scores(replace(scorer, w1=scorer.w1.float()), hidden)
        for what, found in (
            ("W1", scores(rounded, hidden)),
            ("hidden states", scores(scorer, hidden.to(torch.bfloat16))),
        ):
            d = (found - exact).abs()
            print(
                f"{name:8} {scorer.hidden_size:6}  {what:13}  {d.mean():.1e}   "
                f"{d.quantile(0.99):.1e}   {d.max():.1e}   {exact.std():.3f}"
            )


if __name__ == "__main__":
    main()
