"""The running traces' ranks and KV tokens, kept from one pruning to the next.

Hands out the victims that :class:`~step_sglang.pruning.policy.Candidates` would, which stays the
reference, without a look at every trace: a trace is ranked when it starts to run and when a step of
it is scored. Knows nothing of SGLang or torch.
"""

from __future__ import annotations

import heapq
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from step_sglang.pruning.groups import Group, Trace
from step_sglang.pruning.policy import Donors, TraceView

# Stale entries that a heap may have beside as many as it has traces.
_SPARE = 64


class Look(NamedTuple):
    """What is read of a victim where it is chosen."""

    handle: int  # the caller's own
    kv_tokens: int  # that pruning it frees
    length: int  # generated tokens


class Standing:
    """One running trace in its group's standings."""

    __slots__ = ("base", "group", "key", "order", "place", "score", "shared", "trace")

    def __init__(
        self, key: Any, trace: Trace, group: GroupStandings, order: int, base: int, shared: int
    ) -> None:
        self.key, self.trace, self.group = key, trace, group
        self.order = order  # rises with the place in the batch
        # Of its KV tokens, allocated ones less the clock, and those that it shares.
        self.base, self.shared = base, shared
        self.score: float | None = None  # None: too few steps for one
        self.place = 0  # which of its entries in the heap is the valid one; 0: none is

    def rescored(self) -> None:
        """A step of the trace was scored."""
        standings = self.group.standings
        standings.sound, sound = False, standings.sound
        self.group.rank(self)
        standings.sound = sound

    def changed(self) -> None:
        """What it shares may be another."""
        self.group.standings.unsure[self] = self.group.standings.clock

    def left(self) -> None:
        """The trace runs no more. Never fails: who ends it has its memory to free."""
        try:
            self.group.remove(self)
        except Exception:  # all is taken anew in the next step
            self.group.standings.sound = False


