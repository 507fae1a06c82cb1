"""How much of their text live traces share with one another: what ends with one of them alone.

Knows nothing of SGLang. A trace that waits counts as one that shares: it comes back to that text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Member(Protocol):
    """A trace of a family."""

    common: int

    @property
    def parts(self) -> Sequence[tuple[str, int]]:
        """Of each trace whose text it is made of, the name and where its part ends; last itself."""

    def share(self, tokens: int) -> None:
        """Set ``common``: the most that it shares with another live trace has changed."""


class Family:
    """The live traces of one root. Keeps what each has in common with the nearest other."""

    __slots__ = ("_live",)

    def __init__(self) -> None:
        self._live: dict[Member, None] = {}

    def add(self, trace: Member) -> None:
        """A trace lives."""
        for other in self._live:
            tokens = shared_text(trace, other)
            trace.common = max(trace.common, tokens)
            if tokens > other.common:
                other.share(tokens)
        self._live[trace] = None

    def remove(self, trace: Member) -> None:
        """A trace ended: what only one other had in common with it is that one's own now."""
        self._live.pop(trace, None)
        for other in self._live:
            # The others share as much as before, if this one was not among its nearest.
            if 0 < other.common <= shared_text(trace, other):
                left = self._common(other)
                if left != other.common:
                    other.share(left)

    def _common(self, trace: Member) -> int:
        most = 0
        for other in self._live:
            if other is not trace:
                most = max(most, shared_text(trace, other))
                if most >= trace.common:  # no more than while there was another to share it
                    break
        return most


def shared_text(trace: Member, other: Member) -> int:
    """Output tokens from the beginning that two live traces of a family have from the same one."""
    tokens = 0
    for (name, end), (other_name, other_end) in zip(trace.parts, other.parts, strict=False):
        if name != other_name:
            break
        tokens = min(end, other_end)
        if end != other_end:
            break
    return tokens
