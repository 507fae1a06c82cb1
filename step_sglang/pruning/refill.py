"""Decides when freed memory goes to new traces, and from where they branch.

Knows nothing of SGLang or torch: views in, branches out. A branch takes the place of a pruned
trace and goes on from a step boundary of another trace of its group, its parent. Gambit (arXiv
2608.08020) branches at a trace's current end instead; its rule is here for comparison.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from step_sglang import protocol


@dataclass(frozen=True)
class RefillRules:
    """When and from where. A pass is a decode step, of which each running trace makes one token.

    ``min_steps``: of a parent's own since its last branch (or its own), also before it branches
    first; and of a finished one's after the branch. ``interval``: passes between two decisions
    about a group. ``margin``: passes that what runs, and the branch, can go on for before memory is
    full again. ``slack``: a branch is expected to end at most that share of a trace's length after
    the last of its group; ``horizon``: and at most that many lengths after its group began, or one
    branch after another would let a group live on. ``prior``: steps with the group's mean score
    that are added to a prefix's, so that a short one needs more. ``depth`` and ``sibling``: score
    that a prefix loses for each. ``branches``: at most so many for each trace that the group began
    with.

    Of the tournament: every ``swap_interval`` passes up to ``swap`` of the worst traces give way,
    where the best prefix's score is higher by ``gap``; both have at least ``warm_up`` steps.
    """

    min_steps: int = 3
    interval: int = 8
    margin: int = 32
    slack: float = 0.25
    horizon: float = 1.25
    prior: float = 4.0
    depth: float = 0.02
    sibling: float = 0.05
    branches: int = 2
    swap: int = 0
    swap_interval: int = 200
    gap: float = 0.3
    warm_up: int = 8
    at_end: bool = False  # Gambit: at the parent's current end, whatever its boundaries are
    floor: float = 0.0  # Gambit: a trace whose score is lower gives way in any case


# Gambit's own figures are for 256 traces of tens of thousands of tokens: an interval of 200 scored
# tokens, a warm-up of 12,000 tokens, a tournament of 16 for 16, a floor of 0.1. Counted in steps.
GAMBIT = RefillRules(
    min_steps=8, slack=float("inf"), horizon=float("inf"), prior=0.0, depth=0.0, sibling=0.0,
    branches=8, swap=1, swap_interval=16, gap=0.0, warm_up=8, at_end=True, floor=0.1,
)  # fmt: skip
RULES: Mapping[str, RefillRules] = {
    protocol.REFILL_BEST: RefillRules(),
    protocol.REFILL_RANDOM: RefillRules(),
    protocol.REFILL_GAMBIT: GAMBIT,
}


class Boundary(NamedTuple):
    """Where a trace may be continued: after the token at ``position`` of its output."""

    position: int
    score_sum: float  # of its steps up to here, this one included
    num_steps: int


@dataclass(frozen=True, slots=True)
class SourceView:
    """What the rules see of a trace that runs or has finished."""

    handle: int  # the caller's own
    length: int  # generated tokens, what it took from its parent included
    running: bool
    boundaries: Sequence[Boundary]  # in order; those before ``since`` do not count
    since: int = 0  # steps: its own begin, or its last branch was, after so many
    depth: int = 0  # branches between it and a trace that is none
    branches: int = 0  # of it

    @property
    def score(self) -> float | None:
        """Its trace score."""
        last = self.boundaries[-1] if self.boundaries else None
        return last.score_sum / last.num_steps if last else None


@dataclass(frozen=True, slots=True)
class RefillView:
    """What the rules see of a group with refill."""

    group: str
    mode: str  # one of protocol.REFILL_MODES, not off
    places: Sequence[int]  # handles of pruned traces whose place is free, in order
    sources: Sequence[SourceView]
    running: int  # traces
    began: int  # traces without the branches
    branched: int  # branches so far
    spare: int  # traces that it may lose before its minimum
    expected: float  # generated tokens of a trace at its end
    prompt: int = 0  # tokens that come before what is generated
    age: int = 0  # passes since its first trace began


class Branch(NamedTuple):
    """A decision: the trace at ``place`` goes on from the parent's token at ``position``."""

    place: int
    parent: int
    position: int


@dataclass
class Room:
    """Memory for branches, spent as they are decided.

    ``tokens``: KV tokens that are free, or can be evicted. ``requests``: that may start.
    ``running``: requests that grow. ``shares``: the prompt, and what a running parent has computed,
    are shared.
    """

    tokens: int
    requests: int
    running: int
    page: int = 1
    shares: bool = True

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page

    def fits(self, margin: int, tokens: int = 1) -> bool:
        """Whether a branch that begins with these tokens of its own, and ``margin`` passes, fit."""
        growth = (self.running + 1) * self._pages(margin)
        return self.requests >= 1 and self._first(tokens) + growth <= self.tokens

    def take(self, tokens: int) -> None:
        """Take the room of one branch."""
        self.tokens -= self._first(tokens)
        self.requests -= 1
        self.running += 1

    def own_tokens(self, running: bool, position: int, prompt: int) -> int:
        """Tokens that a branch computes, or that nobody else holds; ``running``: its parent."""
        own = 1 if self.shares and running else position + 2
        return own + (0 if self.shares else prompt)

    def _first(self, tokens: int) -> int:
        return self._pages(tokens) + self.page


def branch_seed(seed: int | None, number: int) -> int:
    """Seed of a group's branch, by that of the request whose place it takes.

    With a server's deterministic sampling the same seed would give it the parent's own text again,
    and seeds of one request are often neighbours.
    """
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def can_start(
    places: int, running: int, began: int, branched: int, rooms: Sequence[Room], rules: RefillRules
) -> int:
    """How many branches a group may start at most; 0 also where not even the smallest one fits.

    Cheap, so that it can be asked before the group is looked at; ``view`` of
    :func:`choose_branches` says what the numbers are.
    """
    free = min(places, began - running, rules.branches * began - branched)
    return free if free > 0 and all(room.fits(rules.margin) for room in rooms) else 0


