"""What a request says of STEP, kept on SGLang's request object: read and checked once.

Holds for the tokenizer manager's process. The scheduler reads what crosses to it when it creates
its own request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches.server_args import config_of, replicas
from step_sglang.pruning.affinity import GroupIds
from step_sglang.pruning.request import StepRequest, as_sample, unpacked, with_group
from step_sglang.voting.request import ParsedRequest, parse

_PARSED = "step_parsed"  # one for all prompts of the request, or one for each
_NOTHING = ParsedRequest()
_CARRIED = {protocol.REQUEST_KEY, protocol.SAMPLING_KEY}


def parse_prompts(obj: Any, config: StepConfig) -> tuple[ParsedRequest, ...]:
    """What a request says, parsed at the first call: one for all of its prompts, or one for each.

    Raises:
        RequestError: it is malformed.
    """
    known: tuple[ParsedRequest, ...] | None = getattr(obj, _PARSED, None)
    if known is None:
        if not hasattr(obj, "is_single"):
            # SGLang's task that ends a stream's request reads it, also of one that is refused.
            obj.is_single = not isinstance(obj.rid, list)
        _unpack(obj)
        params = obj.sampling_params
        every = params if isinstance(params, list) else [params]
        # SGLang says itself what is wrong with parameters that are no object.
        known = tuple(parse(one if isinstance(one, Mapping) else {}, config) for one in every)
        set_parsed(obj, *known)
    return known


def _unpack(obj: Any) -> None:
    """Put what came in ``session_params`` where every other request says it."""
    session, params = obj.session_params, obj.sampling_params
    if not isinstance(session, Mapping) or not {*session} & _CARRIED:
        return
    every = params if isinstance(params, list) else [{} if params is None else params]
    if not every or not all(isinstance(one, Mapping) for one in every):
        return
    rest = {key: value for key, value in session.items() if key != protocol.SAMPLING_KEY}
    more = session.get(protocol.SAMPLING_KEY, {})
    if not isinstance(more, Mapping):
        raise RequestError(
            f"session_params.{protocol.SAMPLING_KEY} must be an object of sampling parameters, not "
            f"a {type(more).__name__}"
        )
    _check_sampling(more)
    changed = []
    for one in every:
        custom, left = unpacked(one.get("custom_params"), rest)
        changed.append({**one, **more, "custom_params": custom})
    obj.sampling_params = changed if isinstance(params, list) else changed[0]
    obj.session_params = left or None


def _check_sampling(params: Mapping[str, Any]) -> None:
    """Refuse what SGLang refuses in the ``sampling_params`` of a body, before we are asked."""
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    wrong = generate_contract_error({"sampling_params": dict(params)})
    if wrong is not None:
        raise RequestError(f"session_params.{protocol.SAMPLING_KEY}: {wrong}")


def parsed_of(obj: Any) -> ParsedRequest:
    """What a request of one prompt said; nothing, for one that STEP does not look at."""
    known: tuple[ParsedRequest, ...] = getattr(obj, _PARSED, (_NOTHING,))
    return known[0]


def set_parsed(obj: Any, *parsed: ParsedRequest) -> None:
    """Let a request say this."""
    setattr(obj, _PARSED, parsed)


def pruned_mode(trace: StepRequest | None, config: StepConfig) -> str:
    """How a trace that was pruned is reported."""
    return (None if trace is None else trace.pruned) or config.pruned


def takes_part(obj: Any) -> bool:
    """Whether it is a request whose ``custom_params.step`` counts."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        return False
    return not (isinstance(obj.rid, str) and obj.rid.startswith(HEALTH_CHECK_RID_PREFIX))


def hand_out(obj: Any) -> list[Any]:
    """Tell each prompt of a normalized request what it said; returns these prompts' requests."""
    if obj.is_single:
        return [obj]
    known = getattr(obj, _PARSED, (_NOTHING,))
    items = [obj[i] for i in range(obj.batch_size)]  # cached by the request object
    for i, item in enumerate(items):
        set_parsed(item, known[i % len(known)])
    return items


def init_req_state(manager: Any, obj: Any, request: Any = None) -> None:
    """BEFORE ``TokenizerManager._init_req_state``: the request is normalized, and has no state yet.

    The manager turns n > 1 into n requests with fresh ids, copies of its prompts' requests; nothing
    else ties them together than the group that these are given here.
    """
    # Those copies come here too, but were never normalized by themselves.
    if config_of(manager.server_args) is None or getattr(obj, "is_single", True):
        return
    if not hasattr(obj, _PARSED):
        return
    items = hand_out(obj)
    if getattr(obj, "parallel_sample_num", 1) == 1:
        return
    for item in items:
        parsed = parsed_of(item)
        if parsed.declined:
            continue
        trace = as_sample(parsed.trace, _group_ids(replicas()).new)
        assert trace.group is not None
        params = dict(item.sampling_params or {})
        params["custom_params"] = with_group(params.get("custom_params"), trace.group)
        item.sampling_params = params
        set_parsed(item, replace(parsed, trace=trace))


@lru_cache
def _group_ids(number: int) -> GroupIds:
    return GroupIds(number)
