"""The base of every other method: what a signal is told, and what a request may set.

Knows nothing of SGLang, and of a trace only what the protocols here say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from step_sglang import protocol
from step_sglang.baselines.embedding import Embedding
from step_sglang.errors import RequestError, safe_repr

DEFAULT_TOP_K = 20  # candidates of a token confidence (DeepConf, arXiv 2508.15260, section 4.1)


class JudgedGroup(Protocol):
    """What a method sees of a group."""

    group_id: str
    method_state: Any  # the method's own, shared by the group's traces; dropped with the group


class JudgedTrace(Protocol):
    """What a method sees of a trace."""

    @property
    def group(self) -> JudgedGroup:
        """The group that it belongs to."""
        ...

    @property
    def is_active(self) -> bool:
        """Whether it still generates and is not about to end."""
        ...


@dataclass(frozen=True)
class EngineContext:
    """What signals may know of the engine."""

    boundaries: frozenset[int]  # token ids that end a step
    think_end_id: int | None
    embedding: Embedding


class Signal:
    """Judges one trace; this one never has anything to say."""

    watches_tokens = False
    top_k = 0  # candidates of the token confidence that it wants; 0: none

    def token(self, token: int, confidence: float) -> JudgedTrace | None:
        """Take over an output token; returns a trace of the group that is to end now."""
        return None

    def rank_key(self, length: int) -> tuple[float, int]:
        """(score sum, number of steps) by which it ranks among its group when memory is short."""
        raise NotImplementedError

    def meta(self) -> dict[str, Any]:
        """What the response says of it."""
        return {}


@dataclass(frozen=True)
class Baseline(ABC):
    """A method as a request asks for it."""

    NAME: ClassVar[str]
    # Whether a trace may be pruned because memory is short. The others end traces by themselves,
    # and their memory is managed as an ordinary request's.
    FOR_MEMORY: ClassVar[bool] = False
    REASON: ClassVar[str] = ""  # why it ends a trace, in the log line and the metrics
    # Whether it may end the last survivors of a group.
    ENDS_SURVIVORS: ClassVar[bool] = False

    @abstractmethod
    def signal(self, trace: JudgedTrace, number: int, context: EngineContext) -> Signal:
        """The signal of a trace that joined its group as its ``number``-th."""


def wrong_parameter(method: Baseline, name: str, right: str) -> RequestError:
    """The error that says what a parameter must be."""
    found = safe_repr(getattr(method, name))
    return RequestError(
        f"custom_params.step.{protocol.BASELINE}.{name} must be {right}, not {found}"
    )


def check_integer(method: Baseline, name: str, low: int, high: int) -> None:
    """Refuse what is no integer in the range."""
    value = getattr(method, name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong_parameter(method, name, f"an integer from {low} to {high}")


def check_number(method: Baseline, name: str, low: float, high: float) -> None:
    """Refuse what is no number in the range."""
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise wrong_parameter(method, name, f"a number from {low:g} to {high:g}")
