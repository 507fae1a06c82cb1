"""Owns the life of traces and groups: who lives, who finished, each trace's score.

Knows nothing of SGLang; the device's per-slot state is mirrored here, so that a trace
keeps its score when it loses its slot to a retraction.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from step_sglang import words
from step_sglang.capture import Capture

MAX_NAMED = 65536  # named traces whose score is kept for a continuation


class Fate(Enum):
    """How a trace stands."""

    LIVE = "live"  # running or waiting
    FINISHED = "finished"  # ended normally
    PRUNED = "pruned"
    ABORTED = "aborted"


@dataclass(slots=True)
class Group:
    """All traces of one question."""

    group_id: str
    weight: float = 1.0
    min_survivors: int = 1
    live: int = 0
    finished: int = 0

    @property
    def survivors(self) -> int:
        """Traces that are running, waiting or finished normally."""
        return self.live + self.finished

    @property
    def prunable(self) -> bool:
        """Whether it may lose a trace."""
        return self.survivors > self.min_survivors


@dataclass(slots=True)
class Trace:
    """One sampled continuation. Its score is mirrored from the device after every step."""

    group: Group
    step_scores: list[float] | None = None  # kept only when the request asked for them
    positions: list[int] | None = None  # of the boundary tokens in the output; likewise
    capture: Capture | None = None
    score_sum: float = 0.0
    num_steps: int = 0
    fate: Fate = Fate.LIVE
    name: str | None = None  # within its group, for requests that continue it
    prompt_tokens: int = 0  # of its first request

    @property
    def score(self) -> float | None:
        """Running mean of the step scores; None until the first step."""
        return self.score_sum / self.num_steps if self.num_steps else None

    def record(self, step_score: float, score_sum: float, position: int) -> None:
        """Take over one scored step as the device computed it; NaN means no step ended."""
        if math.isnan(step_score):
            return
        self.score_sum = score_sum
        self.num_steps += 1
        if self.step_scores is not None:
            self.step_scores.append(step_score)
        if self.positions is not None:
            self.positions.append(position)

    def meta(self) -> dict[str, Any]:
        """The response's ``meta_info["step"]``; what grows with the trace only at the end."""
        info: dict[str, Any] = {
            words.META_GROUP: self.group.group_id,
            words.META_SCORE: self.score,
            words.META_NUM_STEPS: self.num_steps,
            words.META_PRUNED: self.fate is Fate.PRUNED,
        }
        if self.fate is Fate.LIVE:
            return info
        if self.step_scores is not None:
            info[words.META_STEP_SCORES] = list(self.step_scores)
        if self.positions is not None:
            info[words.META_POSITIONS] = list(self.positions)
        if self.capture is not None:
            info[words.META_HIDDEN_STATES] = self.capture.encode()
        return info


@dataclass(slots=True, eq=False)
class GroupRegistry:
    """The groups that have a live trace. A group is forgotten when its last live trace ends.

    ``observer`` is called with every trace that has joined or ended.
    """

    _groups: dict[str, Group] = field(default_factory=dict)
    # Named traces that ended, by group and name, the oldest first. They outlive their group,
    # because a program may have no live trace between two of its requests.
    _named: OrderedDict[tuple[str, str], Trace] = field(default_factory=OrderedDict)
    num_live: int = 0
    num_finished: int = 0  # traces, of these groups
    observer: Callable[[Trace], None] | None = None

    @property
    def num_survivors(self) -> int:
        """Traces of these groups that are running, waiting or finished normally."""
        return self.num_live + self.num_finished

    def join(
        self,
        group_id: str,
        *,
        weight: float = 1.0,
        min_survivors: int = 1,
        name: str | None = None,
        prompt_tokens: int = 0,
        step_scores: bool = False,
        capture: Capture | None = None,
    ) -> Trace:
        """Add a live trace to a group, which begins with it when it is new.

        Where members disagree on the weight or the minimum, the largest value wins.
        A named trace that ended before starts from its score then, and no longer counts as
        finished.
        """
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = Group(group_id, weight, min_survivors)
        group.weight = max(group.weight, weight)
        group.min_survivors = max(group.min_survivors, min_survivors)
        group.live += 1
        self.num_live += 1
        trace = Trace(
            group,
            step_scores=[] if step_scores else None,
            positions=_positions(capture) if step_scores or capture is not None else None,
            capture=capture,
            name=name,
            prompt_tokens=prompt_tokens,
        )
        before = None if name is None else self._named.pop((group_id, name), None)
        if before is not None:
            trace.score_sum, trace.num_steps = before.score_sum, before.num_steps
            trace.prompt_tokens = before.prompt_tokens
            if before.fate is Fate.FINISHED and before.group is group:
                group.finished -= 1
                self.num_finished -= 1
        if self.observer is not None:
            self.observer(trace)
        return trace

    def end(self, trace: Trace, fate: Fate) -> None:
        """Record how a live trace ended; a second call for the same trace does nothing."""
        if trace.fate is not Fate.LIVE:
            return
        trace.fate = fate
        group = trace.group
        group.live -= 1
        self.num_live -= 1
        if fate is Fate.FINISHED:
            group.finished += 1
            self.num_finished += 1
        if trace.name is not None:
            self._named[group.group_id, trace.name] = trace
            if len(self._named) > MAX_NAMED:
                self._named.popitem(last=False)
        if group.live == 0 and self._groups.get(group.group_id) is group:
            del self._groups[group.group_id]
            self.num_finished -= group.finished
        if self.observer is not None:
            self.observer(trace)

    def __len__(self) -> int:
        return len(self._groups)


def _positions(capture: Capture | None) -> list[int]:
    """Those of a trace that the input holds are known; those of a generated one are recorded."""
    if capture is None or capture.prompt_tokens is None:
        return []
    return [position - capture.prompt_tokens for position in capture.wanted]
