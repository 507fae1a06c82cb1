"""Pruned choices for clients with types: the strict `openai` client, on a pool too small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from tests.server.launch import Server, serve
from tests.server.pruned import POOL, nothing_is_left, together

pytestmark = pytest.mark.server

N, LETTERS = 24, 120  # about one token each: twice the pool
LENGTH = {"custom_params": {"step": {"pruned": "length"}}}
OMIT = {"custom_params": {"step": {"pruned": "omit"}}}
ABORT = {"custom_params": {"step": {"pruned": "abort"}}}
CHAT: dict[str, Any] = {
    "model": "default",
    "messages": [{"role": "user", "content": "What is 12 + 30?"}],
    "n": N,
    "max_tokens": 400,
    "temperature": 1.0,
}
# A random model would fill its limit with the white space that JSON allows.
MORE = ("--max-running-requests", "64", "--constrained-json-disable-any-whitespace")
PATTERN = f"[a-z]{{{LETTERS}}}"


class Word(pydantic.BaseModel):
    """A choice that ends by itself, after many tokens."""

    word: str = pydantic.Field(pattern=f"^{PATTERN}$")


@pytest.fixture(scope="module")
def server(crowded: Server) -> Server:
    return crowded


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """It validates every answer against its types."""
    yield openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300,
        _strict_response_validation=True,
    )  # fmt: skip
    nothing_is_left(server)


def steps(completion: Any) -> list[dict[str, Any]]:
    return [choice.model_extra["meta_info"]["step"] for choice in completion.choices]


def create(client: openai.OpenAI, mode: dict[str, Any], **more: Any) -> Any:
    extra = {"return_meta_info": True, "regex": PATTERN, **mode}
    return client.chat.completions.create(**{**CHAT, **more}, extra_body=extra)


def test_abort_is_what_a_strict_client_refuses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIResponseValidationError):
        create(client, ABORT)
    with pytest.raises(openai.APIResponseValidationError):
        create(client, {})  # the default


def test_length_returns_every_choice(client: openai.OpenAI) -> None:
    completion = create(client, LENGTH)
    pruned = [step["pruned"] for step in steps(completion)]
    assert len(pruned) == N and 0 < sum(pruned) < N
    for choice, is_pruned in zip(completion.choices, pruned, strict=True):
        assert choice.finish_reason == ("length" if is_pruned else "stop")
        assert (len(choice.message.content) < LETTERS) == is_pruned


def test_omit_leaves_pruned_choices_out(client: openai.OpenAI) -> None:
    completion = create(client, OMIT)
    assert 0 < len(completion.choices) < N
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    assert not any(step["pruned"] for step in steps(completion))
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    # What was left out was generated all the same.
    kept = sum(c.model_extra["meta_info"]["completion_tokens"] for c in completion.choices)
    usage = completion.usage
    assert usage.completion_tokens > kept
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    alone = client.chat.completions.create(**{**CHAT, "n": 1, "max_tokens": 1})
    assert usage.prompt_tokens == alone.usage.prompt_tokens


def test_parse_of_24_choices(client: openai.OpenAI) -> None:
    """One partial choice would cost the whole call; with `length` the client raises too."""
    ask = {**CHAT, "response_format": Word}
    completion = client.chat.completions.parse(**ask, extra_body=OMIT)
    assert 0 < len(completion.choices) < N
    for choice in completion.choices:
        assert choice.message.parsed is not None and len(choice.message.parsed.word) == LETTERS
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**ask, extra_body=LENGTH)
    # Without strict validation an abort is seen only when the partial text is parsed.
    lax = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=300)
    with pytest.raises((pydantic.ValidationError, json.JSONDecodeError)):
        lax.chat.completions.parse(**ask, extra_body=ABORT)


def test_text_completions(client: openai.OpenAI) -> None:
    ask = {"model": "default", "prompt": "So", "n": N, "max_tokens": 400, "temperature": 1.0}
    found = client.completions.create(**ask, extra_body={"regex": PATTERN, **LENGTH})
    reasons = [choice.finish_reason for choice in found.choices]
    assert len(reasons) == N and set(reasons) == {"length", "stop"}
    found = client.completions.create(**ask, extra_body={"regex": PATTERN, **OMIT})
    assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
    assert all(len(choice.text) == LETTERS for choice in found.choices) and len(found.choices) < N
    assert found.usage.completion_tokens > len(found.choices) * LETTERS / 2
    # Of several prompts all choices stay, because their places tell the prompts.
    both = {**ask, "prompt": ["So", "First"], "n": N // 2}
    found = client.completions.create(**both, extra_body={"regex": PATTERN, **OMIT})
    assert [choice.index for choice in found.choices] == list(range(N))
    assert {choice.finish_reason for choice in found.choices} == {"length", "stop"}


@pytest.mark.parametrize("mode", [LENGTH, OMIT], ids=["length", "omit"])
def test_streams(client: openai.OpenAI, mode: dict[str, Any]) -> None:
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    chunks = list(
        client.chat.completions.create(**CHAT, **usage, extra_body={"regex": PATTERN, **mode})
    )
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason is not None:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    assert sorted(texts) == sorted(reasons) == list(range(len(texts)))
    if mode is OMIT:
        assert list(texts) == list(range(len(texts))) and 0 < len(texts) < N
        assert set(reasons.values()) == {"stop"}
        assert {len(text) for text in texts.values()} == {LETTERS}
        assert chunks[-1].usage.completion_tokens > sum(len(text) / 2 for text in texts.values())
    else:
        assert len(texts) == N and set(reasons.values()) == {"stop", "length"}
    assert chunks[-1].usage.prompt_tokens == create(client, OMIT, n=2).usage.prompt_tokens

    ask = {"model": "default", "prompt": "So", "n": N, "max_tokens": 400, "temperature": 1.0}
    written: dict[int, str] = {}
    ends: dict[int, str] = {}
    # Not strict: the client's own type refuses what every server sends before a choice ends.
    lax = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=300)
    for chunk in lax.completions.create(**ask, **usage, extra_body={"regex": PATTERN, **mode}):
        for choice in chunk.choices:
            written[choice.index] = written.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    assert sorted(written) == sorted(ends) == list(range(len(written)))
    assert (len(written) < N) == (mode is OMIT)
    if mode is OMIT:
        assert {len(text) for text in written.values()} == {LETTERS}


def test_the_streaming_helper_of_the_client(client: openai.OpenAI) -> None:
    """It appends choices as their numbers come, and parses each when it ends."""
    ask = {**CHAT, "response_format": Word}
    with client.chat.completions.stream(**ask, extra_body=OMIT) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert 0 < len(final.choices) < N
    for index, choice in enumerate(final.choices):
        assert choice.index == index and choice.finish_reason == "stop"
        assert choice.message.parsed is not None and len(choice.message.parsed.word) == LETTERS


def test_one_choice_always_stays(client: openai.OpenAI, server: Server) -> None:
    """Members of a named group that are requests of their own: each has a single choice."""
    mode = {"custom_params": {"step": {"pruned": "omit", "group": "single choices"}}}
    with ThreadPoolExecutor(N) as threads:
        alone = [partial(create, client, mode, n=1)] * N
        answers = [future.result() for future in together(server, threads, alone)]
        pairs = list(threads.map(lambda _: create(client, mode, n=2), range(N // 2)))
    pruned = [step["pruned"] for answer in answers for step in steps(answer)]
    assert len(pruned) == N and 0 < sum(pruned) < N
    for answer in (*answers, *pairs):
        assert answer.choices and answer.choices[0].index == 0
        for choice, step in zip(answer.choices, steps(answer), strict=True):
            assert choice.finish_reason == ("length" if step["pruned"] else "stop")
            assert len(answer.choices) == 1 or not step["pruned"]


@pytest.mark.parametrize("mode", ["abort", "length", "omit"])
def test_generate_returns_every_trace(server: Server, mode: str) -> None:
    params = {
        "n": N, "temperature": 1.0, "max_new_tokens": 400, "regex": PATTERN,
        "custom_params": {"step": {"pruned": mode}},
    }  # fmt: skip
    answers = server.generate(text="So", sampling_params=params)
    pruned = [a["meta_info"] for a in answers if a["meta_info"]["step"]["pruned"]]
    assert len(answers) == N and pruned
    for info in pruned:
        reason = info["finish_reason"]
        assert reason["type"] == ("abort" if mode == "abort" else "length")
        assert reason["message"].startswith("pruned by STEP")
        assert mode == "abort" or reason["length"] == info["completion_tokens"]
    nothing_is_left(server)


def test_an_unknown_mode_is_a_400(server: Server) -> None:
    body = {**CHAT, "custom_params": {"step": {"pruned": "hide"}}}
    for n in (1, 2):
        answer = server.post("/v1/chat/completions", {**body, "n": n})
        assert answer.status_code == 400
        assert "pruned must be one of abort, length, omit" in answer.text


@pytest.mark.full
def test_the_server_decides_for_requests_that_do_not_say(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    flags = ("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL))
    more = ("--step-pruned", "omit", "--incremental-streaming-output")
    with serve(models["qwen3"], *flags, *MORE, *more, log=tmp_path / "omit.log") as server:
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=300,
            _strict_response_validation=True,
        )  # fmt: skip
        ask = {**CHAT, "response_format": Word}
        completion = client.chat.completions.parse(**ask)
        assert 0 < len(completion.choices) < N
        assert len(create(client, LENGTH).choices) == N
        assert server.info()["internal_states"][0]["step"]["pruned"] == "omit"
        # Chunks that hold what is new alone.
        with client.chat.completions.stream(**ask) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert 0 < len(final.choices) < N
        for choice in final.choices:
            assert choice.message.parsed is not None
            assert len(choice.message.parsed.word) == LETTERS
        nothing_is_left(server)
