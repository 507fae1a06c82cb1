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


def asked(step: Any, text: str = "How much?", model: str = "org/model", **config: Any) -> str:
    """The last message's text after the hook."""
    server_args = SimpleNamespace(model_path=model)
    attach(server_args, StepConfig("s", **config), from_cli=True)
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(server_args=server_args))
    request = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": text}],
        custom_params=None if step is None else {"step": step},
    )
    convert_chat(serving, request)
    return str(request.messages[-1].content)


@pytest.mark.parametrize("config", [{}, {"traces": 8}])
def test_a_voted_chat_is_asked_for_a_box(config: dict[str, Any]) -> None:
    step = None if config else {"traces": 8}
    assert asked(step, **config) == f"How much?{BOXED_SUFFIX}"
    assert asked({"traces": 8, "suffix": ""}, **config) == "How much?"
    assert asked({"traces": 8, "suffix": " Now."}, **config) == "How much? Now."


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
