"""SGLang itself on the GPU: default flags, a tight pool, scores against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from step_sglang.scoring import op
from tests.gpu.served import (
    NEW_TOKENS,
    TRACES,
    assert_near,
    build_cuda_model,
    build_cuda_scorer,
    sample,
)
from tests.server.launch import CUDA_PLATFORM, ON_CUDA, Server, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),  # the first start on a machine compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cuda_model(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cuda_scorer(tmp_path_factory.mktemp("scorer"))


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


def test_scores_and_pruning(server: Server, model: Path, scorer: Path) -> None:
    answers = sample(server, TRACES)
    infos = [answer["meta_info"] for answer in answers]
    assert sum(info["step"]["pruned"] for info in infos) >= TRACES // 4
    assert sum(info["num_retractions"] for info in infos) == 0
    assert assert_near(model, scorer, answers) > TRACES


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