class GroupStandings:
    """The running traces of one group."""

    __slots__ = (
        "_best", "_ceiling", "_entries", "_floor", "_heap", "_mean", "_taken", "group", "held",
        "members", "phases", "standings", "unscored",
    )  # fmt: skip

    def __init__(self, standings: Standings, group: Group) -> None:
        self.standings, self.group = standings, group
        self.members: dict[Standing, None] = {}  # by order
        self.unscored: dict[Standing, None] = {}
        self.held = 0  # KV tokens that no other shares, at the standings' clock
        self.phases: defaultdict[int, int] = defaultdict(int)  # members by their base in a page
        self._heap: list[tuple[float, int, Standing]] = []  # the lowest score first
        self._entries = 0  # so far
        self._best: Standing | None = None  # of a high score
        self._ceiling = 0.0  # no score was larger
        # Of this round: who was handed out, the lowest score before that, the unscored's rank.
        self._taken: list[Standing] = []
        self._floor: float | None = None
        self._mean: float | None = None

    def add(self, one: Standing) -> None:
        """A trace starts to run, behind all others."""
        self.members[one] = None
        self.unscored[one] = None
        self._hold(one, 1)
        self.rank(one)

    def remove(self, one: Standing) -> None:
        """A trace runs no more."""
        if one in self.members:
            del self.members[one]
            self.unscored.pop(one, None)
            one.place = 0
            self._hold(one, -1)
            one.trace.standing = None
            self.standings.gone.append(one)
            if not self.members:
                self.standings.groups.pop(self.group, None)

    def set_tokens(self, one: Standing, base: int, shared: int) -> None:
        """Correct a trace's KV tokens."""
        if one in self.members and (base, shared) != (one.base, one.shared):
            self._hold(one, -1)
            one.base, one.shared = base, shared
            self._hold(one, 1)

    def rank(self, one: Standing) -> None:
        """Take over a trace's score."""
        score_sum, steps = one.trace.score_sum, one.trace.num_steps
        self.standings.ranked += 1
        if steps < self.standings.min_steps:
            return
        score = score_sum / steps
        if one.score == score and one.place:
            return
        one.score = score
        self.unscored.pop(one, None)
        if self._best is None or self._best.score is None or self._best.score <= score:
            self._best = one
        self._ceiling = max(self._ceiling, abs(score))
        self._push(one)

    def grow(self, steps: int) -> None:
        """Every member was given a token in each of so many steps, since the clock."""
        page, clock = self.standings.page, self.standings.clock
        around, rest = divmod(steps, page)
        self.held += around * page * len(self.members)
        for step in range(clock, clock + rest):
            self.held += page * self.phases.get(-step % page, 0)

    @property
    def growth(self) -> int:
        """KV tokens that the next step allocates to the members."""
        return self.standings.page * self.phases.get(-self.standings.clock % self.standings.page, 0)

    def begin(self) -> None:
        """A new round: who was handed out in the last one, and runs all the same, is back."""
        for one in self._taken:
            if one in self.members:
                if one.score is None:
                    self.unscored[one] = None
                else:
                    self._push(one)
        self._taken, self._floor, self._mean = [], None, None

    def take(self, look: Callable[[Any], Look]) -> tuple[Standing, Look]:
        """Hand out the worst: of the lowest score, of equals the longest."""
        rivals = self._worst()
        looks = [look(one.key) for one in rivals]
        at = max(range(len(rivals)), key=lambda i: (looks[i].length, rivals[i].order))
        for place, one in enumerate(rivals):
            if place != at and one.score is not None:
                self._push(one)
        victim = rivals[at]
        self.unscored.pop(victim, None)
        victim.place = 0
        self._taken.append(victim)
        return victim, looks[at]

    def _worst(self) -> list[Standing]:
        """All that rank last. Those with a score are out of the heap then."""
        lowest = self._lowest()
        if lowest is None:
            return list(self.unscored)
        if self._floor is None:
            self._floor = lowest
        unscored: list[Standing] = []
        if self.unscored and not self._mean_is_above(lowest):
            mean = self._mean_score()
            if mean <= lowest:
                unscored = list(self.unscored)
            if mean < lowest:
                return unscored
        scored = []
        while self._lowest() == lowest:
            scored.append(heapq.heappop(self._heap)[2])
        return scored + unscored

    def _lowest(self) -> float | None:
        heap = self._heap
        while heap and heap[0][1] != heap[0][2].place:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def _mean_is_above(self, lowest: float) -> bool:
        """Whether the mean is above a score for certain, whatever rounding does; cheap."""
        best, floor = self._best, self._floor
        if self._mean is not None or floor is None:
            return self._mean is not None and self._mean > lowest
        if best is None or best.score is None or best not in self.members:
            return False
        size = len(self.members) + len(self._taken)
        slack = 8 * size * sys.float_info.epsilon * self._ceiling
        return floor + (best.score - floor) / size > lowest + slack

    def _mean_score(self) -> float:
        """That of all that ran when the round began, added up as `worst_last` does."""
        if self._mean is None:
            self.standings.summed += 1
            ran = list(self.members)
            gone = [one for one in self._taken if one not in self.members]
            if gone:
                ran = sorted([*ran, *gone], key=lambda one: one.order)
            scores = [one.score for one in ran if one.score is not None]
            self._mean = sum(scores) / len(scores)
        return self._mean

    def _push(self, one: Standing) -> None:
        self._entries += 1
        one.place = self._entries
        if len(self._heap) > 2 * len(self.members) + _SPARE:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].place]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (one.score or 0.0, one.place, one))

    def _hold(self, one: Standing, sign: int) -> None:
        page = self.standings.page
        self.held += sign * (-(-(one.base + self.standings.clock) // page) * page - one.shared)
        self.phases[one.base % page] += sign


class Standings:
    """Those of all groups, in a batch whose requests are all given a token in every step.

    Args:
        page: KV tokens of a page.
        min_steps: before a score counts.
    """

    def __init__(self, page: int, min_steps: int) -> None:
        self.page, self.min_steps = page, min_steps
        self.groups: dict[Group, GroupStandings] = {}
        self.clock = 0  # steps
        # Whose tokens are not settled yet, and since when.
        self.unsure: dict[Standing, int] = {}
        self.gone: list[Standing] = []  # who runs no more, until somebody takes them
        self.sound = True  # no score was lost on the way here
        self.ranked = 0  # scores taken over so far, and means of a group added up
        self.summed = 0

    def add(self, key: Any, trace: Trace, order: int, allocated: int, shared: int) -> Standing:
        """A trace starts to run.

        Args:
            key: by which it is looked at.
            trace: without a baseline's signal.
            order: above that of every other.
            allocated: KV tokens, all of them.
            shared: of these.
        """
        group = self.groups.get(trace.group)
        if group is None:
            group = self.groups[trace.group] = GroupStandings(self, trace.group)
        one = Standing(key, trace, group, order, allocated - self.clock, shared)
        trace.standing = one
        group.add(one)
        self.unsure[one] = self.clock
        return one

    def tick(self, steps: int) -> None:
        """So many steps were made."""
        if steps:
            for group in self.groups.values():
                group.grow(steps)
            self.clock += steps

    def clear(self) -> None:
        """Forget all traces."""
        for group in list(self.groups.values()):
            for one in list(group.members):
                group.remove(one)
        self.unsure.clear()
        self.gone.clear()
        self.sound = True

    def held_next(self) -> dict[Group, int]:
        """KV tokens that pruning would free of each group after the next step."""
        return {
            group: found.held + found.growth
            for group, found in self.groups.items()
            if group.for_memory
        }


class StandingRound(Donors):
    """What `Candidates` is for views: running traces at one moment, handed out worst first.

    Args:
        groups: those that run.
        look: at a running trace.
    """

    def __init__(self, groups: Iterable[GroupStandings], look: Callable[[Any], Look]) -> None:
        self._look = look
        self._groups: dict[str, GroupStandings] = {}
        for found in groups:
            found.begin()
            if found.group.for_memory:
                self._groups[found.group.group_id] = found
        super().__init__(
            {name: found.group.weight for name, found in self._groups.items()},
            {name: found.held for name, found in self._groups.items()},
            {
                name: min(found.group.survivors - found.group.min_survivors, len(found.members))
                for name, found in self._groups.items()
            },
        )

    def _worst_of(self, name: str) -> TraceView:
        one, look = self._groups[name].take(self._look)
        return TraceView(*look, one.trace.score_sum, one.trace.num_steps)
