"""Hidden states captured by the serving engine are those of transformers at the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from step_sglang.scoring.capture import decode
from tests.server.expected import hidden_states, step_positions
from tests.server.launch import Server, serve

pytestmark = [pytest.mark.server, pytest.mark.full]

PROMPT = list(range(40, 80))


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--enable-step", "--step-capture", "--max-total-tokens", "2500")
    log = tmp_path_factory.mktemp("log") / "capture.log"
    # Small chunks, so that the trace handed in is prefilled in several passes.
    with serve(models["qwen3"], *flags, "--chunked-prefill-size", "64", log=log) as running:
        yield running


def generate(server: Server, input_ids: list[int], new_tokens: int, n: int, **step) -> list[dict]:
    params = {
        "n": n,
        "max_new_tokens": new_tokens,
        "ignore_eos": True,
        "custom_params": {"step": {"hidden_states": True, **step}},
    }
    answers = server.generate(input_ids=input_ids, sampling_params=params)
    return answers if isinstance(answers, list) else [answers]


def test_captured_while_generating_and_again_from_the_finished_trace(
    server: Server, models: dict[str, Path]
) -> None:
    model = models["qwen3"]
    # More traces than the pool holds: while capturing, nothing is pruned.
    answers = generate(server, PROMPT, 150, 24)
    assert not any(answer["meta_info"]["step"]["pruned"] for answer in answers)
    total = 0
    for answer in answers[:8]:
        output, step = answer["output_ids"], answer["meta_info"]["step"]
        assert len(output) == 150
        steps = step_positions(model, output)
        assert step["positions"] == steps
        hidden = decode(step["hidden_states"])
        expected = hidden_states(model, PROMPT, output, steps)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4)

        again = generate(server, PROMPT + output[:-1], 1, 1, prompt_tokens=len(PROMPT))[0]
        step = again["meta_info"]["step"]
        assert step["positions"] == steps
        torch.testing.assert_close(decode(step["hidden_states"]), hidden, rtol=0, atol=1e-4)
        total += len(steps)

        again = generate(server, PROMPT + output[:-1], 1, 1, prompt_tokens=len(PROMPT))[0]
        step = again["meta_info"]["step"]
        assert step["positions"] == steps
        torch.testing.assert_close(decode(step["hidden_states"]), hidden, rtol=0, atol=1e-4)
    assert total > 5  # 36 expected of the random model


def test_bad_input(server: Server) -> None:
    for step, words in (
        ({"hidden_states": True, "prompt_tokens": 99}, "the input has only 40 tokens"),
        ({"hidden_states": True, "prompt_tokens": -1}, "an integer of tokens"),
        ({"prompt_tokens": 3}, "needs hidden_states"),
    ):
        body = {"input_ids": PROMPT, "sampling_params": {"custom_params": {"step": step}}}
        answer = server.post("/generate", body)
        assert answer.status_code == 400 and words in answer.text
