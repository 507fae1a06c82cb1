"""Computes step scores independently of the engine: transformers' own forward pass, float64 MLP."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_sglang.scoring.scorer import load_scorer


@lru_cache(maxsize=4)
def _model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@lru_cache(maxsize=4)
def _boundaries(folder: Path, delimiter: str) -> frozenset[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return frozenset(i for i in range(len(tokenizer)) if delimiter in tokenizer.decode([i]))


def step_positions(
    folder: Path,
    output: list[int],
    *,
    delimiter: str = "\n\n",
    think_end: str | None = "</think>",
) -> list[int]:
    """Output indices of the boundary tokens that were consumed: all but the last token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids(think_end) if think_end else None
    consumed = output[:-1]
    if stop in consumed:
        consumed = consumed[: consumed.index(stop)]
    boundaries = _boundaries(folder, delimiter)
    return [i for i, token in enumerate(consumed) if token in boundaries]


def hidden_states(
    folder: Path, prompt: list[int], output: list[int], positions: list[int]
) -> torch.Tensor:
    """[len(positions), D] final-norm hidden states at output tokens."""
    with torch.no_grad():
        hidden = _model(folder).model(torch.tensor([prompt + output])).last_hidden_state[0]
    return hidden[[len(prompt) + position for position in positions]]


def step_scores(
    folder: Path, scorer_file: Path, prompt: list[int], output: list[int], positions: list[int]
) -> list[float]:
    """The scorer's output at those tokens, in float64."""
    hidden = hidden_states(folder, prompt, output, positions).double()
    scorer = load_scorer(scorer_file)
    inner = torch.relu(hidden @ scorer.w1.double().T + scorer.b1.double())
    return torch.sigmoid(inner @ scorer.w2.double() + scorer.b2.double()).tolist()


def assert_scores(folder: Path, scorer_file: Path, prompt: list[int], answer: dict) -> int:
    """Check one answer's step scores and trace score; returns the number of steps."""
    step = answer["meta_info"]["step"]
    output = answer["output_ids"]
    positions = step_positions(folder, output)
    assert step["num_steps"] == len(positions) and step["positions"] == positions
    if not positions:
        assert step["score"] is None
        return 0
    expected = step_scores(folder, scorer_file, prompt, output, positions)
    torch.testing.assert_close(
        torch.tensor(step["step_scores"]), torch.tensor(expected), rtol=0, atol=1e-5
    )
    assert abs(step["score"] - sum(expected) / len(expected)) < 1e-5
    return len(expected)
