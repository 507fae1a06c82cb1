"""Speculative decoding on the GPU, with graphs and, as SGLang then runs it, the overlap loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from tests.models import build_eagle_draft
from tests.server.idle import free_tokens, step_state
from tests.server.launch import CUDA_PLATFORM, ON_CUDA, Server, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),  # the first start on a machine compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]

DRAFTS = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
          "--speculative-num-draft-tokens", "4")  # fmt: skip
TREES = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "4",
         "--speculative-num-draft-tokens", "8")  # fmt: skip
CONFIGURATIONS = {
    "ngram": ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6"),
    "standalone": ("--speculative-algorithm", "STANDALONE", *DRAFTS),
    "eagle": ("--speculative-algorithm", "EAGLE", *DRAFTS),
    "eagle-trees": ("--speculative-algorithm", "EAGLE", *TREES),
}


@dataclass(frozen=True)
class Speculating:
    """A server with a draft, and what it serves."""

    server: Server
    model: Path
    scorer: Path
    name: str


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def speculating(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Speculating]:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    model = build_cuda_model(folder / "model", "llama")
    scorer = build_cuda_scorer(folder)
    draft: tuple[str, ...] = ()
    if name == "standalone":  # its own draft: nearly all that it drafts is accepted
        draft = ("--speculative-draft-model-path", str(model))
    elif name.startswith("eagle"):
        draft = ("--speculative-draft-model-path", str(build_eagle_draft(folder / "draft", model)))
    with serve(
        model,
        *ON_CUDA,
        *("--enable-step", "--step-scorer", str(scorer)),
        *("--max-total-tokens", str(TRACES * NEW_TOKENS // 4)),
        *("--max-running-requests", str(TRACES), *CONFIGURATIONS[name], *draft),
        log=folder / "server.log",
        **CUDA_PLATFORM,
    ) as server:
        yield Speculating(server, model, scorer, name)


def test_every_accepted_token_is_scored_once(speculating: Speculating) -> None:
    server = speculating.server
    before = free_tokens(server)
    answers = sample(server, TRACES)
    infos = [answer["meta_info"] for answer in answers]
    assert 0 < sum(info["step"]["pruned"] for info in infos) < TRACES
    assert assert_near(speculating.model, speculating.scorer, answers) > TRACES
    assert free_tokens(server) == before
    said = step_state(server)
    assert said["passes_lost"] == said["steps_unscored"] == 0 and said["failures"] == {}


def test_the_text_of_many_accepted_drafts(speculating: Speculating) -> None:
    """Greedy, and twice: what was drafted from the first answer is accepted in the second."""
    answers = [sample(speculating.server, 1, temperature=0)[0] for _ in range(2)]
    assert_near(speculating.model, speculating.scorer, answers)
    if not speculating.name.startswith("eagle"):
        assert answers[1]["meta_info"]["spec_num_correct_drafts"] > NEW_TOKENS / 10


def test_it_overlaps_with_the_op_in_its_graphs(speculating: Speculating) -> None:
    """A start whose verify graphs lack the op is refused, see `forward.capture_one_shape`."""
    assert not speculating.server.info()["disable_overlap_schedule"]
    assert "STEP: the op's results are right: device" in speculating.server.log_text()
