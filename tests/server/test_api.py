"""What users see: /generate, OpenAI chat, streaming, groups, bad input."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.server.expected import assert_scores
from tests.server.launch import Server

pytestmark = pytest.mark.server

PROMPT = list(range(50, 70))
NEW_TOKENS = 60
PARAMS = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(roomy: Server) -> Server:
    return roomy


def ask(server: Server, step: Any = None, **params: Any) -> Any:
    custom = {} if step is None else {"custom_params": {"step": step}}
    return server.generate(input_ids=PROMPT, sampling_params={**PARAMS, **custom, **params})


def test_parallel_samples_form_one_group_each_prompt(server: Server) -> None:
    answers = server.generate(input_ids=[PROMPT, PROMPT[:9]], sampling_params={**PARAMS, "n": 3})
    groups = [answer["meta_info"]["step"]["group"] for answer in answers]
    assert len(set(groups[:3])) == len(set(groups[3:])) == 1
    assert groups[0] != groups[3]
    assert "step_scores" not in answers[0]["meta_info"]["step"]


def test_requests_name_their_group(server: Server) -> None:
    step = {"group": "question 7", "step_scores": True}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask(server, step), range(3)))
    assert {answer["meta_info"]["step"]["group"] for answer in answers} == {"question 7"}
    assert sum(len(a["meta_info"]["step"]["step_scores"]) for a in answers) > 0


def test_session_params_say_what_a_router_drops(server: Server) -> None:
    """In /generate, also streamed, for several prompts, and in a chat."""
    session = {"step": {"group": "routed", "step_scores": True}}
    body = {"input_ids": PROMPT, "sampling_params": PARAMS, "session_params": session}
    sampling = {"max_new_tokens": 7}
    short = server.generate(**{**body, "session_params": {**session, "step_sampling": sampling}})
    assert short["meta_info"]["completion_tokens"] == 7
    alone = server.generate(**body)["meta_info"]["step"]
    assert alone["group"] == "routed" and "step_scores" in alone
    last = server.post("/generate", {**body, "stream": True}).text.split("data: ")[-2]
    assert json.loads(last)["meta_info"]["step"]["group"] == "routed"
    both = server.generate(**{**body, "input_ids": [PROMPT, PROMPT[:9]]})
    assert {answer["meta_info"]["step"]["group"] for answer in both} == {"routed"}
    asked = {
        "model": "m", "messages": [{"role": "user", "content": "how many?"}], "max_tokens": 30,
        "temperature": 1.0, "return_meta_info": True, "session_params": {"step": {"traces": 3}},
    }  # fmt: skip
    (choice,) = server.post("/v1/chat/completions", asked).json()["choices"]
    assert choice["meta_info"]["step"]["vote"]["traces"] == 3
    refused = server.post("/generate", {**body, "session_params": {"step": {"group": 7}}})
    assert refused.status_code == 400 and "custom_params.step.group" in refused.text
    refused = server.post("/generate", {**body, "session_params": {"step_sampling": 7}})
    assert refused.status_code == 400 and "must be an object of sampling" in refused.text
    for stream in (False, True):
        wrong = {**body, "session_params": {"step_sampling": {"n": "4"}}, "stream": stream}
        refused = server.post("/generate", wrong)
        assert stream or refused.status_code == 400
        assert "session_params.step_sampling: invalid type" in refused.text


def test_opting_out_and_ordinary_requests(server: Server) -> None:
    for answer in (*ask(server, False, n=3), ask(server), ask(server, False)):
        assert "step" not in answer["meta_info"]
    alone = ask(server, True)["meta_info"]
    assert alone["step"]["group"] == alone["id"]


def streamed(server: Server, params: dict[str, Any]) -> list[dict]:
    body = {"input_ids": PROMPT, "sampling_params": params, "stream": True}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as answer:
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]


def test_streaming_carries_the_score(server: Server, models: dict[str, Path], scorer: Path) -> None:
    params = {**PARAMS, "max_new_tokens": 200, "custom_params": {"step": {"step_scores": True}}}
    for _ in range(10):
        chunks = streamed(server, params)
        counts = [chunk["meta_info"]["step"]["num_steps"] for chunk in chunks]
        assert len(chunks) > 2 and counts == sorted(counts)
        assert "step_scores" not in chunks[0]["meta_info"]["step"]
        assert assert_scores(models["qwen3"], scorer, PROMPT, chunks[-1]) == counts[-1]
        if counts[-1] > counts[0]:
            return
    pytest.fail("a random model ends one trace in thirteen before its first step, not ten in ten")


def test_streaming_parallel_samples(server: Server) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {**PARAMS, "n": 3}, "stream": True}
    last: dict[int, dict] = {}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                last[chunk["index"]] = chunk["meta_info"]
    assert sorted(last) == [0, 1, 2]
    assert len({info["step"]["group"] for info in last.values()}) == 1
    assert all(info["finish_reason"]["type"] == "length" for info in last.values())


def test_openai_chat_returns_each_choice_with_its_trace(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    completion = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "What is 12 + 30?"}],
        n=4,
        max_tokens=NEW_TOKENS,
        temperature=1.0,
        extra_body={
            "return_meta_info": True,
            "ignore_eos": True,
            "custom_params": {"step": {"step_scores": True}},
        },
    )
    steps = [choice.model_extra["meta_info"]["step"] for choice in completion.choices]
    assert len(steps) == 4 and len({step["group"] for step in steps}) == 1
    assert all(len(step["step_scores"]) == step["num_steps"] for step in steps)


def test_openai_pruned_choices_have_finish_reason_abort(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
    completion = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "What is 12 + 30?"}],
        n=48,
        max_tokens=400,
        temperature=1.0,
        extra_body={"return_meta_info": True, "ignore_eos": True},
    )
    reasons = [choice.finish_reason for choice in completion.choices]
    pruned = [c.model_extra["meta_info"]["step"]["pruned"] for c in completion.choices]
    assert len(reasons) == 48 and set(reasons) == {"abort", "length"}
    assert pruned == [reason == "abort" for reason in reasons]


def test_completions_endpoint_groups_its_samples(server: Server) -> None:
    answer = server.post(
        "/v1/completions",
        {"model": "default", "prompt": "So", "n": 3, "max_tokens": 20, "temperature": 1.0},
    )
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 3


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (7, "not a int"),
        ("yes", "not a str"),
        ([], "not a list"),
        ({"group": ""}, "1 to 256 characters"),
        ({"group": "x" * 2**20}, "1048576 characters"),
        ({"group": 3}, "not a int"),
        ({"step_scores": "all"}, "step_scores must be true or false"),
        ({"colour": 1}, "unknown members ['colour']"),
        ({"hidden_states": True}, "needs a server started with --step-capture"),
    ],
)
def test_bad_input_is_a_400_that_says_why(server: Server, step: Any, words: str) -> None:
    for n in (1, 2):
        params = {**PARAMS, "n": n, "custom_params": {"step": step}}
        answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": params})
        assert answer.status_code == 400 and words in answer.text
    chat = {"model": "default", "messages": [{"role": "user", "content": "x"}], "n": 2}
    answer = server.post("/v1/chat/completions", {**chat, "custom_params": {"step": step}})
    assert answer.status_code == 400 and words in answer.text
    assert ask(server, True)["meta_info"]["step"]["num_steps"] >= 0


@pytest.mark.parametrize("step", [True, False, {"traces": 2}])
def test_a_prompt_without_tokens_is_a_400(server: Server, step: Any) -> None:
    """SGLang's scheduler would end with an IndexError."""
    params = {**PARAMS, "temperature": 1.0, "custom_params": {"step": step}}
    empty = {"input_ids": [], "sampling_params": params}
    for body in (empty, {**empty, "input_ids": [PROMPT, []]}):
        answer = server.post("/generate", body)
        assert answer.status_code == 400, answer.text
    assert ask(server, True)["meta_info"]["step"]["num_steps"] >= 0


