"""Reads what one request says about STEP: ``custom_params.step``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from step_sglang import protocol
from step_sglang.baselines import Baseline, parse_baseline
from step_sglang.errors import RequestError, safe_repr

MAX_GROUP_LENGTH = 256  # characters
MAX_WEIGHT = 1e6  # of a group; its inverse is the least
_ALL = 2**31 - 1  # survivors: more than a group has traces, whatever requests these came with


@dataclass(frozen=True)
class StepRequest:
    """What a request says of itself as a trace. ``group`` None: it forms a group of its own.

    ``weight``: divides the group's KV share. ``min_survivors`` None: the server's setting.
    ``prune_at``: the share of the KV pool that the group may hold before its worst trace is pruned.
    ``trace``: the request continues the group's trace of that name, and its score.

    ``baseline``: another method than STEP judges the group's traces. ``record``: the final response
    says when each token came, and its confidence.

    ``refill``: what becomes of the places of the group's pruned traces, one of
    ``protocol.REFILL_MODES``; None: as the server does.

    ``pruned``: how a pruned trace is reported, one of ``protocol.PRUNED_MODES``; None: as the
    server does. ``show_text``: whoever looks at the live page may see the text of its steps.
    ``sample`` false: its group is never kept for training.

    ``prompt_tokens`` P: the input already holds a trace from token P on, whose hidden states are
    wanted (only with ``hidden_states``, on a server that captures).
    """

    group: str | None = None
    step_scores: bool = False
    hidden_states: bool = False
    prompt_tokens: int | None = None
    weight: float = 1.0
    min_survivors: int | None = None
    prune_at: float = 1.0
    trace: str | None = None
    baseline: Baseline | None = None
    record: bool = False
    pruned: str | None = None
    show_text: bool = False
    refill: str | None = None
    sample: bool = True


def parse_request(custom_params: Mapping[str, Any] | None) -> StepRequest | None:
    """Validate ``custom_params["step"]``.

    Absent, null and false mean that the request does not use STEP; true and ``{}`` mean defaults.

    Returns:
        What it says, or None for a request that does not use STEP.

    Raises:
        RequestError: the value has a wrong type or an unknown member.
    """
    if custom_params is not None and not isinstance(custom_params, Mapping):
        raise RequestError(f"custom_params must be an object, not a {type(custom_params).__name__}")
    value = None if custom_params is None else custom_params.get(protocol.REQUEST_KEY)
    if value is None or value is False:
        return None
    if value is True:
        return StepRequest()
    if not isinstance(value, Mapping):
        raise RequestError(
            "custom_params.step must be true, false or an object such as "
            f'{{"group": "q1"}}, not a {type(value).__name__}'
        )
    unknown = sorted(safe_repr(name) for name in value if name not in protocol.REQUEST_MEMBERS)
    if unknown:
        raise RequestError(
            f"custom_params.step has unknown members [{', '.join(unknown[:8])}]; "
            f"it may have {[*protocol.REQUEST_MEMBERS, *protocol.VOTE_MEMBERS]}"
        )
    group, trace = _name(value, protocol.GROUP), _name(value, protocol.TRACE)
    if trace is not None and group is None:
        raise RequestError("custom_params.step.trace needs the name of its group beside it")
    prompt_tokens = value.get(protocol.PROMPT_TOKENS)
    if prompt_tokens is not None and (
        not isinstance(prompt_tokens, int) or isinstance(prompt_tokens, bool) or prompt_tokens < 0
    ):
        raise RequestError(
            "custom_params.step.prompt_tokens must be an integer of tokens, "
            f"not {safe_repr(prompt_tokens)}"
        )
    step_request = StepRequest(
        group=group,
        trace=trace,
        weight=_weight(value),
        min_survivors=_min_survivors(value),
        prune_at=_prune_at(value),
        step_scores=_flag(value, protocol.STEP_SCORES),
        hidden_states=_flag(value, protocol.HIDDEN_STATES),
        prompt_tokens=prompt_tokens,
        baseline=_baseline(value),
        record=_flag(value, protocol.RECORD),
        show_text=_flag(value, protocol.SHOW_TEXT),
        pruned=_word(value, protocol.PRUNED, protocol.PRUNED_MODES),
        refill=_word(value, protocol.REFILL, protocol.REFILL_MODES),
        sample=_flag(value, protocol.SAMPLE, absent=True),
    )
    if prompt_tokens is not None and not step_request.hidden_states:
        raise RequestError("custom_params.step.prompt_tokens needs hidden_states: true beside it")
    return step_request


def check_group_id(group: object, where: str) -> str:
    """The group id, when it is one.

    Raises:
        RequestError: it is no string of 1 to ``MAX_GROUP_LENGTH`` characters; ``where`` names it.
    """
    if isinstance(group, str) and 1 <= len(group) <= MAX_GROUP_LENGTH:
        if any("\ud800" <= character <= "\udfff" for character in group):
            raise RequestError(f"{where} has a lone surrogate, which no response can carry")
        return group
    shown = f"{len(group)} characters" if isinstance(group, str) else f"a {type(group).__name__}"
    raise RequestError(
        f"{where} must be a string of 1 to {MAX_GROUP_LENGTH} characters, not {shown}"
    )


def check_group_size(step_request: StepRequest, samples: int) -> None:
    """Refuse a minimum of survivors that the group can never have.

    Args:
        step_request: as the request itself said them, before it was given a group.
        samples: the request's ``n``. A request that names a group may be one of many members, so
            only several samples of its own, or a group of its own, say how large the group is.

    Raises:
        RequestError: ``min_survivors`` is larger than ``n``.
    """
    if step_request.min_survivors is None or step_request.min_survivors <= samples:
        return
    if samples > 1 or step_request.group is None:
        raise RequestError(
            f"custom_params.step.min_survivors is {safe_repr(step_request.min_survivors)}, but the "
            f"request asks for only {samples} samples (n): give at most n"
        )


def _weight(value: Mapping[str, Any]) -> float:
    weight = value.get(protocol.WEIGHT)
    if weight is None:
        return 1.0
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT
    ):
        raise RequestError(
            "custom_params.step.weight must be a number between "
            f"{1 / MAX_WEIGHT:g} and {MAX_WEIGHT:g}, not {safe_repr(weight)}"
        )
    return float(weight)


def _min_survivors(value: Mapping[str, Any]) -> int | None:
    minimum = value.get(protocol.MIN_SURVIVORS)
    if minimum is None:
        return None
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 1:
        raise RequestError(
            "custom_params.step.min_survivors must be an integer of at least 1, "
            f"not {safe_repr(minimum)}"
        )
    return minimum


def _prune_at(value: Mapping[str, Any]) -> float:
    share = value.get(protocol.PRUNE_AT)
    if share is None:
        return 1.0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise RequestError(
            "custom_params.step.prune_at must be a share of the KV pool, above 0 and at most 1, "
            f"not {safe_repr(share)}"
        )
    return float(share)


def _word(value: Mapping[str, Any], member: str, words: Sequence[str]) -> str | None:
    word = value.get(member)
    if word is None or (isinstance(word, str) and word in words):
        return word
    raise RequestError(
        f"custom_params.step.{member} must be one of {', '.join(words)}, not {safe_repr(word)}"
    )


def _baseline(value: Mapping[str, Any]) -> Baseline | None:
    baseline = value.get(protocol.BASELINE)
    return None if baseline is None else parse_baseline(baseline)


def _name(value: Mapping[str, Any], member: str) -> str | None:
    name = value.get(member)
    return None if name is None else check_group_id(name, f"custom_params.step.{member}")


def _flag(value: Mapping[str, Any], name: str, absent: bool = False) -> bool:
    flag = value.get(name, absent)
    if not isinstance(flag, bool):
        raise RequestError(
            f"custom_params.step.{name} must be true or false, not a {type(flag).__name__}"
        )
    return flag


def declined(custom_params: Mapping[str, Any] | None) -> bool:
    """Whether the request opted out with ``{"step": false}``."""
    return (
        isinstance(custom_params, Mapping)
        and custom_params.get(protocol.REQUEST_KEY, None) is False
    )


def unpacked(custom_params: Any, session_params: Any) -> tuple[Any, Any]:
    """Both of a request, after what ``session_params.step`` says moved to ``custom_params``.

    sglang-router forwards the fields that it knows; of these, session_params alone takes values of
    any form on every endpoint. What ``custom_params.step`` says itself wins.
    """
    if not isinstance(session_params, Mapping) or protocol.REQUEST_KEY not in session_params:
        return custom_params, session_params
    rest = dict(session_params)
    said = rest.pop(protocol.REQUEST_KEY)
    if custom_params is None or isinstance(custom_params, Mapping):
        custom_params = {protocol.REQUEST_KEY: said, **(custom_params or {})}
    return custom_params, rest or None


def as_sample(step_request: StepRequest | None, new_group: Callable[[], str]) -> StepRequest:
    """What each of several samples of a prompt is: in a new group, unless the request named one.

    Raises:
        RequestError: the request names a trace, which only one sample can be.
    """
    step_request = step_request or StepRequest()
    if step_request.trace is not None:
        raise RequestError("custom_params.step.trace names one trace: it needs n = 1")
    if step_request.group is not None:
        return step_request
    return replace(step_request, group=new_group())


def with_refill(custom_params: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """Copy of checked ``custom_params`` of a trace that say what the scheduler shall do."""
    value = custom_params[protocol.REQUEST_KEY]
    members = value if isinstance(value, Mapping) else {}
    return {**custom_params, protocol.REQUEST_KEY: {**members, protocol.REFILL: mode}}


def spared(custom_params: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of checked ``custom_params`` of a group's trace by which none of it is pruned."""
    value = custom_params[protocol.REQUEST_KEY]
    members = dict(value) if isinstance(value, Mapping) else {}
    members.pop(protocol.PRUNE_AT, None)
    members[protocol.REFILL] = protocol.REFILL_OFF  # there will be no places to fill
    return {**custom_params, protocol.REQUEST_KEY: {**members, protocol.MIN_SURVIVORS: _ALL}}


