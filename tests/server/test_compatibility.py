"""SGLang's other features on a server that prunes meanwhile; the table of docs/compatibility.md."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.models import build_adapter, build_model
from tests.server.expected import assert_scores
from tests.server.idle import free_tokens
from tests.server.launch import Server, serve
from tests.server.pruned import (
    LOG_REQUESTS,
    POOL,
    PROMPT,
    TOKENS,
    TRACES,
    flush,
    group,
    nothing_is_left,
    paused,
    prunings,
    split,
    start,
    together,
)

pytestmark = [pytest.mark.server, pytest.mark.full]

LONG = 1000  # tokens of a trace, so that its group outlives what is done to the server meanwhile


@dataclass(frozen=True)
class Running:
    """A server with STEP on, and what its answers are compared with."""

    server: Server
    scorer: Path
    model: Path
    other: Path  # another random model of the same shape
    merged: Path  # the model with the adapter "adapter" in its weights


@pytest.fixture(scope="module")
def running(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("compatibility")
    model, merged = models["qwen3"], root / "merged"
    adapter = build_adapter(root / "adapter", model, merged)
    other = build_model(root / "other", seed=7)
    with serve(
        model,
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "64", "--enable-metrics", "--schedule-policy", "lpm"),
        *("--enable-mixed-chunk", "--chunked-prefill-size", "64", "--enable-streaming-session"),
        *("--enable-lora", "--lora-paths", f"adapter={adapter}", "--lora-backend", "torch_native"),
        *LOG_REQUESTS,
        log=root / "compatibility.log",
        PYTHONPATH=str(Path(__file__).parent / "unpinned"),
    ) as server:
        yield Running(server, scorer, model, other, merged)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture(autouse=True)
def nothing_leaks(running: Running) -> Iterator[None]:
    yield
    nothing_is_left(running.server)


def test_lora(running: Running, threads: ThreadPoolExecutor) -> None:
    """Traces of the base model and of an adapter in the same batches, each scored as its own."""
    adapted = threads.submit(
        group, running.server, n=16, step={"group": "l"}, body={"lora_path": "adapter"}
    )
    base = group(running.server, n=16, step={"group": "b"})
    for model, answers in ((running.merged, adapted.result()), (running.model, base)):
        split(answers, 16)
        steps = sum(assert_scores(model, running.scorer, PROMPT, a) for a in answers)
        assert steps > 16


def test_grammar(running: Running) -> None:
    """Every trace, pruned or not, is a beginning of what the grammar allows, and is scored."""
    answers = group(running.server, regex=r"([a-f]{2,9}\n\n){60}", ignore_eos=False)
    split(answers)
    begun = re.compile(r"([a-f]{2,9}\n\n)*[a-f]{0,9}\n?")
    assert all(begun.fullmatch(answer["text"]) for answer in answers)
    steps = sum(assert_scores(running.model, running.scorer, PROMPT, a) for a in answers)
    assert steps > TRACES


def test_logprobs(running: Running) -> None:
    body = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
    answers = group(running.server, body=body)
    split(answers)
    for answer in answers:
        info = answer["meta_info"]
        assert [token for _, token, _ in info["output_token_logprobs"]] == answer["output_ids"]
        assert all(logprob <= 0 for logprob, _, _ in info["output_token_logprobs"])
        assert [len(top) for top in info["output_top_logprobs"]] == [2] * len(answer["output_ids"])
        assert [token for _, token, _ in info["input_token_logprobs"]] == PROMPT


def test_chat_logprobs(running: Running) -> None:
    answer = running.server.post(
        "/v1/chat/completions",
        {
            "model": "default",
            "messages": [{"role": "user", "content": "1 + 1?"}],
            "n": TRACES,
            "temperature": 1.0,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 2,
            "return_meta_info": True,
        },
    )
    choices = answer.json()["choices"]
    assert len(choices) == TRACES
    assert {choice["finish_reason"] for choice in choices} == {"abort", "length"}
    for choice in choices:
        tokens = choice["meta_info"]["completion_tokens"]
        assert len(choice["logprobs"]["content"]) == tokens


def test_penalties(running: Running) -> None:
    """A strong penalty leaves hardly any token twice, also once the batch has lost traces."""
    plain, penalized = (
        split(group(running.server, n=TRACES, **params))[1]
        for params in ({}, {"repetition_penalty": 2.0, "frequency_penalty": 2.0})
    )

    def distinct(answers: list[dict]) -> float:
        return sum(len(set(a["output_ids"])) / len(a["output_ids"]) for a in answers) / len(answers)

    print(distinct(penalized), distinct(plain))
    assert distinct(penalized) > distinct(plain)


def test_stop_strings(running: Running) -> None:
    stops = {"stop": ["!\n\n"], "stop_regex": r"[xyz]{3}"}
    pruned, finished = split(group(running.server, n=48, **stops), 48)
    reasons = [answer["meta_info"]["finish_reason"] for answer in finished]
    assert {"stop"} <= {reason["type"] for reason in reasons}
    for answer in pruned + finished:
        assert "!\n\n" not in answer["text"]


def test_ordinary_requests_beside_pruning(running: Running, threads: ThreadPoolExecutor) -> None:
    """Each feature gives an ordinary request the same answer beside a pruned group as alone."""

    def ask(body: dict[str, Any]) -> list[int]:
        params = {"temperature": 0, "max_new_tokens": 40, **body["sampling_params"]}
        answer = running.server.generate(**{**body, "sampling_params": params}, input_ids=PROMPT)
        assert "step" not in answer["meta_info"]
        return answer["output_ids"]

    plain: dict[str, Any] = {"sampling_params": {}}
    said = ask(plain)
    bodies = [
        {"sampling_params": {"repetition_penalty": 2.0, "frequency_penalty": 1.5}},
        {"sampling_params": {"logit_bias": {"60": 100.0}}},
        {"sampling_params": {"stop_token_ids": [said[20]]}},
        {"sampling_params": {"regex": r"[a-f]{40}"}},
        {"sampling_params": {}, "lora_path": "adapter"},
    ]
    # The features matter, each in its way; these two change nothing.
    alone = [ask(body) for body in bodies]
    assert len({tuple(output) for output in [said, *alone]}) == len(bodies) + 1
    bodies += [plain, {**plain, "return_logprob": True, "top_logprobs_num": 2}]
    alone += [said, said]
    filling = start(running.server, threads, tokens=400)
    beside = list(threads.map(ask, bodies))
    assert not filling.done()
    split(filling.result())
    assert beside == alone


@pytest.mark.parametrize("streaming", [False, True])
def test_sessions(running: Running, threads: ThreadPoolExecutor, streaming: bool) -> None:
    """After a pruned turn a plain session keeps its text, and a streaming one rolls back."""
    sessions = []
    for _ in range(16):
        body = {"capacity_of_str_len": 4096, "streaming": streaming}
        sessions.append(running.server.post("/open_session", body).json())

    def turn(session: str, prompt: list[int], tokens: int, rid: str | None = None) -> dict:
        return running.server.generate(
            input_ids=prompt,
            session_params={"id": session, "rid": rid},
            sampling_params={
                "temperature": 1.0,
                "max_new_tokens": tokens,
                "ignore_eos": True,
                "custom_params": {"step": {"group": f"sessions {streaming} {tokens}"}},
            },
        )

    calls = [partial(turn, session, PROMPT, 240) for session in sessions]
    first = [future.result() for future in together(running.server, threads, calls)]
    pruned, _ = split(first, 16)
    if streaming:  # what an open session holds is no leak, but not free
        with pytest.raises(AssertionError, match=r"'num_used_tokens': [1-9]"):
            free_tokens(running.server, seconds=2)
    for session, answer in zip(sessions, first, strict=True):
        rid = None if streaming else answer["meta_info"]["id"]
        second = turn(session, [90, 91, 92], 4, rid)
        assert second["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
        kept = 0 if streaming and answer in pruned else len(PROMPT) + len(answer["output_ids"])
        assert second["meta_info"]["prompt_tokens"] == kept + 3
        closed = running.server.post("/close_session", {"session_id": session})
        assert closed.status_code == 200


def test_flush_cache_is_refused_while_traces_run(
    running: Running, threads: ThreadPoolExecutor
) -> None:
    future = start(running.server, threads, tokens=LONG)
    refused = flush(running.server)
    assert not future.done() and refused.status_code == 400
    split(future.result())


def test_pause_in_place(running: Running, threads: ThreadPoolExecutor) -> None:
    future = start(running.server, threads, tokens=LONG)
    with paused(running.server, "in_place"):
        time.sleep(0.5)
        before = prunings(running.server)
        time.sleep(1)
        assert prunings(running.server) == before and not future.done()
    answers = future.result()
    split(answers)
    for answer in answers:
        assert_scores(running.model, running.scorer, PROMPT, answer)


def test_pause_with_retraction(running: Running, threads: ThreadPoolExecutor) -> None:
    """Traces that lost their memory to a pause resume with their scores."""
    future = start(running.server, threads, tokens=LONG)
    with paused(running.server, "retract"):
        assert not future.done()
    answers = future.result()
    split(answers)
    assert any(answer["meta_info"]["num_retractions"] for answer in answers)
    for answer in answers:
        assert_scores(running.model, running.scorer, PROMPT, answer)


def test_pause_with_abort(running: Running, threads: ThreadPoolExecutor) -> None:
    future = start(running.server, threads, tokens=LONG)
    with paused(running.server, "abort"):
        answers = future.result()
    assert len(answers) == TRACES
    assert {a["meta_info"]["finish_reason"]["type"] for a in answers} == {"abort"}
    split(group(running.server))


def test_an_update_of_the_weights_flags_the_scorer(
    running: Running, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """In the middle of a group, as in training: it goes on with the new weights."""
    server = running.server

    def update(path: Path) -> bool:
        answer = server.post("/update_weights_from_disk", {"model_path": str(path)})
        return bool(answer.json()["success"])

    def stale() -> tuple[bool, float]:
        text = requests.get(f"{server.url}/metrics", timeout=60).text
        found = re.search(r"^step_scorer_stale\{.*\} ([\d.]+)$", text, re.MULTILINE)
        assert found is not None
        return server.info()["internal_states"][0]["step"]["scorer_stale"], float(found[1])

    assert not update(tmp_path)  # an empty folder
    assert stale() == (False, 0)
    assert "weights were updated" not in server.log_text()

    future = start(server, threads, tokens=LONG)
    try:
        with paused(server, "retract"):
            assert not future.done() and update(running.other)
        split(future.result())
        assert stale() == (True, 1)
        text = f"the scorer {str(running.scorer)!r} was trained for those before"
        assert text in server.log_text()
        answers = group(server)
        split(answers)
        for answer in answers:
            assert_scores(running.other, running.scorer, PROMPT, answer)
    finally:  # the tests beside this one want the first weights
        free_tokens(server)
        restored = update(running.model)
    assert restored
