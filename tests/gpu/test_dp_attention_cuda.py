"""Data-parallel attention with expert parallelism, on two GPUs: graphs, padding, idle ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.server.traces import victims

DEVICES = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),  # the first start on a machine compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cuda_model(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cuda_scorer(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module", params=[(), ("--ep-size", "2")], ids=["divided", "own-experts"])
def server(
    request: pytest.FixtureRequest,
    model: Path,
    scorer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    with serve(
        model,
        *ON_CUDA,
        *("--enable-step", "--step-scorer", str(scorer)),
        *("--max-total-tokens", str(TRACES * NEW_TOKENS // 4)),
        *("--tp-size", "2", "--attn-dp-size", "2", *request.param),
        log=tmp_path_factory.mktemp("log") / "dp.log",
        **CUDA_PLATFORM,
    ) as running:
        yield running


def test_both_prune_and_either_is_idle(server: Server, model: Path, scorer: Path) -> None:
    alone = sample(server, TRACES)
    with ThreadPoolExecutor(6) as threads:
        groups = [alone, *threads.map(lambda n: sample(server, n), (TRACES, 8, TRACES, 1, 40, 17))]
    for answers in groups:
        assert len({answer["meta_info"]["dp_rank"] for answer in answers}) == 1
        assert_near(model, scorer, answers)
    assert all(len(found) > 20 for found in victims(server).values())
    for internal in server.info()["internal_states"]:
        assert internal["step"]["passes_lost"] == 0 and internal["step"]["failures"] == {}
