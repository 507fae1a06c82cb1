from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.pruning.request import StepRequest, as_sample, parse_request
from step_sglang.voting.one_choice import kept_alive, not_voted, one_choice, run
from step_sglang.voting.request import ParsedRequest, parse, parse_vote, trace_params
from step_sglang.voting.session import TraceFate, VoteRules, VoteSession, VoteStatus
from step_sglang.voting.verifier import AnswerVerifier

OFF = StepConfig(scorer="s")
DEFAULT = StepConfig(scorer="s", traces=16, vote="majority", extract="number", temperature=0.7)


def test_who_is_voted() -> None:
    assert parse_vote({}, OFF) is None
    assert parse_vote({"custom_params": {"step": {"group": "g"}}}, DEFAULT) is None
    for ordinary in ({}, {"n": 1}, {"custom_params": {"x": 1}}, {"temperature": 0}):
        wish = parse_vote(ordinary, DEFAULT)
        assert wish is not None and wish.traces == 16 and wish.rules.vote == "majority"
    for other in (
        {"n": 2},
        {"max_new_tokens": 0},
        {"beam_width": 2},
        {"custom_params": {"step": False}},
        {"custom_params": {"step": True}},
    ):
        assert parse_vote(other, DEFAULT) is None
    asked = parse_vote({"custom_params": {"step": {"traces": 3, "extract": "choice"}}}, DEFAULT)
    assert asked is not None and (asked.traces, asked.extract) == (3, "choice")
    changed = parse_vote({"custom_params": {"step": {"vote": "best"}}}, DEFAULT)
    assert changed is not None and changed.rules.vote == "best" and changed.traces == 16
    with pytest.raises(RequestError, match="needs traces beside it"):
        parse_vote({"custom_params": {"step": {"vote": "best"}}}, OFF)


@pytest.mark.parametrize("member", ["traces", "vote", "extract", "early", "threshold"])
def test_a_message_is_one_short_line_whatever_the_value(member: str) -> None:
    """Python refuses to print integers of thousands of digits."""
    for value in (10**5000, [-(10**5000)], "\x1b[31m\n", {"\ud800": 1}):
        with pytest.raises(RequestError) as caught:
            parse_vote({"custom_params": {"step": {"traces": 3, member: value}}}, OFF)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_the_group_says_nothing_of_the_vote() -> None:
    params = {
        "temperature": 0.9,
        "custom_params": {"step": {"traces": 3, "group": "g"}, "other": 1},
    }
    wish = parse_vote(params, OFF)
    assert wish is not None
    inner = trace_params(params, wish, OFF)
    assert inner["n"] == 3 and inner["temperature"] == 0.9
    assert inner["custom_params"] == {"step": {"group": "g"}, "other": 1}
    assert params["custom_params"]["step"]["traces"] == 3
    default = parse_vote({"temperature": 0}, DEFAULT)
    assert default is not None
    assert trace_params({"temperature": 0}, default, DEFAULT)["temperature"] == 0.7


def test_a_request_is_read_once_and_whole() -> None:
    params = {"custom_params": {"step": {"traces": 3, "group": "g", "pruned": "length"}}}
    parsed = parse(params, OFF)
    assert parsed.vote is not None and parsed.vote.traces == 3 and not parsed.declined
    assert parsed.trace == StepRequest("g", pruned="length")
    # What the scheduler reads is the same trace.
    assert parse_request(trace_params(params, parsed.vote, OFF)["custom_params"]) == parsed.trace
    assert parse({}, OFF) == ParsedRequest()
    assert parse({"custom_params": {"step": False}}, DEFAULT) == ParsedRequest(declined=True)
    assert parse({"n": 4, "custom_params": {"step": True}}, OFF).trace == StepRequest()
    for nothing in ({}, {"custom_params": {"step": None}}, {"custom_params": None}):
        default = parse(nothing, DEFAULT)
        assert default.vote is not None and default.trace is None
        inner = trace_params(nothing, default.vote, DEFAULT)["custom_params"]
        assert inner == {"step": {}}
    # Saying how pruned traces are reported does not opt out of the server's vote.
    assert parse({"custom_params": {"step": {"pruned": "omit"}}}, DEFAULT).vote is not None
    for step in ({"traces": 2, "colour": 1}, {"traces": 2, "group": ""}, {"pruned": "keep"}, 7):
        with pytest.raises(RequestError):
            parse({"custom_params": {"step": step}}, DEFAULT)


