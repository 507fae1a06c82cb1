"""SGLang itself on the GPU: default flags, a tight pool, scores against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from step_sglang.scoring import op
from tests.models import build_scorer, build_tokenizer
from tests.server.expected import step_positions, step_scores
from tests.server.launch import CUDA_PLATFORM, ON_CUDA, Server, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),  # the first start on a machine compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]

HIDDEN = 512
PROMPT = list(range(40, 80))
TRACES, NEW_TOKENS = 64, 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of a shape that every attention backend takes."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scorer(tmp_path_factory.mktemp("scorer") / "scorer.safetensors", hidden=HIDDEN)


@pytest.fixture(scope="module")
def server(model: Path, scorer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model,
        *ON_CUDA,
        *("--enable-step", "--step-scorer", str(scorer)),
        *("--max-total-tokens", str(TRACES * NEW_TOKENS // 4)),
        log=tmp_path_factory.mktemp("log") / "cuda.log",
        **CUDA_PLATFORM,
    ) as running:
        yield running


def sample(server: Server, n: int) -> list[dict]:
    answers: list[dict] = server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": NEW_TOKENS,
            "ignore_eos": True,
            "custom_params": {"step": {"step_scores": True}},
        },
    )
    return answers


def test_scores_and_pruning(server: Server, model: Path, scorer: Path) -> None:
    """Every step has its score: near transformers' in float32, and far from its neighbour's."""
    answers = sample(server, TRACES)
    infos = [answer["meta_info"] for answer in answers]
    assert sum(info["step"]["pruned"] for info in infos) >= TRACES // 4
    assert sum(info["num_retractions"] for info in infos) == 0
    found, expected = [], []
    for answer in answers:
        step, output = answer["meta_info"]["step"], answer["output_ids"]
        positions = step_positions(model, output)
        assert step["positions"] == positions
        found += step["step_scores"]
        expected += step_scores(model, scorer, PROMPT, output, positions)
    assert len(found) > TRACES
    ours, theirs = torch.tensor(found), torch.tensor(expected)
    error = (ours - theirs).abs().mean()
    to_the_neighbour = (ours - theirs.roll(1)).abs().mean()
    print(f"{len(found)} steps, mean error {error:.5f}, to the neighbour's {to_the_neighbour:.5f}")
    assert error < to_the_neighbour / 10


def test_the_log_says_what_runs(server: Server) -> None:
    text = server.log_text()
    assert "STEP: the op's results are right: device" in text and "sm_" in text
    state = server.info()["internal_states"][0]["step"]
    assert state["passes_lost"] == 0 and state["failures"] == {} and state["stopped"] is None


def test_groups_that_follow_each_other(server: Server) -> None:
    """Slots and graphs are used again; small batches are padded to the graphs' sizes."""
    for n in (3, 1, 17, 40):
        for answer in sample(server, n):
            step = answer["meta_info"]["step"]
            assert step["num_steps"] == len(step["step_scores"])
    assert server.info()["internal_states"][0]["step"]["passes_lost"] == 0