@pytest.mark.parametrize("n", [4097, 10**9])
def test_more_samples_than_a_group_may_have_are_a_400(server: Server, n: int) -> None:
    """SGLang would copy the request as often, and find out that there is no memory."""
    body = {"input_ids": PROMPT, "sampling_params": {**PARAMS, "n": n}}
    answer = server.post("/generate", body)
    assert answer.status_code == 400 and "at most 4096 traces" in answer.text
    chat = {"model": "default", "messages": [{"role": "user", "content": "x"}], "n": n}
    answer = server.post("/v1/chat/completions", chat)
    assert answer.status_code == 400 and "at most 4096 traces" in answer.text


def test_beam_search_with_step_is_a_400(server: Server) -> None:
    params = {"max_new_tokens": 8, "beam_width": 2, "custom_params": {"step": True}}
    answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": params})
    assert answer.status_code == 400 and "beam search" in answer.text


@pytest.mark.parametrize("custom", [5, "abc", [1], [["step", True]]])
def test_custom_params_that_are_no_object(server: Server, custom: Any) -> None:
    for n in (1, 2):
        params = {**PARAMS, "n": n, "custom_params": custom}
        answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": params})
        assert answer.status_code == 400 and "custom_params must be an object" in answer.text


def test_streamed_traces_are_pruned_with_their_log_probabilities(server: Server) -> None:
    params = {**PARAMS, "n": 48, "max_new_tokens": 400}
    body = {"input_ids": PROMPT, "sampling_params": params, "stream": True, "return_logprob": True}
    last: dict[int, dict] = {}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                last[chunk["index"]] = chunk
    assert len(last) == 48
    pruned = [chunk for chunk in last.values() if chunk["meta_info"]["step"]["pruned"]]
    assert pruned
    for chunk in pruned:
        info = chunk["meta_info"]
        assert info["finish_reason"]["type"] == "abort"
        assert len(info["output_token_logprobs"]) == info["completion_tokens"]
        assert info["completion_tokens"] == len(chunk["output_ids"])


def standing(server: Server) -> tuple[int, int]:
    """Groups and live traces that the server knows of."""
    step = server.info()["internal_states"][0]["step"]
    return step["groups"], step["live_traces"]


def test_server_info_shows_the_configuration(server: Server, scorer: Path) -> None:
    step = server.info()["internal_states"][0]["step"]
    assert step["scorer"] == str(scorer) and step["policy"] == "fair"


def test_a_client_that_goes_away_leaves_no_trace_behind(server: Server) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {**PARAMS, "n": 8, "max_new_tokens": 3000}}
    with pytest.raises(requests.Timeout):
        requests.post(f"{server.url}/generate", json=body, timeout=2)
    deadline = time.monotonic() + 60
    while standing(server) != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert standing(server) == (0, 0)
