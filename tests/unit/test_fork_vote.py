"""The vote over forks: the whole text of a fork counts, and no answer comes with its reason."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from step_sglang.client.frontend import vote

PROMPT = r"Put the answer in \boxed{} such as \boxed{99}. "


class Fork:
    """What the vote reads of one state of SGLang's frontend."""

    def __init__(self, *texts: str, score: float = 0.5, pruned: bool = False) -> None:
        self._texts = texts
        self.stream_executor = SimpleNamespace(fork_start_text_pos=len(PROMPT))
        reason: dict[str, Any] = {"type": "stop"}
        if pruned:
            reason = {"type": "abort", "message": "pruned by STEP: trace score 0.1 after 2 steps"}
        self._info = {"finish_reason": reason, "step": {"score": score}}

    def text(self) -> str:
        return PROMPT + "".join(self._texts)

    def get_var(self, name: str) -> str:
        return self._texts[-1]

    def get_meta_info(self, name: str) -> dict[str, Any]:
        return self._info


def test_a_trace_that_ended_in_an_earlier_gen_votes() -> None:
    forks = [Fork(r"so \boxed{7}", ""), Fork("hm, ", r"\boxed{7}"), Fork(r"\boxed{3}", "")]
    found = vote(forks, "answer", same=str.__eq__)
    assert found.answer == "7" and found.answers[0].members == (0, 1)


def test_the_prompt_does_not_vote() -> None:
    found = vote([Fork("a plain answer")], "answer", same=str.__eq__)
    assert found.answer == "a plain answer"


def test_an_extractor_reads_the_whole_fork() -> None:
    seen: list[str] = []
    vote([Fork("plan ", "end")], "answer", extract=lambda text: seen.append(text) or "x")
    assert seen == ["plan end"]


def test_none_says_why() -> None:
    forks = [Fork("", pruned=True), Fork("", pruned=True), Fork("")]
    with pytest.warns(UserWarning, match=r"3 forks has no answer: 2 x pruned by STEP.*; 1 x no"):
        assert vote(forks, "answer").answer is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vote([Fork("4")], "answer").answer == "4"
