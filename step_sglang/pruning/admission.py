"""Decides who may start next: turns among those that wait, and how many groups run at once.

Knows nothing of SGLang or torch: views in, an order or a number out. What fits into memory is not
decided here: whoever comes first and does not fit waits, and those behind it do too.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PATIENCE = 16  # admissions of others after which a line comes first
KEEP = 4  # survivors that still make a vote
_BELIEVED, _REMEMBERED = 8, 64  # finished traces: for a mean length to be believed; at most kept


class Line(NamedTuple):
    """Requests that wait behind one another, by arrival; lines of lower rank come first."""

    rank: float
    name: Hashable


NEW = Line(0.0, "new")  # members of groups of which nothing runs
ORDINARY = Line(1.0, "ordinary")


def line_of_running(group_id: str, kv_share: float) -> Line:
    """The line of a running group's other members; the more it holds, the later.

    Args:
        group_id: the group's.
        kv_share: KV tokens that it holds, per weight.
    """
    return Line(2.0 + kv_share, (group_id,))  # a tuple: no group is called like another line


@dataclass
class Turns:
    """Whose turn it is among the lines, so that none waits for ever.

    The line of the lowest rank comes first. But a line of which none was admitted while
    ``patience`` requests of other lines were comes before all that waited less. So between two
    admissions of one line there are at most ``patience`` + (number of lines) of others, whatever
    arrives. A line whose first request was refused for want of memory lets the others try, until
    it has waited that long: then nobody passes it before it fits.
    """

    patience: int = PATIENCE
    _admitted: int = 0  # requests so far
    # How many that were when a line was last served, or began to wait.
    _served: dict[Hashable, int] = field(default_factory=dict)
    _refused: set[Hashable] = field(default_factory=set)

    def order(self, waiting: Sequence[Line]) -> list[int]:
        """Positions in ``waiting``, in the order in which they are to be tried.

        Args:
            waiting: the line of every request that waits, by arrival.
        """
        places: dict[Hashable, deque[int]] = {}
        ranks: dict[Hashable, float] = {}
        for place, (rank, name) in enumerate(waiting):
            if name not in places:
                places[name], ranks[name] = deque(), rank
            places[name].append(place)
        self._served = {name: self._served.get(name, self._admitted) for name in places}
        self._refused &= places.keys()
        if len(places) < 2:
            return list(range(len(waiting)))
        by_rank = deque(
            sorted(places, key=lambda name: (name in self._refused, ranks[name], str(name)))
        )
        turn = {name: number for number, name in enumerate(by_rank)}
        # Play it through, as if one after the other were admitted.
        served = dict(self._served)
        by_wait = [(since, turn[name], name) for name, since in served.items()]
        heapq.heapify(by_wait)
        order: list[int] = []
        for now in range(self._admitted, self._admitted + len(waiting)):
            while not places[name := by_wait[0][2]] or served[name] != by_wait[0][0]:
                heapq.heappop(by_wait)
                if places[name]:
                    heapq.heappush(by_wait, (served[name], turn[name], name))
            if now - served[name] < self.patience:
                while not places[by_rank[0]]:
                    by_rank.popleft()
                name = by_rank[0]
            served[name] = now + 1
            order.append(places[name].popleft())
        return order

    def admitted(self, lines: Sequence[Line]) -> None:
        """These started, in this order; ``lines`` as they were when they waited."""
        for line in lines:
            self._admitted += 1
            self._served[line.name] = self._admitted
            self._refused.discard(line.name)

    def refused(self, line: Line) -> bool:
        """The line's first request did not fit.

        Returns:
            Whether it is worth trying again at once, because another line comes first now.
        """
        overdue = self._admitted - self._served.get(line.name, self._admitted) >= self.patience
        if overdue or line.name in self._refused:
            return False
        self._refused.add(line.name)
        return any(name not in self._refused for name in self._served)


@dataclass(frozen=True, slots=True)
class GroupDemand:
    """What a group is expected to take of the pool."""

    traces: int  # that live or will
    min_survivors: int
    weight: float
    tokens: float  # of a trace at its end, the prompt aside
    prompt: int = 0  # tokens that its traces share
    held: int = 0  # tokens that they hold now beside it


@dataclass(frozen=True)
class GroupLimit:
    """How many groups run at once; groups that wait begin by arrival.

    Args:
        most: groups; None: as many as keep ``keep`` survivors each at their end, or all of their
            traces where they have fewer. One may always run.
    """

    most: int | None = None
    keep: int = KEEP

    def may_begin(
        self, running: Sequence[GroupDemand], waiting: Sequence[GroupDemand], pool: float
    ) -> int:
        """How many of the groups that wait, in their order, may begin beside those that run.

        Args:
            running: the groups that run.
            waiting: the groups that wait, by arrival.
            pool: KV tokens that groups can have.
        """
        if self.most is not None:
            return min(len(waiting), max(0, self.most - len(running)))
        # Pruning levels what groups hold per weight. At which level does the neediest have enough?
        level = max((self._level(group) for group in running), default=0.0)
        groups = list(running)
        for number, group in enumerate(waiting):
            groups.append(group)
            level = max(level, self._level(group))
            if len(groups) > 1 and sum(self._share(g, level) for g in groups) > pool:
                return number
        return len(waiting)

    @staticmethod
    def _share(group: GroupDemand, level: float) -> float:
        share = min(group.traces * group.tokens, level * group.weight)
        return group.prompt + max(share, group.held)

    def _level(self, group: GroupDemand) -> float:
        kept = max(group.min_survivors, self.keep)
        return min(group.traces, kept) * group.tokens / group.weight


@dataclass
class TraceLengths:
    """How long traces become, by those that finished lately."""

    _lengths: deque[int] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def finished(self, length: int) -> None:
        """A trace finished with so many generated tokens."""
        self._lengths.append(length)

    def expected(self, most: int) -> float:
        """Generated tokens of a trace that may have ``most``; that, before enough finished."""
        if len(self._lengths) < _BELIEVED:
            return float(most)
        return min(float(most), sum(self._lengths) / len(self._lengths))


def hold_back(order: Sequence[bool], running: int, traces: int, limit: int) -> set[int]:
    """Which requests must wait, so that a batch with traces does not outgrow its limit.

    Ordinary requests are never held back. Half of the limit is for traces whatever else runs, or
    they could wait for ever.

    Args:
        order: of every request that waits, in the order in which they are tried: is it a trace?
        running: requests that run.
        traces: of these.
        limit: requests.

    Returns:
        Positions in ``order``.
    """
    held: set[int] = set()
    for place, is_trace in enumerate(order):
        if is_trace and running >= limit and 2 * traces >= limit:
            held.add(place)
            continue
        running += 1
        traces += is_trace
    return held