def choose_branches(
    view: RefillView, room: Room, rules: RefillRules, share: Room | None = None
) -> list[Branch]:
    """Fill free places of a group as far as there is room; at most one branch of each parent.

    Args:
        view: the group.
        room: what is free for all groups; what is decided here is taken off.
        rules: for its mode.
        share: what is left of the share of the pool that the group asked for, likewise.

    Returns:
        Branches in the order to start. The same views give the same branches.
    """
    rooms = [room] if share is None else [room, share]
    free = can_start(len(view.places), view.running, view.began, view.branched, rooms, rules)
    if not free:
        return []
    found: list[Branch] = []
    for source, boundary in _ranked(view, rules):
        if len(found) >= free:
            break
        tokens = room.own_tokens(source.running, boundary.position, view.prompt)
        if all(one.fits(rules.margin, tokens) for one in rooms):
            for one in rooms:
                one.take(tokens)
            found.append(Branch(view.places[len(found)], source.handle, boundary.position))
    return found


def has_parent(view: RefillView, rules: RefillRules) -> bool:
    """Whether any of its traces may be branched from now, were there room."""
    return bool(_all_open(view, rules))


def choose_swaps(view: RefillView, rules: RefillRules) -> list[int]:
    """Handles of running traces that give way to a branch of a better one, the worst first.

    The group's minimum is kept, and no more give way than may branch again. Whoever is to be a
    parent stays.
    """
    allowed = min(view.spare, rules.branches * view.began - view.branched, view.running - 1)
    if allowed < 1:
        return []
    judged = [
        source
        for source in view.sources
        if source.running and source.boundaries and source.boundaries[-1].num_steps >= rules.warm_up
    ]
    worst = sorted(judged, key=lambda s: (s.score, -s.length, s.handle))
    best = [(s.handle, b.score_sum / b.num_steps) for s, b in _ranked(view, rules)]
    gone: list[int] = []
    for source in worst:
        if len(gone) >= allowed:
            break
        score = source.score
        assert score is not None
        parents = [(h, value) for h, value in best if h != source.handle and h not in gone]
        if (score < rules.floor and parents) or (
            len(gone) < min(rules.swap, len(parents)) and parents[len(gone)][1] >= score + rules.gap
        ):
            gone.append(source.handle)
    return gone


def _ranked(view: RefillView, rules: RefillRules) -> list[tuple[SourceView, Boundary]]:
    """A boundary of every trace that may branch, the best first."""
    found = _all_open(view, rules)
    if view.mode == protocol.REFILL_RANDOM:
        # The same on every rank and in every run: drawn from what is decided about.
        seed = hashlib.blake2b(f"{view.group}/{view.branched}".encode(), digest_size=8).digest()
        draw = random.Random(seed)
        draw.shuffle(found)
        return [(source, draw.choice(boundaries)) for source, boundaries in found]
    mean = _mean(view)

    def value(source: SourceView, boundary: Boundary) -> float:
        shrunk = (boundary.score_sum + rules.prior * mean) / (boundary.num_steps + rules.prior)
        return shrunk - rules.depth * source.depth - rules.sibling * source.branches

    best = [
        (source, max(boundaries, key=lambda b: (value(source, b), b.position)))
        for source, boundaries in found
    ]
    # The handle settles a tie, so that the choice depends on nothing but the views.
    return sorted(best, key=lambda pair: (-value(*pair), -pair[1].position, pair[0].handle))


def _all_open(view: RefillView, rules: RefillRules) -> list[tuple[SourceView, Sequence[Boundary]]]:
    """Traces that may be branched from now, and where."""
    first = 0.0 if rules.at_end else _first_length(view, rules)
    found = [(source, _open(source, first, rules)) for source in view.sources]
    return [(source, boundaries) for source, boundaries in found if boundaries]


def _first_length(view: RefillView, rules: RefillRules) -> float:
    """Generated tokens that a branch must begin with, or it would end too late."""
    running = [source.length for source in view.sources if source.running]
    # What is left of the group's last trace; one that is overdue may end at any moment.
    left = max(0.0, view.expected - min(running)) if running else 0.0
    first = view.expected - left - rules.slack * view.expected
    return max(first, view.age + view.expected - rules.horizon * view.expected)


def _open(source: SourceView, first: float, rules: RefillRules) -> Sequence[Boundary]:
    """Boundaries at which it may branch now, after at least ``first`` tokens."""
    if not source.boundaries:
        return []
    own = source.boundaries[-1].num_steps - source.since
    if rules.at_end:
        if not source.running or own < rules.min_steps or source.length < 2:
            return []
        last = source.boundaries[-1]
        return [Boundary(source.length - 1, last.score_sum, last.num_steps)]
    # The end of a finished trace is settled by what comes before: it would only come again.
    latest = source.boundaries[-1].num_steps - (0 if source.running else rules.min_steps)
    earliest = source.since + rules.min_steps
    known = source.boundaries  # thousands, in order
    begin = max(
        bisect_left(known, earliest, key=lambda b: b.num_steps),
        bisect_left(known, first, key=lambda b: b.position + 1),
    )
    return known[begin : bisect_right(known, latest, key=lambda b: b.num_steps)]


def _mean(view: RefillView) -> float:
    scores = [source.score for source in view.sources if source.score is not None]
    return sum(scores) / len(scores) if scores else 0.0
