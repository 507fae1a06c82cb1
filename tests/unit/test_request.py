"""What a request may say about STEP."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_sglang import protocol
from step_sglang.errors import RequestError
from step_sglang.pruning.request import (
    StepRequest,
    as_sample,
    check_group_size,
    declined,
    parse_request,
    unpacked,
    with_group,
)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, None),
        ({}, None),
        ({"thinking_budget": 3}, None),
        ({"step": None}, None),
        ({"step": False}, None),
        ({"step": True}, StepRequest()),
        ({"step": {}}, StepRequest()),
        ({"step": {"group": "g"}}, StepRequest("g")),
        ({"step": {"group": None, "step_scores": True}}, StepRequest(step_scores=True)),
        (
            {"step": {"hidden_states": True, "prompt_tokens": 7}},
            StepRequest(hidden_states=True, prompt_tokens=7),
        ),
        ({"step": {"weight": 2}}, StepRequest(weight=2.0)),
        ({"step": {"pruned": "omit"}}, StepRequest(pruned="omit")),
        ({"step": {"pruned": None}}, StepRequest()),
        ({"step": {"weight": None, "min_survivors": 3}}, StepRequest(min_survivors=3)),
    ],
)
def test_accepted(params: Any, expected: StepRequest | None) -> None:
    assert parse_request(params) == expected


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *(("weight", v) for v in (0, -1, -0.5, True, "2", [1], 1e-9, 1e9, 10**400)),
        *(("weight", float(v)) for v in ("nan", "inf", "-inf")),
        *(("min_survivors", v) for v in (0, -1, True, 1.5, "2", [], -(10**400))),
        *(("pruned", v) for v in ("", "Length", "keep", True, 1, [], ["omit"], {})),
        *(("group", v) for v in (1, [], {}, True, "", "x" * 257, "x" * 2**20, "\ud800")),
    ],
)
def test_a_wrong_value_is_refused_by_name(member: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"custom_params\.step\.{member}") as refused:
        parse_request({"step": {member: value}})
    assert len(str(refused.value)) < 300


def test_more_survivors_than_samples_are_refused() -> None:
    step_request = StepRequest(min_survivors=9)
    with pytest.raises(RequestError, match=r"min_survivors is 9.*only 8 samples"):
        check_group_size(step_request, 8)
    check_group_size(step_request, 9)
    with pytest.raises(RequestError, match="min_survivors"):
        check_group_size(StepRequest(min_survivors=2), 1)
    check_group_size(StepRequest("q", min_survivors=2), 1)  # one of many members
    with pytest.raises(RequestError, match="more than 15 digits"):
        check_group_size(StepRequest(min_survivors=10**5000), 8)


@pytest.mark.parametrize("member", protocol.REQUEST_MEMBERS)
@pytest.mark.parametrize("value", [-(10**5000), [10**5000], "\x1b[31m\n", {"\ud800": 1}], ids=type)
def test_a_message_is_one_short_line_whatever_the_value(member: str, value: Any) -> None:
    """Python refuses to print integers of thousands of digits."""
    try:
        parse_request({"step": {"group": "g", "hidden_states": True, member: value}})
    except RequestError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    else:
        assert member in (protocol.GROUP, protocol.TRACE) and isinstance(value, str)


def test_unknown_members_are_named_shortly() -> None:
    members = {f"\x1b[31m{i}\n" * 100: 1 for i in range(5000)}
    with pytest.raises(RequestError, match="unknown members") as caught:
        parse_request({"step": members})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("group"), inner),
        max_leaves=8,
    )
)
def test_any_json_value_is_read_or_refused(value: Any) -> None:
    try:
        parsed = parse_request({"step": value})
    except RequestError as error:
        assert 0 < len(str(error)) < 1000
    else:
        assert parsed is None or isinstance(parsed, StepRequest)


def test_samples_of_a_prompt_are_in_one_group() -> None:
    drawn: list[str] = []

    def draw() -> str:
        drawn.append(f"new {len(drawn)}")
        return drawn[-1]

    assert as_sample(None, draw) == as_sample(None, lambda: "new 0") == StepRequest("new 0")
    scored = StepRequest(step_scores=True, pruned="omit")
    assert as_sample(scored, draw) == StepRequest("new 1", step_scores=True, pruned="omit")
    assert as_sample(StepRequest("mine"), draw) == StepRequest("mine") and len(drawn) == 2
    with pytest.raises(RequestError, match="needs n = 1"):
        as_sample(StepRequest("mine", trace="t"), draw)


def test_the_scheduler_reads_the_group() -> None:
    for custom in (None, {}, {"step": None}, {"step": True}, {"step": {}}):
        assert with_group(custom, "g") == {"step": {"group": "g"}}
    kept = with_group({"step": {"step_scores": True}, "other": 1}, "g")
    assert parse_request(kept) == StepRequest("g", True) and kept["other"] == 1


def test_declining() -> None:
    assert declined({"step": False})
    assert not declined({"step": None}) and not declined({}) and not declined(None)


@pytest.mark.parametrize(
    ("custom", "session", "expected"),
    [
        (None, None, (None, None)),
        ({"step": True}, {"id": "s"}, ({"step": True}, {"id": "s"})),
        (None, {"step": {"group": "g"}}, ({"step": {"group": "g"}}, None)),
        ({"a": 1}, {"step": True, "id": "s"}, ({"step": True, "a": 1}, {"id": "s"})),
        ({"step": False}, {"step": True}, ({"step": False}, None)),  # custom_params wins
        ("text", {"step": True}, ("text", None)),  # which is refused for what it is
        (None, "text", (None, "text")),
    ],
)
def test_session_params_say_the_same(custom: Any, session: Any, expected: Any) -> None:
    given = dict(session) if isinstance(session, dict) else session
    assert unpacked(custom, session) == expected
    assert session == given
