"""Leaving pruned traces out of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from step_sglang.pruning.choices import (
    ChoiceProgress,
    LeftOut,
    is_pruned,
    leave_out,
    leave_out_of_stream,
)


def part(
    index: int, text: str, tokens: int, end: str | None = None, *, score: float | None = 0.5
) -> dict[str, Any]:
    """A chunk; ``end`` "pruned" reports the trace as length, as such servers do."""
    reason = None if end is None else {"type": "length" if end == "pruned" else end}
    if end == "error":
        reason = {"type": "abort", "status_code": 503, "message": "late"}
    step = {"score": score, "pruned": end == "pruned"}
    info = {"id": f"r{index}", "finish_reason": reason, "completion_tokens": tokens, "step": step}
    return {"index": index, "text": text, "output_ids": [index], "meta_info": info}


def test_pruned_answers_are_left_out_and_counted() -> None:
    answers = [part(0, "a", 3, "pruned"), part(1, "b", 5, "stop"), part(2, "c", 7, "pruned")]
    left_out = LeftOut()
    assert leave_out(answers, left_out) == [answers[1]]
    assert left_out.completion_tokens == 10
    stock = {"meta_info": {"finish_reason": {"type": "abort"}}}  # it never ran
    assert not is_pruned(stock) and leave_out([stock], LeftOut()) == [stock]


def test_the_best_one_stays_where_all_were_pruned() -> None:
    answers = [
        part(0, "a", 9, "pruned", score=None),
        part(1, "b", 5, "pruned", score=0.7),
        part(2, "c", 6, "pruned", score=0.7),
    ]
    left_out = LeftOut()
    assert leave_out(answers, left_out) == [answers[2]]
    assert left_out.completion_tokens == 14


def stream(chunks: list[dict[str, Any]], *, incremental: bool = False) -> list[dict[str, Any]]:
    async def source() -> AsyncIterator[dict[str, Any]]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[dict[str, Any]]:
        left = leave_out_of_stream(source(), incremental=incremental)  # type: ignore[arg-type]
        return [chunk async for chunk in left]

    return asyncio.run(collect())


CHUNKS = [
    part(2, "x", 1),
    part(0, "a", 1),
    part(1, "b", 1),
    part(2, "xy", 2, "pruned"),
    part(1, "bc", 2, "stop"),
    part(0, "ab", 2),
    part(0, "abc", 3, "length"),
    part(3, "z", 4, "pruned"),
]


def test_a_stream_holds_a_trace_until_it_stays() -> None:
    found = stream(CHUNKS)
    assert [(c["index"], c["text"], bool(c["meta_info"]["finish_reason"])) for c in found] == [
        (0, "bc", False),
        (1, "abc", True),
        (0, "bc", True),  # the first one's end comes last
    ]
    tokens = {c["index"]: c["meta_info"]["completion_tokens"] for c in found}
    assert sum(tokens.values()) == 2 + 2 + 3 + 4
    assert CHUNKS[4]["meta_info"]["completion_tokens"] == 2  # what was given is not changed


def test_a_stream_of_new_text_alone() -> None:
    chunks = [
        part(0, "a", 1),
        part(1, "b", 1),
        part(1, "c", 2, "pruned"),
        part(0, "b", 2),
        part(0, "c", 3, "stop"),
    ]
    found = stream(chunks, incremental=True)
    assert "".join(c["text"] for c in found) == "abc" and {c["index"] for c in found} == {0}
    ids = [token for c in found for token in c["output_ids"]]
    assert len(ids) == 3
    assert [bool(c["meta_info"]["finish_reason"]) for c in found] == [False, False, False, True]
    assert found[-1]["meta_info"]["completion_tokens"] == 5


@pytest.mark.parametrize("incremental", [False, True])
def test_one_choice_of_a_stream_always_stays(incremental: bool) -> None:
    chunks = [part(0, "a", 3, "pruned", score=0.1), part(1, "b", 4, "pruned", score=0.2)]
    found = stream(chunks, incremental=incremental)
    assert "".join({c["text"]: None for c in found}) == "b" and {c["index"] for c in found} == {0}
    assert found[-1]["meta_info"]["completion_tokens"] == 7
    assert stream([]) == []


def test_an_error_passes_at_once() -> None:
    found = stream([part(0, "a", 3), part(0, "a", 3, "error"), part(1, "b", 4, "stop")])
    assert found[0]["meta_info"]["finish_reason"]["status_code"] == 503


def test_progress_of_a_stream() -> None:
    async def source() -> AsyncIterator[dict[str, Any]]:
        for chunk in CHUNKS[:5]:
            yield chunk

    async def said() -> list[str | None]:
        progress = ChoiceProgress()
        comments = [progress.comment()]
        async for _ in progress.watch(source()):  # type: ignore[arg-type]
            comments.append(progress.comment())
        return comments

    comments = asyncio.run(said())
    assert comments[0] is None
    assert comments[-1] == ": step 1 running, 1 finished, 1 pruned\n\n"
