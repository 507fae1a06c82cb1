"""The hierarchical cache on the GPU, with SGLang's own host pool and copies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from step_sglang.scoring import op
from tests.gpu.served import (
    NEW_TOKENS,
    PROMPT,
    TRACES,
    assert_near,
    build_cuda_model,
    build_cuda_scorer,
    sample,
)
from tests.server.idle import free_tokens, step_state
from tests.server.launch import CUDA_PLATFORM, ON_CUDA, Server, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),  # the first start on a machine compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]

POOL = TRACES * NEW_TOKENS // 4
LONG = [[40 + (i * step + step) % 200 for i in range(1500)] for step in (1, 3, 7, 11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cuda_model(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cuda_scorer(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module", params=["write_through"])
def server(
    request: pytest.FixtureRequest,
    model: Path,
    scorer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    with serve(
        model,
        *ON_CUDA,
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--enable-hierarchical-cache", "--hicache-ratio", "4", "--page-size", "16"),
        *("--hicache-write-policy", request.param, "--enable-cache-report"),
        log=tmp_path_factory.mktemp("log") / "host-cache.log",
        **CUDA_PLATFORM,
    ) as running:
        yield running


def ask(server: Server, prompt: list[int]) -> int:
    """Tokens of a prompt that came from the host."""
    params = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    info = server.generate(input_ids=prompt, sampling_params=params)["meta_info"]
    return int((info.get("cached_tokens_details") or {}).get("host", 0))


def test_what_comes_back_counts_in_the_room_that_pruning_makes(
    server: Server, model: Path, scorer: Path
) -> None:
    before = free_tokens(server)
    for prompt in (*LONG, PROMPT):
        ask(server, prompt)
    with ThreadPoolExecutor(4) as threads:
        group = threads.submit(sample, server, TRACES)
        loaded = sum(threads.map(lambda i: ask(server, LONG[i % 4]), range(12)))
        answers = group.result()
    assert loaded > 0
    assert 0 < sum(answer["meta_info"]["step"]["pruned"] for answer in answers) < TRACES
    assert assert_near(model, scorer, answers) > TRACES
    assert free_tokens(server) == before
    said = step_state(server)
    assert said["passes_lost"] == 0 and said["failures"] == {}
