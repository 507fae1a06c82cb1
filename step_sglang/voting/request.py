"""Reads all that one request says of STEP: whether it is voted, and what its traces are.

Each process reads a request once; from then on it travels as :class:`ParsedRequest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError, VoteError, safe_repr
from step_sglang.pruning.request import StepRequest, declined, parse_request
from step_sglang.voting.answers import extractor_named
from step_sglang.voting.effort import effort_point
from step_sglang.voting.session import STREAM_INTERVAL, VoteRules

MAX_TRACES = 4096
MAX_SUFFIX = 4096  # characters
_SAMPLING_EPS = 1e-6  # SGLang's; a temperature below it is 0


@dataclass(frozen=True)
class VoteRequest:
    """A request's wish for one voted answer."""

    traces: int
    rules: VoteRules
    extract: str = "boxed"
    suffix: str | None = None  # of a chat's last user message; None: what asks for a box
    by_default: bool = False  # asked for by the server's configuration
    prune_at: float = 1.0  # share of the KV pool, where the request itself says none


def parse_vote(params: Mapping[str, Any], config: StepConfig) -> VoteRequest | None:
    """What a request's sampling parameters, and the server's default, say of a vote.

    The default applies to ordinary requests alone: one sample that generates something and says
    nothing else of STEP.

    Raises:
        RequestError: a member has a wrong type or value, or contradicts another.
    """
    step = _step(params)
    given = {} if step is None else {key: step[key] for key in protocol.VOTE_MEMBERS if key in step}
    by_default = protocol.TRACES not in given
    if by_default:
        ordinary = (
            config.traces > 1
            and params.get("n", 1) in (1, None)
            and (params.get("beam_width") or 1) == 1
            and params.get("max_new_tokens", 1) != 0
            and set(step or ()) <= {*protocol.VOTE_MEMBERS, protocol.PRUNED, protocol.SAMPLE}
            and (_value(params) is None or step is not None)
        )
        if not ordinary:
            if given:
                raise RequestError(
                    f"custom_params.step.{next(iter(given))} needs traces beside it, the number "
                    "of traces to vote"
                )
            return None
    elif params.get("n", 1) not in (1, None):
        raise RequestError("custom_params.step.traces returns one choice: it needs n = 1")
    traces = given.get(protocol.TRACES, config.traces)
    if not isinstance(traces, int) or isinstance(traces, bool) or not 1 <= traces <= MAX_TRACES:
        raise RequestError(
            f"custom_params.step.traces must be an integer from 1 to {MAX_TRACES}, "
            f"not {safe_repr(traces)}"
        )
    if not by_default and traces > 1 and is_greedy(params.get("temperature")):
        raise RequestError(
            "custom_params.step.traces needs a temperature above 0: at 0 all traces are the same"
        )
    extract = given.get(protocol.EXTRACT, config.extract)
    try:
        extractor_named(extract)
        dial = effort_point(given.get(protocol.EFFORT, config.effort))
        rules = VoteRules(
            vote=given.get(protocol.VOTE, config.vote),
            early=given.get(protocol.EARLY, dial.early),
            threshold=given.get(protocol.THRESHOLD, dial.threshold),
            shrink=given.get(protocol.SHRINK, dial.shrink),
        )
    except VoteError as error:
        raise RequestError(f"custom_params.step: {error}") from error
    suffix = given.get(protocol.SUFFIX)
    if not isinstance(suffix, str | None) or len(suffix or "") > MAX_SUFFIX:
        raise RequestError(
            f"custom_params.step.suffix must be a text of at most {MAX_SUFFIX} characters, "
            f"not {safe_repr(suffix)}"
        )
    prune_at = 1.0 if config.policy == "paper" else dial.prune_at
    return VoteRequest(traces, rules, extract, suffix, by_default, prune_at)


@dataclass(frozen=True)
class ParsedRequest:
    """All that one request says of STEP, checked.

    ``trace``: what it, or each of its samples, is as a trace; None where it said nothing of that.
    ``vote``: it gets one voted answer. ``declined``: it opted out with ``{"step": false}``.
    ``voted``: it is the group of such a request, whose traces nobody reads before their end.
    ``extract``: how its answers are read, where that is not as the server does.
    """

    trace: StepRequest | None = None
    vote: VoteRequest | None = None
    declined: bool = False
    voted: bool = False
    extract: str | None = None


def parse(params: Mapping[str, Any], config: StepConfig) -> ParsedRequest:
    """Read a request's sampling parameters.

    Raises:
        RequestError: ``custom_params.step`` is malformed.
    """
    vote = parse_vote(params, config)
    custom = params.get("custom_params")
    n = params.get("n")
    # SGLang copies the request as often before anything else looks at it.
    if isinstance(n, int) and n > MAX_TRACES and not declined(custom):
        raise RequestError(f"n is {safe_repr(n)}, but a group has at most {MAX_TRACES} traces")
    trace = parse_request(custom if vote is None else without_vote(custom))
    return ParsedRequest(trace, vote, declined(custom))


def without_vote(custom_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copy of ``custom_params`` that says nothing of a vote."""
    params = dict(custom_params or {})
    value = params.get(protocol.REQUEST_KEY)
    if isinstance(value, Mapping):
        rest = {key: value[key] for key in value if key not in protocol.VOTE_MEMBERS}
        params[protocol.REQUEST_KEY] = rest
    return params


def trace_params(
    params: Mapping[str, Any], wish: VoteRequest, config: StepConfig
) -> dict[str, Any]:
    """Sampling parameters of the group that a voted request becomes."""
    custom = without_vote(params.get("custom_params"))
    step = custom.get(protocol.REQUEST_KEY) or {}
    if wish.prune_at < 1 and step.get(protocol.PRUNE_AT) is None:
        step = {**step, protocol.PRUNE_AT: wish.prune_at}
    custom[protocol.REQUEST_KEY] = step
    changed: dict[str, Any] = {
        "n": wish.traces,
        "stream_interval": STREAM_INTERVAL,
        "custom_params": custom,
    }
    if wish.by_default and is_greedy(params.get("temperature")):
        changed["temperature"] = config.temperature
    return {**params, **changed}


def is_greedy(temperature: Any) -> bool:
    """Whether SGLang takes the likeliest token (``SamplingParams.normalize``)."""
    return isinstance(temperature, int | float) and 0 <= temperature < _SAMPLING_EPS


def _value(params: Mapping[str, Any]) -> Any:
    custom = params.get("custom_params")
    return custom.get(protocol.REQUEST_KEY) if isinstance(custom, Mapping) else custom


def _step(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``custom_params.step`` when it is an object; what else it may be is checked elsewhere."""
    value = _value(params)
    return value if isinstance(value, Mapping) else None
