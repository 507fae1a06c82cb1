"""Traces that a virtual GPU's model plays, and how their tokens are counted in coarser units."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

TAIL = 3  # tokens at a trace's end: think-end, the answer, the end


@dataclass(frozen=True, eq=False)
class PlayedTrace:
    """One trace. S steps, whose boundary tokens are scored.

    ``answer`` None: its end has no answer. ``ends`` False: it is cut at the limit of its length.
    """

    tokens: int
    answer: str | None
    positions: npt.NDArray[np.int64]  # [S] output index of each boundary token, ascending
    scores: npt.NDArray[np.float32]  # [S] step scores, between 0 and 1
    ends: bool = True


@dataclass(frozen=True, eq=False)
class PlayedGroup:
    """All traces of a question. ``draw``: which of several drawings of traces or scores it is.

    ``calibration``: slope and bias of the scorer that scored them; None: it has none, and votes by
    odds are those by trace score.
    """

    question: str
    draw: int
    gold: str
    prompt_tokens: int
    traces: tuple[PlayedTrace, ...]
    calibration: tuple[float, float] | None = None


def in_units(group: PlayedGroup, unit: int) -> PlayedGroup:
    """The group with every length divided by ``unit``.

    Steps that fall on the same token are one, with their mean score; those that fall on the tokens
    of a trace's end are left out.
    """
    if unit == 1:
        return group
    traces = tuple(_in_units(trace, unit) for trace in group.traces)
    return replace(group, prompt_tokens=_divided(group.prompt_tokens, unit), traces=traces)


def _in_units(trace: PlayedTrace, unit: int) -> PlayedTrace:
    places, which = np.unique(trace.positions // unit, return_inverse=True)
    sums = np.bincount(which, trace.scores, len(places))
    scores = (sums / np.maximum(1, np.bincount(which, minlength=len(places)))).astype(np.float32)
    tokens = _divided(trace.tokens, unit)
    kept = places < (tokens - TAIL if trace.ends else tokens)
    return replace(trace, tokens=tokens, positions=places[kept], scores=scores[kept])


def _divided(tokens: int, unit: int) -> int:
    return max(1, round(tokens / unit))