def test_trace_names() -> None:
    named = {"step": {"group": "g", "trace": "t"}}
    assert parse_request(named) == StepRequest("g", trace="t")
    with pytest.raises(RequestError, match="needs the name of its group"):
        parse_request({"step": {"trace": "t"}})
    with pytest.raises(RequestError, match=r"step\.trace must be a string"):
        parse_request({"step": {"group": "g", "trace": 3}})
    with pytest.raises(RequestError, match="needs n = 1"):
        as_sample(parse_request(named), lambda: "other")


def chunk(index: int, text: str, tokens: int, score: float, end: str | None = None) -> dict:
    step = {"group": "g", "score": score, "num_steps": 1, "pruned": end == "abort"}
    reason = None if end is None else {"type": end, "message": "pruned by STEP"}
    return {
        "index": index,
        "text": text,
        "output_ids": list(range(tokens)),
        "meta_info": {
            "id": f"r{index}",
            "finish_reason": reason,
            "prompt_tokens": 5,
            "completion_tokens": tokens,
            "step": step,
        },
    }


def gather(chunks: list[dict], n: int, early: str = "exact") -> tuple[VoteSession, dict, list]:
    session = VoteSession(n, VoteRules(early=early), max_new_tokens=100)
    verifier = AnswerVerifier()  # not needed for numbers
    sent: list[int] = []

    async def stream() -> AsyncIterator[dict]:
        for item in chunks:
            sent.append(item["index"])
            yield item

    taken = run(stream(), session, lambda chunk: None, None, verifier.comparison())  # type: ignore[arg-type]
    last = asyncio.run(taken)
    return session, last, sent


BOX = "\\boxed{%s}"


def test_one_choice_is_the_best_trace_of_the_winner() -> None:
    session, last, _ = gather(
        [
            chunk(0, BOX % 7, 10, 0.4, "stop"),
            chunk(1, BOX % 8, 12, 0.9, "stop"),
            chunk(2, BOX % 7, 11, 0.6, "stop"),
            chunk(3, "so far", 3, 0.1, "abort"),
        ],
        4,
    )
    answer = one_choice(session, last, "outer")
    vote = answer["meta_info"]["step"]["vote"]
    assert answer["text"] == BOX % 7 and answer["meta_info"]["id"] == "outer"
    assert len(answer["output_ids"]) == 11 and "index" not in answer
    assert answer["meta_info"]["completion_tokens"] == 36
    assert vote["answer"] == "7" and vote["share"] == pytest.approx(1.0 / 1.9)
    assert (vote["finished"], vote["pruned"], vote["cancelled"]) == (3, 1, 0)


def test_a_pruned_trace_does_not_vote_however_it_is_reported() -> None:
    pruned = chunk(1, BOX % 8, 12, 0.9, "abort")
    pruned["meta_info"]["finish_reason"] = {"type": "length", "length": 12}
    session, last, _ = gather([chunk(0, BOX % 7, 10, 0.4, "stop"), pruned], 2)
    assert session.num(TraceFate.PRUNED) == 1
    assert one_choice(session, last, "outer")["meta_info"]["step"]["vote"]["answer"] == "7"


def test_a_decided_group_is_left_and_a_silent_one_has_a_partial_answer() -> None:
    decided = [chunk(i, BOX % 7, 10, 0.9, "stop") for i in range(6)]
    session, _, sent = gather(decided, 6)
    assert sent == [0, 1, 2, 3] and session.num(TraceFate.CANCELLED) == 2
    session, last, _ = gather([chunk(0, "a", 1, 0.2), chunk(1, "long", 9, 0.2)], 2)
    assert session.outcome().status is VoteStatus.NO_FINISHED_TRACE
    answer = one_choice(session, last, "outer")
    assert answer["text"] == "long" and answer["meta_info"]["finish_reason"]["type"] == "abort"


