"""What a request says of STEP is read once, and travels with SGLang's own request objects."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.api_contract import generate_contract_error
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches import parsed
from step_sglang.patches.parsed import (
    init_req_state,
    parse_prompts,
    parsed_of,
    pruned_mode,
    takes_part,
)
from step_sglang.patches.server_args import attach
from step_sglang.pruning import request as pruning_request
from step_sglang.pruning.request import StepRequest, parse_request
from step_sglang.voting import request as voting_request

CONFIG = StepConfig(scorer="s", pruned="length")


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(parsed, "replicas", lambda: 1)  # SGLang knows it where a server runs
    server_args = SimpleNamespace()
    attach(server_args, CONFIG, from_cli=False)
    return SimpleNamespace(server_args=server_args)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call that reads ``custom_params``."""
    calls: list[Any] = []

    def read(custom: Any) -> Any:
        calls.append(custom)
        return parse_request(custom)

    monkeypatch.setattr(pruning_request, "parse_request", read)
    monkeypatch.setattr(voting_request, "parse_request", read)
    return calls


def asked(step: Any, n: int = 1, **body: Any) -> GenerateReqInput:
    custom = {} if step is None else {"custom_params": {"step": step}}
    return GenerateReqInput(sampling_params={"n": n, **custom}, **body)


def test_samples_of_one_prompt_share_a_group_read_once(manager: Any, reads: list[Any]) -> None:
    obj = asked({"weight": 2}, n=3, text="x")
    parse_prompts(obj, CONFIG)
    parse_prompts(obj, CONFIG)
    obj.normalize_batch_and_arguments()
    init_req_state(manager, obj)
    sample = copy.copy(obj[0])  # as the manager makes them
    init_req_state(manager, sample)
    trace = parsed_of(sample).trace
    assert trace is not None and trace.group and trace.weight == 2 and len(reads) == 1
    assert parse_request(sample.sampling_params["custom_params"]) == trace


def test_each_prompt_of_a_batch_has_its_own(manager: Any, reads: list[Any]) -> None:
    obj = asked(None, n=2, text=["x", "y"])
    parse_prompts(obj, CONFIG)
    obj.normalize_batch_and_arguments()
    init_req_state(manager, obj)
    groups = {parsed_of(obj[i]).trace.group for i in range(2)}  # type: ignore[union-attr]
    assert len(groups) == 2 and len(reads) == 1
    steps = [{"step": {"group": "a"}}, {"step": False}]
    obj = GenerateReqInput(text=["x", "y"], sampling_params=[{"custom_params": s} for s in steps])
    parse_prompts(obj, CONFIG)
    obj.normalize_batch_and_arguments()
    init_req_state(manager, obj)
    assert parsed_of(obj[0]).trace == StepRequest("a")
    assert parsed_of(obj[1]).trace is None and parsed_of(obj[1]).declined and len(reads) == 3


def test_who_is_left_alone(manager: Any) -> None:
    declined = asked(False, n=3, text="x")
    parse_prompts(declined, CONFIG)
    declined.normalize_batch_and_arguments()
    init_req_state(manager, declined)
    assert parsed_of(declined[0]).trace is None
    assert declined[0].sampling_params["custom_params"] == {"step": False}
    named = asked({"group": "g", "trace": "t"}, n=2, text="x")
    parse_prompts(named, CONFIG)
    named.normalize_batch_and_arguments()
    with pytest.raises(RequestError, match="needs n = 1"):
        init_req_state(manager, named)
    assert not takes_part(EmbeddingReqInput(text="x"))
    assert not takes_part(GenerateReqInput(text="x", rid="HEALTH_CHECK_1"))
    assert takes_part(GenerateReqInput(text="x"))
    assert parsed_of(GenerateReqInput(text="x")).trace is None


@pytest.mark.parametrize(
    ("sampling", "wrong"),
    [
        ({"temperature": "hot"}, 'invalid type: string "hot", expected f64'),
        ({"n": "4"}, 'invalid type: string "4", expected i64'),
        ({"bogus": 1}, "unknown field `bogus`"),
    ],
)
def test_sglang_says_what_is_wrong_with_sampling_parameters(sampling: Any, wrong: str) -> None:
    assert wrong in str(generate_contract_error({"sampling_params": sampling}))
    for params in ({"n": 2}, None, [{"n": 2}]):
        obj = GenerateReqInput(
            text="x", sampling_params=params, session_params={"step_sampling": sampling}
        )
        with pytest.raises(RequestError, match=r"session_params\.step_sampling: ") as caught:
            parse_prompts(obj, CONFIG)
        assert wrong in str(caught.value)


def test_what_session_params_may_say() -> None:
    said = {"step": {"group": "g"}, "step_sampling": {"n": 4, "max_new_tokens": None}, "id": "s"}
    obj = GenerateReqInput(text="x", sampling_params={"n": 2}, session_params=said)
    (found,) = parse_prompts(obj, CONFIG)
    assert found.trace == StepRequest("g") and obj.session_params == {"id": "s"}
    assert obj.sampling_params["n"] == 4 and obj.sampling_params["max_new_tokens"] is None
    # What is wrong there SGLang says, as to a request without STEP.
    for params in ([], [3], 3):
        obj = GenerateReqInput(text="x", sampling_params=params, session_params=dict(said))
        parse_prompts(obj, CONFIG)
        assert obj.session_params == said and obj.sampling_params == params


def test_the_request_decides_how_a_pruned_trace_is_reported_and_else_the_server() -> None:
    assert pruned_mode(None, CONFIG) == pruned_mode(StepRequest(), CONFIG) == "length"
    assert pruned_mode(StepRequest(pruned="omit"), CONFIG) == "omit"
