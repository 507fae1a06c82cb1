"""A server without a scorer: the model's own certainty scores the steps, and all else is STEP's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from step_sglang.reasoner import model_path, questions
from step_sglang.reasoner.tokenizer import build_tokenizer, prompt_text
from tests.server.idle import idle_free_tokens
from tests.server.launch import Server, serve

pytestmark = pytest.mark.server

N = 24
QUESTION = questions("test", 1, seed=11)[0].question


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", "none", "--enable-metrics"),
        *("--max-total-tokens", "700"),
        log=tmp_path_factory.mktemp("log") / "no-scorer.log",
    ) as running:
        yield running


def sample(
    server: Server, n: int, step: Any, tokens: int = 400, **more: Any
) -> list[dict[str, Any]]:
    answers = server.generate(
        text=prompt_text(QUESTION),
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "custom_params": {"step": step},
        },
        **more,
    )
    return [{**answer["meta_info"], "ids": answer["output_ids"]} for answer in answers]


def expected_scores(info: dict[str, Any]) -> list[float]:
    """By the definition, from SGLang's own log-probabilities of the likeliest tokens."""
    likeliest = [entry[0][0] for entry in info["output_top_logprobs"]]
    starts = [0, *(place + 1 for place in info["step"]["positions"])]
    return [
        math.exp(min(likeliest[start : end + 1]))
        for start, end in zip(starts, info["step"]["positions"], strict=False)
    ]


def test_a_steps_score_is_the_probability_at_its_least_certain_token(server: Server) -> None:
    # Both fit in the pool, however long they become.
    infos = sample(server, 2, {"step_scores": True}, 300, return_logprob=True, top_logprobs_num=1)
    assert sum(info["step"]["num_steps"] for info in infos) > 5
    for info in infos:
        step = info["step"]
        assert not step["pruned"] and step["num_steps"]
        assert step["step_scores"] == pytest.approx(expected_scores(info), abs=1e-4)
        assert step["score"] == pytest.approx(math.fsum(step["step_scores"]) / step["num_steps"])
        assert min(step["step_scores"]) < 0.999  # or no trace could be told from another


def scores_at(step: dict[str, Any], moment: float) -> list[float]:
    """Trace scores that it may have had then: a step that ends about then may count already."""
    times, found = step["record"]["token_times"], step["step_scores"]
    sure, perhaps = (
        sum(
            place + lag < len(times) and times[place + lag] <= moment for place in step["positions"]
        )
        for lag in (2, 0)
    )
    return [math.fsum(found[:k]) / k for k in range(max(sure, 1), perhaps + 1) if k <= len(found)]


def test_the_least_certain_is_pruned_when_memory_is_short(server: Server) -> None:
    before = idle_free_tokens(server)
    infos = sample(server, N, {"record": True, "step_scores": True})
    steps = [info["step"] for info in infos]
    pruned = [step for step in steps if step["pruned"]]
    assert 0 < len(pruned) < N and {step["reason"] for step in pruned} == {"decode"}
    compared = 0
    for victim in pruned:
        if not victim["num_steps"]:  # it ranks as the mean
            continue
        moment = victim["record"]["token_times"][-1]
        for other in steps:
            if other["record"]["token_times"][-1] > moment and (at := scores_at(other, moment)):
                compared += 1
                assert victim["score"] <= max(at) + 1e-9
    assert compared > N
    assert sum(info["num_retractions"] for info in infos) == 0
    assert idle_free_tokens(server) == before


def test_one_choice_is_voted_by_certainty(server: Server) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 1.0,
        "max_tokens": 400,
        "return_meta_info": True,
        "custom_params": {"step": {"traces": 16, "min_survivors": 4, "early": "posterior"}},
    }
    answer = server.post("/v1/chat/completions", body).json()
    (choice,) = answer["choices"]
    vote = choice["meta_info"]["step"]["vote"]
    assert vote["answer"] is not None
    assert "\\boxed{" + vote["answer"] + "}" in choice["message"]["content"]
    weights = [found["weight"] for found in vote["answers"]]
    # The sum of trace scores, not the number of traces.
    assert any(abs(weight - round(weight)) > 1e-3 for weight in weights)


def test_other_methods_run_beside_it(server: Server) -> None:
    step = {"baseline": {"name": "deepconf", "window": 20}, "record": True, "step_scores": True}
    infos = sample(server, 2, step, return_logprob=True, top_logprobs_num=20)
    for info in infos:
        expected = [
            -math.fsum(entry[0] for entry in top) / len(top) for top in info["output_top_logprobs"]
        ]
        assert info["step"]["record"]["confidences"] == pytest.approx(expected, abs=1e-4)
        assert info["step"]["step_scores"] == pytest.approx(expected_scores(info), abs=1e-4)


def test_the_server_says_that_it_has_no_scorer(server: Server) -> None:
    sample(server, 2, True)
    state = server.info()["internal_states"][0]["step"]
    assert state["scorer"] == "none"
    assert state["steps_unscored"] == state["passes_lost"] == 0
    assert state["failures"] == {} and state["stopped"] is None
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert "step_steps_scored_total" in text and "step_score_bucket" in text


def test_ordinary_requests_carry_nothing_of_it(server: Server) -> None:
    answer = server.generate(
        text=prompt_text(QUESTION), sampling_params={"temperature": 0.0, "max_new_tokens": 20}
    )
    assert "step" not in answer["meta_info"]
    assert len(build_tokenizer()(answer["text"])["input_ids"]) == 20


def test_branches_are_scored_by_certainty_too(server: Server) -> None:
    before = idle_free_tokens(server)
    infos = sample(server, N, {"refill": "best", "step_scores": True})
    by_name = {info["step"].get("branch", {}).get("name", info["id"]): info for info in infos}
    branches = [info["step"] for info in infos if "branch" in info["step"]]
    assert branches
    own: list[float] = []
    for step in branches:
        (*_, (parent, steps)) = step["branch"]["lineage"]
        own += step["step_scores"][steps:]
        if parent in by_name:  # the step that ends at the boundary is scored again, as it was
            theirs = by_name[parent]["step"]["step_scores"][:steps]
            assert step["step_scores"][:steps] == pytest.approx(theirs, abs=1e-6)
    assert len({round(score, 6) for score in own}) > 1 and all(0 < score <= 1 for score in own)
    assert idle_free_tokens(server) == before