def test_an_aborted_group_ends_at_once_and_says_so() -> None:
    session = VoteSession(3, VoteRules(early="off"))
    sent: list[int] = []

    async def stream() -> AsyncIterator[dict]:
        for item in (chunk(0, BOX % 7, 5, 0.5, "stop"), chunk(1, "so", 2, 0.4)):
            sent.append(item["index"])
            yield item
        await asyncio.sleep(60)

    compare = AnswerVerifier().comparison()
    last = asyncio.run(
        run(stream(), session, lambda chunk: None, None, compare, lambda: len(sent) == 2)  # type: ignore[arg-type]
    )
    assert session.num(TraceFate.CANCELLED) == 2
    reason = {"type": "abort", "message": "Aborted"}
    answer = one_choice(session, last, "outer", aborted=reason)
    assert answer["text"] == BOX % 7 and answer["meta_info"]["finish_reason"] == reason
    assert answer["meta_info"]["step"]["vote"]["answer"] == "7"
    # SGLang hands out its own list of a running trace's tokens, which grows on.
    growing = chunk(0, "so", 2, 0.4)
    growing["output_ids"] += [7, 7, 7]
    session, last, _ = gather([growing], 1)
    assert one_choice(session, last, "outer", aborted=reason)["output_ids"] == [0, 1]
    untouched = VoteSession(2, VoteRules())
    untouched.cancel()
    stock = {"text": "", "output_ids": [], "meta_info": {"id": "outer", "finish_reason": reason}}
    answer = one_choice(untouched, {}, "outer", aborted=reason, before_start=lambda: dict(stock))
    assert answer["text"] == "" and answer["meta_info"]["finish_reason"] == reason
    assert answer["meta_info"]["step"]["vote"]["cancelled"] == 2


def test_an_answer_that_was_not_voted_says_why() -> None:
    async def answers() -> AsyncIterator[Any]:
        yield {"meta_info": {"id": "a"}}
        yield [{"meta_info": {"step": {"score": 0.5}}}, {"meta_info": {}}]

    async def collect() -> list[Any]:
        return [one async for one in not_voted(answers(), "no room")]  # type: ignore[arg-type]

    single, batch = asyncio.run(collect())
    for answer in (single, *batch):
        vote = answer["meta_info"]["step"]["vote"]
        assert vote["status"] == "not_voted" and vote["message"] == "not voted: no room"
    assert batch[0]["meta_info"]["step"]["score"] == 0.5


def test_incremental_chunks_are_put_together() -> None:
    parts = [chunk(0, "ab", 2, 0.5), chunk(0, "cd", 4, 0.5), chunk(0, BOX % 1, 9, 0.5, "stop")]
    for part, ids in zip(parts, ([1, 2], [3, 4], [5, 6, 7, 8, 9]), strict=True):
        part["output_ids"] = ids
    session, _, _ = gather(parts, 1)
    assert session.traces[0].text == "abcd" + BOX % 1
    assert session.traces[0].output_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_comments_only_while_nothing_comes_and_errors_pass() -> None:
    async def slow() -> AsyncIterator[str]:
        await asyncio.sleep(0.6)
        yield "data"
        raise ValueError("late")

    async def collect() -> list[Any]:
        seen: list[Any] = []
        try:
            async for item in kept_alive(slow(), lambda: ": step\n\n", str.encode):  # type: ignore[arg-type]
                seen.append(item)
        except ValueError as error:
            seen.append(str(error))
        return seen

    assert asyncio.run(collect()) == [b": step\n\n", "data", "late"]


ENDLESS = "12^{9^{9^9}}"  # math-verify would compute it


@pytest.mark.parametrize("how", ["left", "aborted", "cancelled"])
def test_a_comparison_ends_with_the_wish_for_it(how: str) -> None:
    """A client that leaves, an abort, a cancelled task: none waits for the answer's own end."""
    patient = AnswerVerifier(time_limit=500.0, budget=1000.0)
    session = VoteSession(2, VoteRules(early="off"))
    begun: list[float] = []

    async def stream() -> AsyncIterator[dict]:
        for index in range(2):
            yield chunk(index, BOX % ENDLESS.replace("2", str(index + 2)), 5, 0.5, "stop")

    def comparing() -> bool:
        if patient.counts["forms"] and not begun:
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] > 1

    async def connected() -> None:
        if how == "left" and comparing():
            raise ValueError("left")

    async def vote() -> Any:
        comparison = patient.comparison()
        going = run(
            stream(), session, lambda chunk: None, connected, comparison,
            lambda: how == "aborted" and comparing(),
        )  # type: ignore[arg-type]  # fmt: skip
        task = asyncio.ensure_future(going)
        while how == "cancelled" and not comparing():
            await asyncio.sleep(0.05)
        if how == "cancelled":
            task.cancel()
        return await task

    try:
        if how == "aborted":
            last = asyncio.run(vote())
            said = one_choice(session, last, "outer")["meta_info"]["step"]["vote"]
            assert said["text_only"] == len(said["answers"]) == 1 and said["cancelled"] == 1
        else:
            with pytest.raises(ValueError if how == "left" else asyncio.CancelledError):
                asyncio.run(vote())
        assert time.monotonic() - begun[0] < 60  # of 500
        assert patient.same("x+1", "1+x")  # by a child that is free
    finally:
        patient.close()
