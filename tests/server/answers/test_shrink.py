"""Votes that end the traces they do not need, and the dial, on the real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from step_sglang.client import TraceFate, solve
from step_sglang.reasoner import Question, scorer_path
from step_sglang.scoring.scorer import load_scorer
from step_sglang.voting.tally import Ballot, tally, weight_of
from tests.server.answers.conftest import wait_until_empty
from tests.server.answers.live import assert_nothing_is_left
from tests.server.launch import Server

pytestmark = pytest.mark.server

TRACES = 16
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 900}


def body(question: str, **step: Any) -> dict[str, Any]:
    return {
        "text": question,
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": 900,
            "skip_special_tokens": False,
            "custom_params": {"step": {"traces": TRACES, **step}},
        },
    }


def prompt(server: Server, question: Question) -> list[int]:
    chat = {"messages": [{"role": "user", "content": question.question}]}
    tokens: list[int] = server.post("/v1/tokenize", chat).json()["tokens"]
    return tokens


def pruned_for_votes(server: Server) -> float:
    lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("step_traces_pruned_total{") and 'reason="shrink"' in line
    )


def test_a_vote_ends_those_that_it_does_not_need(server: Server, question: Question) -> None:
    before = pruned_for_votes(server)
    whole = body("", early="off", shrink=0.4)
    del whole["text"]
    votes = []
    for _ in range(6):  # traces that disagree are all needed
        answer = server.generate(input_ids=prompt(server, question), **whole)
        votes.append(answer["meta_info"]["step"]["vote"])
        wait_until_empty(server)
        if votes[-1]["shrunk"]:
            break
    vote = votes[-1]
    assert vote["shrunk"] > 0
    assert vote["finished"] + vote["shrunk"] == TRACES and vote["finished"] >= 2
    counts = [one["count"] for one in vote["answers"]]
    assert vote["answer"] == vote["answers"][0]["answer"] and sum(counts) <= vote["finished"]
    # Some may have finished before they heard of it; those that were ended say why.
    assert 0 < pruned_for_votes(server) - before <= sum(one["shrunk"] for one in votes)
    assert_nothing_is_left(server)


def test_solve_shrinks_and_every_trace_says_how_it_ended(
    server: Server, question: Question
) -> None:
    for _ in range(6):
        result = solve(
            question.question, TRACES, url=server.url, early="off", shrink=0.4, sampling=SAMPLING
        )
        shrunk = [trace for trace in result.traces if trace.fate is TraceFate.SHRUNK]
        if shrunk:
            break
    assert shrunk and result.early
    finished = [trace for trace in result.traces if trace.fate is TraceFate.FINISHED]
    assert len(shrunk) + len(finished) == TRACES
    by = load_scorer(scorer_path()).info.calibration
    cast = [Ballot(t.answer, weight_of(t.score, "calibrated", by)) for t in finished if t.answer]
    assert result.answer == tally(cast)[0].answer  # of those alone that finished
    told = [trace for trace in shrunk if trace.finish_reason is not None]
    assert all(trace.finish_reason == "abort" for trace in told)
    assert_nothing_is_left(server)


def test_one_trace_of_a_group_is_ended_by_its_id(server: Server, question: Question) -> None:
    step = {"step_scores": True}
    sent = {
        "input_ids": prompt(server, question),
        "stream": True,
        "sampling_params": {
            "n": 4,
            "temperature": 1.0,
            "max_new_tokens": 600,
            "ignore_eos": True,
            "stream_interval": 4,
            "custom_params": {"step": step},
        },
    }
    last: dict[int, dict[str, Any]] = {}
    ended = None
    with requests.post(f"{server.url}/generate", json=sent, stream=True, timeout=120) as answer:
        for line in answer.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            last[chunk["index"]] = chunk
            if ended is None and len(last) == 4:
                ended = last[2]["meta_info"]["id"]
                reply = server.post("/step/end_traces", {"traces": [ended, "nobody's"]})
                assert reply.status_code == 200 and reply.json() == {"ended": 1}
    info = last[2]["meta_info"]
    assert info["id"] == ended
    assert info["step"]["pruned"] and info["step"]["reason"] == "shrink"
    assert info["finish_reason"]["type"] == "abort"
    assert info["finish_reason"]["message"].startswith("pruned by STEP")
    assert 0 < info["completion_tokens"] < 600
    for index in (0, 1, 3):
        others = last[index]["meta_info"]
        assert others["finish_reason"]["type"] == "length" and others["completion_tokens"] == 600
    assert_nothing_is_left(server)


@pytest.mark.parametrize(
    "wrong", [b"{", b"[]", b'{"traces": "r1"}', b'{"traces": [1]}', b'{"traces": [], "more": 1}']
)
def test_what_is_no_list_of_traces(server: Server, wrong: bytes) -> None:
    reply = requests.post(f"{server.url}/step/end_traces", data=wrong, timeout=60)
    assert reply.status_code == 400 and "traces" in reply.json()["error"]["message"]


def test_the_dial(server: Server, question: Question) -> None:
    for effort in ("fast", 0.7, "thorough"):
        whole = body("", effort=effort)
        del whole["text"]
        answer = server.generate(input_ids=prompt(server, question), **whole)
        vote = answer["meta_info"]["step"]["vote"]
        assert vote["status"] == "voted", vote
        wait_until_empty(server)
    result = solve(question.question, 8, url=server.url, effort="fast", sampling=SAMPLING)
    assert result.answer is not None
    for wrong in ("fats", 2, None, True):
        refused = server.post("/generate", body("1;A+1", effort=wrong))
        assert refused.status_code == 400
        assert "effort must be fast, balanced, thorough or a number" in refused.text
    assert server.post("/generate", body("1;A+1", shrink=0.7)).status_code == 400


def test_a_group_holds_no_more_than_its_share(server: Server, question: Question) -> None:
    pool = server.info()["max_total_num_tokens"]
    share = 1500 / pool
    answers = server.generate(
        input_ids=prompt(server, question),
        sampling_params={
            "n": 12,
            "temperature": 1.0,
            "max_new_tokens": 300,
            "ignore_eos": True,
            "custom_params": {"step": {"prune_at": share, "min_survivors": 2}},
        },
    )
    steps = [answer["meta_info"]["step"] for answer in answers]
    assert {step.get("reason") for step in steps if step["pruned"]} == {"watermark"}
    left = [a for a in answers if not a["meta_info"]["step"]["pruned"]]
    assert 2 <= len(left) <= 5  # of 300 tokens each, five fill the share
    assert all(answer["meta_info"]["completion_tokens"] == 300 for answer in left)
    assert_nothing_is_left(server)
