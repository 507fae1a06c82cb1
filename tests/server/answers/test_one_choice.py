"""One voted choice for an ordinary request: the real `openai` client, /generate, streams."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import requests

from step_sglang.client import solve
from step_sglang.reasoner import Question, scorer_path
from step_sglang.scoring.scorer import load_scorer
from step_sglang.voting.answers import extract_boxed
from tests.server.answers.conftest import groups_and_traces, wait_until_empty
from tests.server.launch import Server

pytestmark = pytest.mark.server

TRACES = 8


def body(question: str, **step: Any) -> dict[str, Any]:
    return {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "temperature": 1.0,
        "max_tokens": 900,
        "skip_special_tokens": False,
        "custom_params": {"step": {"traces": TRACES, **step}},
    }


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def create(server: Server, question: str, *, stream: bool = False, **step: Any) -> Any:
    whole = body(question, **step)
    extra = {key: whole.pop(key) for key in ("custom_params", "skip_special_tokens")}
    if stream:
        whole |= {"stream": True, "stream_options": {"include_usage": True}}
    else:
        extra["return_meta_info"] = True
    return client(server).chat.completions.create(**whole, extra_body=extra)


def test_chat_returns_one_choice_and_its_vote(server: Server, question: Question) -> None:
    completion = create(server, question.question, early="off")
    assert len(completion.choices) == 1
    choice = completion.choices[0]
    step = choice.model_extra["meta_info"]["step"]
    vote = step["vote"]
    assert vote["status"] == "voted" and vote["vote"] == "calibrated" and vote["traces"] == TRACES
    assert vote["finished"] == TRACES and vote["cancelled"] == vote["pruned"] == 0
    assert choice.finish_reason == "stop" and not step["pruned"]
    assert extract_boxed(choice.message.content) == vote["answer"] == vote["answers"][0]["answer"]
    # Now and then a trace ends without an answer, and has no vote.
    assert TRACES - 2 <= sum(answer["count"] for answer in vote["answers"]) <= TRACES
    total = sum(answer["weight"] for answer in vote["answers"])
    assert vote["share"] == pytest.approx(vote["answers"][0]["weight"] / total)
    # The usage is that of all traces; the prompt counts once.
    assert completion.usage.completion_tokens > 3 * len(choice.message.content) / 4
    single = server.post(
        "/v1/chat/completions", {**body(question.question), "custom_params": None}
    ).json()
    assert completion.usage.prompt_tokens == single["usage"]["prompt_tokens"]
    assert completion.usage.completion_tokens > single["usage"]["completion_tokens"] * 2
    assert completion.id != choice.model_extra["meta_info"]["step"]["group"]


def test_a_calibrated_vote_weighs_what_the_scorer_file_says(
    server: Server, question: Question
) -> None:
    """By the server's own vote and by the client's, from the same file."""
    calibration = load_scorer(scorer_path()).info.calibration
    assert calibration is not None
    completion = create(server, question.question, vote="calibrated", traces=1)
    step = completion.choices[0].model_extra["meta_info"]["step"]
    assert step["calibration"] == list(calibration.pair)
    (only,) = step["vote"]["answers"]
    assert step["vote"]["vote"] == "calibrated"
    assert only["weight"] == pytest.approx(calibration.weight(step["score"]))
    result = solve(
        question.question, TRACES, url=server.url, vote="calibrated", early="off",
        sampling={"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 900},
    )  # fmt: skip
    for answer in result.answers:
        weights = [calibration.weight(result.traces[index].score) for index in answer.traces]
        assert answer.weight == pytest.approx(sum(weights))
        assert 0 < answer.weight <= len(answer.traces)


def test_the_server_ends_the_group_when_its_vote_is_decided(
    server: Server, question: Question
) -> None:
    vote: dict[str, Any] = {}
    for _ in range(8):  # traces that disagree decide it only with the last
        completion = create(server, question.question, vote="majority")
        vote = completion.choices[0].model_extra["meta_info"]["step"]["vote"]
        assert vote["finished"] + vote["cancelled"] == TRACES
        wait_until_empty(server)
        if vote["cancelled"]:
            break
    counts = [answer["count"] for answer in vote["answers"]] + [0]
    assert vote["cancelled"] > 0 and counts[0] > counts[1] + vote["cancelled"]


def test_streaming_sends_progress_comments_and_then_the_trace(
    server: Server, question: Question
) -> None:
    whole = {**body(question.question, early="off"), "stream": True}
    whole["custom_params"]["step"]["traces"] = 24
    lines = []
    with requests.post(
        f"{server.url}/v1/chat/completions", json=whole, stream=True, timeout=120
    ) as answer:
        assert answer.status_code == 200
        lines = [line.decode() for line in answer.iter_lines() if line]
    comments = [line for line in lines if line.startswith(":")]
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert comments and all(c.startswith(": step ") and "running" in c for c in comments)
    assert lines.index(comments[-1]) < lines.index(next(li for li in lines if li[:6] == "data: "))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in data)
    assert extract_boxed(text) is not None
    assert {chunk["choices"][0]["index"] for chunk in data} == {0}
    assert [c["choices"][0]["finish_reason"] for c in data][-1] == "stop"


def test_the_openai_client_reads_the_stream(server: Server, question: Question) -> None:
    chunks = list(create(server, question.question, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert extract_boxed(text) is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_completions_with_a_batch_of_prompts(server: Server, question: Question) -> None:
    prompts = [question.question, "1;A+1", "2;B+2"]
    rendered = [
        server.post(
            "/v1/tokenize",
            {"messages": [{"role": "user", "content": text}], "add_special_tokens": True},
        ).json()["tokens"]
        for text in prompts
    ]
    completion = client(server).completions.create(
        model="default",
        prompt=rendered,
        temperature=1.0,
        max_tokens=900,
        extra_body={
            "skip_special_tokens": False,
            "custom_params": {"step": {"traces": 4, "vote": "best"}},
        },
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert all(extract_boxed(choice.text) for choice in completion.choices)
    stream = client(server).completions.create(
        model="default",
        prompt=rendered[0],
        temperature=1.0,
        max_tokens=900,
        stream=True,
        extra_body={"skip_special_tokens": False, "custom_params": {"step": {"traces": 4}}},
    )
    assert extract_boxed("".join(chunk.choices[0].text for chunk in stream)) is not None


def generate(server: Server, question: str, **more: Any) -> dict[str, Any]:
    step = {"traces": 4, **more.pop("step", {})}
    return {
        "text": question,
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": 60,
            "custom_params": {"step": step},
            **more.pop("params", {}),
        },
        **more,
    }


def test_generate_single_batch_stream_and_log_probabilities(server: Server) -> None:
    one = server.generate(**generate(server, "1;A+1", return_logprob=True, rid="mine"))
    info = one["meta_info"]
    assert isinstance(one, dict) and info["id"] == "mine" and "index" not in one
    assert info["step"]["vote"]["status"] in ("voted", "no_answer")
    assert len(info["output_token_logprobs"]) == len(one["output_ids"])
    assert info["completion_tokens"] >= len(one["output_ids"])
    params = generate(server, "1;A+1")["sampling_params"]
    plain = {**params, "custom_params": None}
    both = server.generate(text=["1;A+1", "2;A+3"], sampling_params=[params, plain])
    assert "vote" in both[0]["meta_info"]["step"] and "step" not in both[1]["meta_info"]
    streamed = generate(server, "1;A+1", stream=True)
    with requests.post(f"{server.url}/generate", json=streamed, stream=True, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith(b"data: {")]
    assert len(lines) == 1
    assert json.loads(lines[0][6:])["meta_info"]["step"]["vote"]["traces"] == 4


def test_no_trace_with_an_answer_is_said(server: Server) -> None:
    found = server.generate(**generate(server, "1;A+1", params={"max_new_tokens": 3}))
    vote = found["meta_info"]["step"]["vote"]
    assert vote["status"] == "no_answer" and vote["answer"] is None and vote["share"] == 0
    assert found["meta_info"]["finish_reason"]["type"] == "length" and found["text"]


@pytest.mark.parametrize(
    ("step", "params", "words"),
    [
        ({"traces": 0}, {}, "from 1 to 4096"),
        ({"traces": "8"}, {}, "from 1 to 4096"),
        ({"vote": "loudest"}, {}, "weighted, majority, best"),
        ({"vote": ["weighted"]}, {}, "unknown vote"),
        ({"early": "soon"}, {}, "exact, posterior, off"),
        ({"early": "posterior", "threshold": 0.7}, {}, "below 0.5"),
        ({"extract": "regex"}, {}, "boxed, choice, number"),
        ({"colour": 1}, {}, "unknown members ['colour']"),
        ({}, {"n": 2}, "n = 1"),
        ({}, {"temperature": 0}, "above 0"),
        ({}, {"temperature": 1e-7}, "above 0"),
        ({}, {"temperature": -1}, "temperature"),
        ({"traces": None}, {}, "from 1 to 4096"),
    ],
)
def test_bad_input_is_a_400_that_says_why(
    server: Server, step: dict, params: dict, words: str
) -> None:
    wrong = generate(server, "1;A+1", step=step, params=params)
    answer = server.post("/generate", wrong)
    assert answer.status_code == 400 and words in answer.text
    chat = {**body("1;A+1"), "custom_params": wrong["sampling_params"]["custom_params"], **params}
    for stream in (False, True):
        answer = server.post("/v1/chat/completions", {**chat, "stream": stream})
        assert answer.status_code == 400 and words in answer.text
    assert groups_and_traces(server) == (0, 0)


def test_vote_without_traces_is_a_400(server: Server) -> None:
    params = {"max_new_tokens": 4, "custom_params": {"step": {"vote": "best"}}}
    answer = server.post("/generate", {"text": "1;A+1", "sampling_params": params})
    assert answer.status_code == 400 and "needs traces beside it" in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_the_group(
    server: Server, question: Question, stream: bool
) -> None:
    whole = {**body(question.question), "ignore_eos": True, "stream": stream, "max_tokens": 1500}
    url = f"{server.url}/v1/chat/completions"
    with ThreadPoolExecutor(1) as pool:

        def leave() -> None:
            with pytest.raises(requests.RequestException):
                answer = requests.post(url, json=whole, timeout=1.5, stream=stream)
                for line in answer.iter_lines():
                    if line.startswith(b":"):
                        answer.close()
                        raise requests.RequestException("left")

        left = pool.submit(leave)
        deadline = time.monotonic() + 20
        while groups_and_traces(server)[1] < TRACES and time.monotonic() < deadline:
            time.sleep(0.05)
        left.result()
    assert wait_until_empty(server) < 15


def test_a_request_in_the_background_goes_on_without_its_client(server: Server) -> None:
    """As without a vote: SGLang's responses API makes such requests."""
    params = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 1.0}
    whole = {
        "text": "1;A+1",
        "rid": "in the background",
        "background": True,
        "sampling_params": {**params, "custom_params": {"step": {"traces": TRACES}}},
    }
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(requests.post, f"{server.url}/generate", json=whole, timeout=3)
        while groups_and_traces(server)[1] < TRACES:
            assert not left.done(), "it did not begin"
        with pytest.raises(requests.RequestException):
            left.result()
    time.sleep(2)  # the server looks after its client several times a second
    assert groups_and_traces(server)[1] == TRACES
    assert server.post("/abort_request", {"rid": whole["rid"]}).status_code == 200
    assert wait_until_empty(server) < 15
