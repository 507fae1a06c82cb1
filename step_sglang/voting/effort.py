"""One dial for a vote: how much may be saved at which risk, as points of a measured frontier.

The points are chosen from simulations (`bench/shares.py`, docs/results.md), not from live runs.
Each option that a request says itself wins over the dial's.
"""

from __future__ import annotations

from dataclasses import dataclass

from step_sglang.errors import VoteError, nearest, safe_repr
from step_sglang.protocol import EFFORTS

_FAST, _BALANCED, _THOROUGH = EFFORTS


@dataclass(frozen=True)
class EffortPoint:
    """What the dial sets; the names are those of the request's members."""

    early: str
    threshold: float  # of the posterior rule
    shrink: float  # 0: never
    prune_at: float  # share of the KV pool


_POINTS = {
    _FAST: EffortPoint("posterior", 0.05, 0.1, 0.25),
    _BALANCED: EffortPoint("posterior", 0.01, 0.05, 0.5),
    _THOROUGH: EffortPoint("exact", 0.01, 0.0, 1.0),
}
# Between balanced and thorough the rules grow strict towards this, and at thorough they are off.
_STRICTEST = EffortPoint("posterior", 0.001, 0.001, 1.0)


def effort_point(effort: object) -> EffortPoint:
    """The point of a word, or of a number from 0 (fast) by 0.5 (balanced) to 1 (thorough).

    Numbers in between have options in between, each by the ratio of its neighbours.

    Raises:
        VoteError: it is neither.
    """
    if isinstance(effort, str) and effort in _POINTS:
        return _POINTS[effort]
    number = isinstance(effort, int | float) and not isinstance(effort, bool)
    if not (number and 0 <= effort <= 1):  # type: ignore[operator]
        near = nearest(effort, EFFORTS) if isinstance(effort, str) else ""
        raise VoteError(
            f"effort must be {', '.join(EFFORTS)} or a number from 0 (fast) to 1 (thorough), not "
            f"{safe_repr(effort)}{near}"
        )
    place = float(effort)  # type: ignore[arg-type]
    if place == 1:
        return _POINTS[_THOROUGH]
    lower, upper = _POINTS[_FAST], _POINTS[_BALANCED]
    if place >= 0.5:
        lower, upper, place = upper, _STRICTEST, place - 0.5

    def between(one: float, other: float) -> float:
        return float(one * (other / one) ** (2 * place))

    return EffortPoint(
        "posterior",
        between(lower.threshold, upper.threshold),
        between(lower.shrink, upper.shrink),
        between(lower.prune_at, upper.prune_at),
    )
