"""A group of traces on a server, and whom its ranks pruned."""

from __future__ import annotations

import re
from typing import Any

from tests.server.launch import Server

PROMPT = list(range(40, 80))
TRACES, NEW_TOKENS = 64, 200


def sample(server: Server, n: int = TRACES, tokens: int = NEW_TOKENS, **step: Any) -> list[dict]:
    """The ``n`` answers of a group; ``step`` holds further members of its request."""
    answers = server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "custom_params": {"step": {"step_scores": True, **step}},
        },
    )
    # SGLang answers one sample with an object, several with a list.
    answers = answers if isinstance(answers, list) else [answers]
    assert len(answers) == n
    return answers


def victims(server: Server) -> dict[int, list[str]]:
    """Who was pruned and why, in order, by rank."""
    text = server.log_text()
    return {
        rank: re.findall(rf"TP{rank}\] STEP pruned rid=('\w+' .*?reason=\w+)", text)
        for rank in (0, 1)
    }


def assert_same_victims(server: Server, at_least: int) -> None:
    first, second = (
        [(line.split()[0], line.split("reason=")[1]) for line in lines]
        for lines in victims(server).values()
    )
    assert len(first) >= at_least
    assert first == second
