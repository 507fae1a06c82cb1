"""SGLang's other features on a server that prunes: one of each kind of docs/compatibility.md.

All of them are in test_compatibility.py, which `make test-all` runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.expected import assert_scores
from tests.server.launch import Server
from tests.server.pruned import PROMPT, group, nothing_is_left, paused, split, start

pytestmark = pytest.mark.server


@pytest.fixture
def server(crowded: Server) -> Iterator[Server]:
    yield crowded
    nothing_is_left(crowded)


def test_log_probabilities(server: Server) -> None:
    """What a request asks for of every token: pruned traces have it up to their last."""
    answers = group(server, body={"return_logprob": True, "top_logprobs_num": 2})
    split(answers)
    for answer in answers:
        info = answer["meta_info"]
        assert [token for _, token, _ in info["output_token_logprobs"]] == answer["output_ids"]
        assert [len(top) for top in info["output_top_logprobs"]] == [2] * len(answer["output_ids"])


def test_penalties(server: Server) -> None:
    """State that SGLang keeps for the whole batch: it loses the rows of pruned traces."""
    plain, penalized = (
        split(group(server, **params))[1]
        for params in ({}, {"repetition_penalty": 2.0, "frequency_penalty": 2.0})
    )

    def distinct(answers: list[dict]) -> float:
        return sum(len(set(a["output_ids"])) / len(a["output_ids"]) for a in answers) / len(answers)

    assert distinct(penalized) > distinct(plain)


def test_a_pause_with_retraction(server: Server, models: dict[str, Path], scorer: Path) -> None:
    """What is done to the whole server: traces resume with their scores."""
    with ThreadPoolExecutor(1) as threads:
        future = start(server, threads, tokens=600)
        with paused(server, "retract"):
            assert not future.done()
        answers = future.result()
    split(answers)
    assert any(answer["meta_info"]["num_retractions"] for answer in answers)
    for answer in answers:
        assert_scores(models["qwen3"], scorer, PROMPT, answer)