def refill_of(
    step_request: StepRequest, default: str, samples: int, min_survivors: int, why_not: str | None
) -> str:
    """What becomes of the places of a trace's group.

    Args:
        step_request: as it reaches the scheduler.
        default: the server's setting.
        samples: the request's ``n``; 1 with a group may be one of many.
        min_survivors: the group's.
        why_not: why the request itself cannot have branches, if it cannot.

    Raises:
        RequestError: it asks for branches that it cannot have.
    """
    asked = step_request.refill
    wanted = default if asked is None else asked
    if wanted == protocol.REFILL_OFF:
        return wanted
    if why_not is None and step_request.baseline is not None:
        why_not = "traces that a baseline judges are ended for good: leave baseline out"
    if why_not is None and samples == 1 and step_request.group is None:
        why_not = "a single trace has none to branch from: ask for several samples (n) or traces"
    if why_not is None and samples > 1 and min_survivors >= samples:
        why_not = f"none of {samples} traces is pruned: give a min_survivors below n"
    if why_not is None:
        return wanted
    if asked is None:
        return protocol.REFILL_OFF
    raise RequestError(f"custom_params.step.refill is {asked!r}, but {why_not}")


def with_group(custom_params: Mapping[str, Any] | None, group: str) -> dict[str, Any]:
    """Copy of checked ``custom_params`` that names ``group``, as the scheduler will read it."""
    params = dict(custom_params or {})
    value = params.get(protocol.REQUEST_KEY)
    members = value if isinstance(value, Mapping) else {}
    return {**params, protocol.REQUEST_KEY: {**members, protocol.GROUP: group}}
