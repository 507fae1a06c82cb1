"""What a chat is asked in addition when many traces vote on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches.http import convert_chat
from step_sglang.patches.server_args import attach
from step_sglang.reasoner import model_path
from step_sglang.voting.request import parse_vote
from step_sglang.voting.suffix import BOXED_SUFFIX


def converted(step: Any, content: Any, model: str = "org/model", **config: Any) -> Any:
    """The last message's content after the hook."""
    server_args = SimpleNamespace(model_path=model)
    attach(server_args, StepConfig("s", **config), from_cli=True)
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(server_args=server_args))
    request = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": content}],
        custom_params=None if step is None else {"step": step},
    )
    convert_chat(serving, request)
    return request.messages[-1].content


def asked(step: Any, text: str = "How much?", **more: Any) -> str:
    return str(converted(step, text, **more))


@pytest.mark.parametrize("config", [{}, {"traces": 8}])
def test_a_voted_chat_is_asked_for_a_box(config: dict[str, Any]) -> None:
    step = None if config else {"traces": 8}
    assert asked(step, **config) == f"How much?{BOXED_SUFFIX}"
    assert asked({"traces": 8, "suffix": ""}, **config) == "How much?"
    assert asked({"traces": 8, "suffix": " Now."}, **config) == "How much? Now."


def test_parts_are_asked_for_a_box_too() -> None:
    """Some clients send every text as a list of parts."""

    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    def texts(content: Any) -> list[Any]:
        return [one.text if one.type == "text" else one.type for one in content]

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    step = {"traces": 8}
    assert texts(converted(step, [part("How"), part("much?")])) == ["How", f"much?{BOXED_SUFFIX}"]
    assert texts(converted(step, [part("This?"), image])) == [f"This?{BOXED_SUFFIX}", "image_url"]
    assert texts(converted(step, [image])) == ["image_url", BOXED_SUFFIX]
    assert texts(converted(step, [part("Use a \\boxed{}.")])) == ["Use a \\boxed{}."]
    assert texts(converted({**step, "suffix": "!"}, [part("How much?")])) == ["How much?!"]


def test_where_nothing_is_added() -> None:
    assert asked(None) == asked(False) == asked(True) == "How much?"
    assert asked({"traces": 8, "extract": "choice"}) == "How much?"
    assert asked({"traces": 8}, "Put it in \\boxed{}.") == "Put it in \\boxed{}."
    assert asked({"traces": 8}, model=str(model_path())) == "How much?"
    assert asked({"traces": "many"}) == "How much?"  # refused later


def test_a_suffix_is_a_short_text_beside_traces() -> None:
    for step, message in (
        ({"traces": 8, "suffix": 3}, "suffix must be a text"),
        ({"traces": 8, "suffix": "x" * 5000}, "suffix must be a text"),
        ({"suffix": ""}, "needs traces beside it"),
    ):
        with pytest.raises(RequestError, match=message):
            parse_vote({"custom_params": {"step": step}}, StepConfig("s"))
