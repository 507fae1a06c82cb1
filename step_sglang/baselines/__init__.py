"""What other methods judge a trace by, and when they end it: for comparison with STEP.

A method is what a request asks for (a frozen description) and the signal it gives to each trace.
The engine feeds every output token to the signal; the signal answers which trace is to end now, or
how the trace ranks when memory is short. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from step_sglang import protocol
from step_sglang.baselines.base import DEFAULT_TOP_K, Baseline, EngineContext, Signal
from step_sglang.baselines.controls import Longest, Random
from step_sglang.baselines.deepconf import MAX_TOP_K, DeepConf, LowestConfidence
from step_sglang.baselines.slim_sc import SlimSC, Thoughts
from step_sglang.errors import RequestError, safe_repr

__all__ = [
    "BASELINES", "DEFAULT_TOP_K", "MAX_TOP_K", "Baseline", "DeepConf", "EngineContext", "Longest",
    "LowestConfidence", "Random", "Signal", "SlimSC", "Thoughts", "parse_baseline",
]  # fmt: skip

BASELINES: Mapping[str, type[Baseline]] = {
    method.NAME: method for method in (Random, Longest, DeepConf, SlimSC)
}


def parse_baseline(value: object) -> Baseline:
    """Read ``custom_params.step.baseline``.

    Raises:
        RequestError: it names no method, or one of its parameters is wrong.
    """
    where = f"custom_params.step.{protocol.BASELINE}"
    if not isinstance(value, Mapping):
        raise RequestError(f'{where} must be an object such as {{"name": "deepconf"}}')
    name = value.get("name")
    method = BASELINES.get(name) if isinstance(name, str) else None
    if method is None:
        raise RequestError(
            f"{where}.name must be one of {', '.join(BASELINES)}, not {safe_repr(name)}"
        )
    known = {option.name for option in fields(method)}
    unknown = sorted(str(key)[:40] for key in value if key != "name" and key not in known)
    if unknown:
        raise RequestError(f"{where} {name!r} has no {unknown}; it may have {sorted(known)}")
    return method(**{key: item for key, item in value.items() if key != "name"})
