"""Voted turns of SGLang's sessions: a plain session goes on from the trace that won."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.server.answers.conftest import wait_until_empty
from tests.server.answers.live import abort, begin
from tests.server.launch import Server

pytestmark = pytest.mark.server

FIRST, SECOND, THIRD = [20, 21, 22, 23], [24, 25], [26]
TRACES = 4


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def open_session(server: Server, streaming: bool = False) -> str:
    body = {"capacity_of_str_len": 4096, "streaming": streaming}
    return str(server.post("/open_session", body).json())


def close(server: Server, session: str) -> None:
    assert server.post("/close_session", {"session_id": session}).status_code == 200
    wait_until_empty(server)


def body(
    session: str | None, tokens: list[int], *, traces: int = TRACES, **more: Any
) -> dict[str, Any]:
    """One turn; ``follows`` names the turn that it continues."""
    follows = more.pop("follows", None)
    custom = {"custom_params": {"step": {"traces": traces, "early": "off"}}} if traces else {}
    params = {
        "temperature": 1.0 if traces else 0.0, "max_new_tokens": 12, "ignore_eos": True,
        **custom, **more.pop("params", {}),
    }  # fmt: skip
    session_params = {"id": session, "rid": follows, **more.pop("how", {})}
    inside = {} if session is None else {"session_params": session_params}
    return {"input_ids": tokens, "sampling_params": params, **inside, **more}


def voted(answer: dict[str, Any]) -> dict[str, Any]:
    vote: dict[str, Any] = answer["meta_info"]["step"]["vote"]
    assert vote["traces"] == TRACES and vote["finished"] == TRACES
    return vote


def test_a_plain_session_goes_on_from_the_trace_that_won(server: Server) -> None:
    """Three turns, named by the client or by the server; then one that shows what it sees."""
    for named in (False, True):
        session = open_session(server)
        history: list[int] = []
        before = None
        for number, new in enumerate((FIRST, SECOND, THIRD)):
            name = {"rid": f"turn {number}"} if named else {}
            answer = server.generate(**body(session, new, follows=before, **name))
            voted(answer)
            before = answer["meta_info"]["id"]
            assert not named or before == f"turn {number}"
            history += new
            assert answer["meta_info"]["prompt_tokens"] == len(history)
            history += answer["output_ids"]
        greedy = server.generate(**body(session, THIRD, traces=0, follows=before))
        alone = server.generate(**body(None, history + THIRD, traces=0))
        assert greedy["meta_info"]["prompt_tokens"] == len(history) + len(THIRD)
        assert greedy["output_ids"] == alone["output_ids"]
        assert "step" not in greedy["meta_info"]
        close(server, session)


def test_ordinary_and_voted_turns_take_turns(server: Server) -> None:
    session = open_session(server)
    first = server.generate(**body(session, FIRST, traces=0))
    second = server.generate(**body(session, SECOND, follows=first["meta_info"]["id"]))
    voted(second)
    # A session is a tree: two turns may continue the same one, and drop what it said.
    for more in ({}, {"drop_previous_output": True}):
        follows = second["meta_info"]["id"]
        third = server.generate(**body(session, THIRD, follows=follows, how=more))
        voted(third)
        kept = 0 if more else 12
        expected = len(FIRST) + 12 + len(SECOND) + kept + len(THIRD)
        assert third["meta_info"]["prompt_tokens"] == expected
    close(server, session)


def test_an_unknown_turn_or_session_is_refused_as_ever(server: Server) -> None:
    session = open_session(server)
    for number in (0, TRACES):
        wrong = body(session, FIRST, traces=number, follows="nothing")
        answer = server.post("/generate", wrong)
        assert answer.status_code == 400 and "Invalid request session id" in answer.text
        answer = server.post("/generate", body("no session", FIRST, traces=number))
        assert answer.status_code == 400 and "does not exist" in answer.text
    close(server, session)
    answer = server.post("/generate", body(session, FIRST))
    assert answer.status_code == 400 and "does not exist" in answer.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_turn_is_aborted_in_between(
    server: Server, threads: ThreadPoolExecutor, streaming: bool
) -> None:
    """As in stock SGLang: a plain session goes on from its partial text, a streaming one not."""
    session = open_session(server, streaming)
    first = server.generate(**body(session, FIRST))
    long = {"max_new_tokens": 1500}
    name = f"long {streaming}"
    follows = None if streaming else first["meta_info"]["id"]
    turn = body(session, SECOND, follows=follows, params=long, rid=name)
    future = begin(server, threads, turn, 1 if streaming else TRACES)
    abort(server, rid=name)
    status, second, _ = future.result()
    assert status == 200 and second["meta_info"]["finish_reason"]["type"] == "abort"
    third = server.generate(**body(session, THIRD, follows=None if streaming else name))
    kept = len(FIRST) + len(first["output_ids"])
    if not streaming:
        voted(third)
        kept += len(SECOND) + len(second["output_ids"])
    assert third["meta_info"]["prompt_tokens"] == kept + len(THIRD)
    close(server, session)


def stream(server: Server, request: dict[str, Any]) -> list[dict[str, Any]]:
    answer = requests.post(f"{server.url}/generate", json={**request, "stream": True}, timeout=60)
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def assert_unvoted(answer: dict[str, Any], why: str) -> None:
    vote = answer["meta_info"]["step"]["vote"]
    assert vote["status"] == "not_voted" and why in vote["message"]
    assert vote["answer"] is None and vote["traces"] == 1
    assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] == 12


def test_a_streaming_session_is_answered_without_a_vote(server: Server) -> None:
    """Its memory belongs to one request at a time; the answer says that it was not voted."""
    session = open_session(server, streaming=True)
    history: list[int] = []
    for number, new in enumerate((FIRST, SECOND, THIRD)):
        request = body(session, new)
        answers = stream(server, request) if number == 1 else [server.generate(**request)]
        for answer in answers:
            assert answer["meta_info"]["step"]["vote"]["status"] == "not_voted"
        assert_unvoted(answers[-1], "streaming session")
        history += new
        assert answers[-1]["meta_info"]["prompt_tokens"] == len(history)
        history += answers[-1]["output_ids"]
    greedy = server.generate(**body(session, THIRD, traces=0))
    alone = server.generate(**body(None, history + THIRD, traces=0))
    assert greedy["output_ids"] == alone["output_ids"] and "step" not in greedy["meta_info"]
    wrong = body(session, THIRD)
    wrong["sampling_params"]["custom_params"]["step"]["vote"] = "loudest"
    refused = server.post("/generate", wrong)
    assert refused.status_code == 400 and "unknown vote" in refused.text
    close(server, session)
    # The same name may be that of a plain session later.
    named = {"capacity_of_str_len": 4096, "session_id": session}
    assert server.post("/open_session", named).json() == session
    voted(server.generate(**body(session, FIRST)))
    close(server, session)


def test_a_turn_that_replaces_another_is_answered_without_a_vote(server: Server) -> None:
    """Each of n traces would end those before it."""
    session = open_session(server)
    first = server.generate(**body(session, FIRST))
    follows = first["meta_info"]["id"]
    second = server.generate(**body(session, SECOND, follows=follows))
    replaced = server.generate(
        **body(session, THIRD, follows=follows, how={"replace": True}, rid="again")
    )
    assert_unvoted(replaced, "replace")
    expected = len(FIRST) + 12 + len(THIRD)
    assert replaced["meta_info"]["prompt_tokens"] == expected
    gone = server.post("/generate", body(session, THIRD, follows=second["meta_info"]["id"]))
    assert gone.status_code == 400 and "Invalid request session id" in gone.text
    voted(server.generate(**body(session, SECOND, follows="again")))
    close(server, session)
