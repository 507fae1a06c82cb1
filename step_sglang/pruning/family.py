"""How much of their text live traces share with one another: what ends with one of them alone.

Knows nothing of SGLang. A trace that waits counts as one that shares: it comes back to that text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step_sglang.pruning.groups import Trace


class Family:
    """The live traces of one root. Keeps each one's ``common``, and tells its standing of it."""

    __slots__ = ("_live",)

    def __init__(self) -> None:
        self._live: dict[Trace, None] = {}

    def add(self, trace: Trace) -> None:
        """A trace lives."""
        for other in self._live:
            tokens = shared_text(trace, other)
            trace.common = max(trace.common, tokens)
            if tokens > other.common:
                _set(other, tokens)
        self._live[trace] = None

    def remove(self, trace: Trace) -> None:
        """A trace ended: what only one other had in common with it is that one's own now."""
        self._live.pop(trace, None)
        for other in self._live:
            # The others share as much as before, if this one was not among its nearest.
            if 0 < other.common <= shared_text(trace, other):
                left = self._common(other)
                if left != other.common:
                    _set(other, left)

    def _common(self, trace: Trace) -> int:
        most = 0
        for other in self._live:
            if other is not trace:
                most = max(most, shared_text(trace, other))
                if most >= trace.common:  # no more than while there was another to share it
                    break
        return most


def _set(trace: Trace, tokens: int) -> None:
    trace.common = tokens
    if trace.standing is not None:
        trace.standing.changed()


def shared_text(trace: Trace, other: Trace) -> int:
    """Output tokens from the beginning that two live traces of a family have from the same one."""
    tokens: float = 0
    for (name, end), (other_name, other_end) in zip(_parts(trace), _parts(other), strict=False):
        if name != other_name:
            break
        tokens = min(end, other_end)
        if end != other_end:
            break
    return int(tokens)


def _parts(trace: Trace) -> Iterator[tuple[str, float]]:
    """Of each trace whose text it is made of, the name and where its part ends; last its own."""
    if trace.origin is not None:
        for (name, _), end in zip(trace.origin.ancestors, trace.origin.ends, strict=True):
            yield name, end
    yield trace.label, math.inf
