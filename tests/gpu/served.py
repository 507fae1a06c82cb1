"""Models, a scorer and requests of the tests that serve on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from tests.models import build_scorer, build_tokenizer
from tests.server.expected import step_positions, step_scores
from tests.server.launch import Server

HIDDEN = 512
PROMPT = list(range(40, 80))
TRACES, NEW_TOKENS = 64, 300


def build_cuda_model(folder: Path, kind: str = "qwen3") -> Path:
    """A random model in bfloat16, of a shape that every attention backend takes.

    ``kind`` is qwen3, llama or qwen3_moe.
    """
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    common = {
        "vocab_size": 320,
        "hidden_size": HIDDEN,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    config = {
        "qwen3": lambda: Qwen3Config(**common),
        "llama": lambda: LlamaConfig(**common),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256
        ),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def build_cuda_scorer(folder: Path) -> Path:
    """A random scorer that fits each of them."""
    return build_scorer(folder / "scorer.safetensors", hidden=HIDDEN)


def sample(server: Server, n: int, **sampling: Any) -> list[dict]:
    """The answers of a group."""
    answers = server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": NEW_TOKENS,
            "ignore_eos": True,
            "custom_params": {"step": {"step_scores": True}},
            **sampling,
        },
    )
    return answers if isinstance(answers, list) else [answers]


def assert_near(model: Path, scorer: Path, answers: list[dict]) -> int:
    """Every step has its score: near transformers' in float32, and far from its neighbour's.

    Returns:
        How many steps there were.
    """
    found: list[float] = []
    expected: list[float] = []
    for answer in answers:
        step, output = answer["meta_info"]["step"], answer["output_ids"]
        positions = step_positions(model, output)
        assert step["positions"] == positions
        found += step["step_scores"]
        expected += step_scores(model, scorer, PROMPT, output, positions)
    ours, theirs = torch.tensor(found), torch.tensor(expected)
    error = (ours - theirs).abs().mean()
    to_the_neighbour = (ours - theirs.roll(1)).abs().mean()
    print(f"{len(found)} steps, mean error {error:.5f}, to the neighbour's {to_the_neighbour:.5f}")
    assert error < to_the_neighbour / 10
    return len(found)
