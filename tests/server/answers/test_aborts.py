"""Aborting voted requests by their id, and two of one id: as SGLang does with ordinary requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.answers.conftest import groups_and_traces
from tests.server.answers.live import abort, ask, assert_nothing_is_left, begin, until
from tests.server.launch import Server

pytestmark = pytest.mark.server

TRACES = 6
RUNNING_REASON = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
Answer = dict[str, Any]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def long_body(rid: Any, traces: int = TRACES, **more: Any) -> dict[str, Any]:
    """A request that runs for long: of one prompt, or of as many as it has ids."""
    custom = {"custom_params": {"step": {"traces": traces}}} if traces else {}
    text: Any = "1;A+1" if isinstance(rid, str) else [f"1;A+{i}" for i in range(len(rid))]
    params = {"temperature": 1.0, "max_new_tokens": 1500, "ignore_eos": True, **custom}
    return {"text": text, "rid": rid, "sampling_params": params, **more}


def assert_aborted(answer: Answer, rid: str) -> None:
    info = answer["meta_info"]
    assert info["id"] == rid and info["finish_reason"]["type"] == "abort"
    assert info["step"]["vote"]["cancelled"] + info["step"]["vote"]["aborted"] == TRACES
    if info["finish_reason"]["message"] == "Abort in waiting queue":  # before its first token came
        assert info["completion_tokens"] == 0 and not answer["text"]
    else:
        assert info["finish_reason"] == RUNNING_REASON
        assert info["completion_tokens"] >= len(answer["output_ids"]) > 0 and answer["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_by_id_ends_the_group_and_answers_as_for_an_ordinary_request(
    server: Server, threads: ThreadPoolExecutor, stream: bool
) -> None:
    ordinary = threads.submit(ask, server, long_body("plain", traces=0, stream=stream))
    voted = begin(server, threads, long_body("voted", stream=stream), TRACES)
    time.sleep(3)  # until both have tokens to answer with
    abort(server, rid="plain")
    asked = abort(server, rid="voted")
    (status, alike, _), (voted_status, answer, came) = ordinary.result(), voted.result()
    assert status == voted_status == 200 and came - asked < 10
    assert answer["meta_info"]["finish_reason"] == alike["meta_info"]["finish_reason"]
    assert_aborted(answer, "voted")
    assert_nothing_is_left(server)


def test_a_chat_answer_says_aborted(server: Server, threads: ThreadPoolExecutor) -> None:
    chat = {
        "model": "default", "rid": "talk", "temperature": 1.0, "max_tokens": 1500,
        "ignore_eos": True, "messages": [{"role": "user", "content": "1;A+1"}],
        "custom_params": {"step": {"traces": TRACES}}, "return_meta_info": True,
    }  # fmt: skip
    future = threads.submit(server.post, "/v1/chat/completions", chat)
    until(lambda: groups_and_traces(server)[1] == TRACES)
    abort(server, rid="talk")
    choice = future.result().json()["choices"][0]
    assert choice["finish_reason"] == "abort"
    assert choice["meta_info"]["step"]["vote"]["traces"] == TRACES
    assert_nothing_is_left(server)


def test_an_abort_takes_along_what_the_id_is_a_prefix_of(
    server: Server, threads: ThreadPoolExecutor
) -> None:
    """SGLang's scheduler compares beginnings, once a request of exactly that id is live.

    Ids of its own are hexadecimal, so no letter up to f here.
    """
    bodies = [
        *(long_body(rid) for rid in ("p", "pq", "q")),
        *(long_body(rid, traces=0) for rid in ("plain", "quite plain")),
    ]
    futures = {body["rid"]: threads.submit(ask, server, body) for body in bodies}
    until(lambda: groups_and_traces(server)[1] == 3 * TRACES)
    time.sleep(0.5)
    for rid in ("r", "", "qu"):  # of no live request, so nothing happens
        abort(server, rid=rid)
    time.sleep(0.5)
    assert groups_and_traces(server)[1] == 3 * TRACES
    abort(server, rid="p")
    for rid in ("p", "pq"):
        assert_aborted(futures[rid].result()[1], rid)
    assert futures["plain"].result()[1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert not futures["q"].done() and not futures["quite plain"].done()
    abort(server, rid="q")
    assert_aborted(futures["q"].result()[1], "q")
    assert futures["quite plain"].result()[1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert_nothing_is_left(server)


def test_an_ordinary_request_takes_voted_ones_along(
    server: Server, threads: ThreadPoolExecutor
) -> None:
    ordinary = threads.submit(ask, server, long_body("x", traces=0))
    voted = begin(server, threads, long_body("xy"), TRACES)
    abort(server, rid="x")
    assert ordinary.result()[1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert_aborted(voted.result()[1], "xy")
    assert_nothing_is_left(server)


def test_one_prompt_of_a_batch_is_aborted(server: Server, threads: ThreadPoolExecutor) -> None:
    body = long_body(["one", "two", "three"])
    body["sampling_params"] = [dict(body["sampling_params"]) for _ in range(3)]
    body["sampling_params"][2]["custom_params"] = None
    future = begin(server, threads, body, 2 * TRACES)
    abort(server, rid="two")
    until(lambda: groups_and_traces(server) == (1, TRACES))
    assert not future.done()
    abort(server, rid="one")
    abort(server, rid="three")
    status, answers, _ = future.result()
    assert status == 200
    for answer, rid in zip(answers[:2], ("one", "two"), strict=True):
        assert_aborted(answer, rid)
    assert answers[2]["meta_info"]["id"] == "three" and "step" not in answers[2]["meta_info"]
    assert answers[2]["meta_info"]["finish_reason"]["message"] == "Aborted"
    # SGLang numbers the prompts of a batch that has a single id.
    numbered = begin(server, threads, {**body, "rid": "some"}, 2 * TRACES)
    for i in range(3):
        abort(server, rid=f"some_{i}")
    assert [a["meta_info"]["id"] for a in numbered.result()[1]] == ["some_0", "some_1", "some_2"]
    assert_nothing_is_left(server)


def test_abort_all(server: Server, threads: ThreadPoolExecutor) -> None:
    ordinary = threads.submit(ask, server, long_body("o", traces=0))
    voted = begin(server, threads, long_body("v"), TRACES)
    abort(server, abort_all=True)
    assert ordinary.result()[1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert_aborted(voted.result()[1], "v")
    assert_nothing_is_left(server)


def test_the_group_endpoint_ends_a_vote_too(server: Server, threads: ThreadPoolExecutor) -> None:
    body = long_body("grouped")
    body["sampling_params"]["custom_params"]["step"]["group"] = "mine"
    voted = begin(server, threads, body, TRACES)
    assert server.post("/step/abort_group", {"group": "mine"}).status_code == 200
    assert_aborted(voted.result()[1], "grouped")
    assert_nothing_is_left(server)


def test_an_abort_before_the_traces_begin(server: Server, threads: ThreadPoolExecutor) -> None:
    """While the server is paused, the request is known but none of its traces is."""
    for rid in ("soon", "soon stream"):
        stream = rid.endswith("stream")
        assert server.post("/pause_generation", {"mode": "in_place"}).status_code == 200
        try:
            future = threads.submit(ask, server, long_body(rid, stream=stream, return_logprob=True))
            time.sleep(1.0)
            assert not future.done()
            asked = abort(server, rid=rid)
            status, answer, came = future.result(timeout=20)
        finally:
            assert server.post("/continue_generation", {}).status_code == 200
        info = answer["meta_info"]
        assert status == 200 and came - asked < 10 and info["id"] == rid
        assert info["finish_reason"]["type"] == "abort" and answer["text"] == ""
        assert info["completion_tokens"] == 0 and answer["output_ids"] == []
        assert info["step"]["vote"]["cancelled"] == TRACES
        assert_nothing_is_left(server)


def test_aborts_at_any_moment(server: Server, threads: ThreadPoolExecutor) -> None:
    """However early it comes: every request is answered, and nothing goes on."""

    def one(i: int) -> tuple[int, Any, float]:
        gone = threading.Event()

        def keep_aborting() -> None:
            time.sleep(i * 0.01)
            while not gone.wait(0.01):
                abort(server, rid=f"when {i}")

        aborter = threading.Thread(target=keep_aborting)
        aborter.start()
        try:
            return ask(server, long_body(f"when {i}", stream=i % 2 == 0))
        finally:
            gone.set()
            aborter.join()

    for status, answer, _ in threads.map(one, range(12)):
        assert status == 200
        assert answer["meta_info"]["finish_reason"]["type"] == "abort", answer["meta_info"]
    assert_nothing_is_left(server)


def test_two_live_requests_of_one_id(server: Server, threads: ThreadPoolExecutor) -> None:
    plain = threads.submit(ask, server, long_body("p", traces=0))
    voted = begin(server, threads, long_body("v"), TRACES)
    stock = ask(server, long_body("p", traces=0))
    assert stock[0] == 400 and "Duplicate request ID detected: p" in json.dumps(stock[1])
    for rid, traces in (("p", TRACES), ("v", TRACES), ("v", 0)):
        status, answer, _ = ask(server, long_body(rid, traces))
        assert status == 400
        assert json.dumps(answer).replace(": v", ": p") == json.dumps(stock[1])
    status, answer, _ = ask(server, long_body(["new", "v"]))
    assert status == 400 and "Duplicate request ID detected: v" in json.dumps(answer)
    assert not plain.done() and not voted.done() and groups_and_traces(server)[1] == TRACES
    for rid in ("p", "v"):
        abort(server, rid=rid)
    assert plain.result()[0] == voted.result()[0] == 200
    # An id is free again once its request was answered, also when that was an error.
    short = {**long_body("v"), "text": "1;A+1"}
    short["sampling_params"] |= {"max_new_tokens": 4, "temperature": -1}
    assert ask(server, short)[0] == 400
    short["sampling_params"]["temperature"] = 1.0
    assert [ask(server, short)[0] for _ in range(2)] == [200, 200]
    assert_nothing_is_left(server)
