"""With STEP off, or not used by a request, outputs are those of stock SGLang, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.idle import free_tokens
from tests.server.launch import Server, serve

pytestmark = pytest.mark.server

GREEDY = {"temperature": 0, "max_new_tokens": 80, "ignore_eos": True}


def outputs(server: Server, **custom: Any) -> list[Any]:
    """Greedy answers: log-probabilities too where one request at a time makes the batches equal."""
    params = {**GREEDY, **custom}
    answers = []
    # A cached prefix changes the shapes of the prefill, and so the last bits.
    free_tokens(server)
    for start in range(4):
        answer = server.generate(
            input_ids=list(range(30 + start, 60)),
            sampling_params=params,
            return_logprob=True,
            top_logprobs_num=2,
        )
        info = answer["meta_info"]
        kept = ("output_token_logprobs", "output_top_logprobs", "finish_reason")
        answers.append([answer["output_ids"], answer["text"], *(info[key] for key in kept)])
    samples = server.generate(input_ids=list(range(30, 60)), sampling_params={**params, "n": 4})
    return [*answers, [[answer["output_ids"], answer["text"]] for answer in samples]]


@pytest.fixture(scope="module")
def stock(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a server without our plugin answers."""
    log = tmp_path_factory.mktemp("log") / "bare.log"
    with serve(models["qwen3"], log=log, SGLANG_PLUGINS="step_cpu") as server:
        found = outputs(server)
        assert "sglang.srt.managers.scheduler" not in server.log_text()
        return found


def test_outputs_with_step_are_identical_to_stock(
    models: dict[str, Path], scorer: Path, stock: list[Any], tmp_path: Path
) -> None:
    flags = ("--enable-step", "--step-scorer", str(scorer))
    with serve(models["qwen3"], *flags, log=tmp_path / "on.log") as server:
        assert "STEP: " in server.log_text()
        assert outputs(server, custom_params={"step": False}) == stock
        # Scoring itself changes nothing either.
        assert outputs(server, custom_params={"step": True}) == stock


@pytest.mark.full
def test_outputs_without_step_are_identical_to_stock(
    models: dict[str, Path], stock: list[Any], tmp_path: Path
) -> None:
    with serve(models["qwen3"], log=tmp_path / "off.log") as server:
        assert outputs(server) == stock
        assert "sglang.srt.managers.scheduler.Scheduler" not in server.log_text()
