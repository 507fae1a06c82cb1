"""Decides when freed memory goes to new traces, and from where they branch.

Knows nothing of SGLang or torch: views in, branches out. A branch takes the place of a pruned
trace and goes on from a step boundary of another trace of its group, its parent. Gambit (arXiv
2608.08020) branches at a trace's current end instead; its rule is here for comparison.
"""

from __future__ import annotations

import hashlib
import random
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

    def take(self, source: SourceView, position: int, margin: int, prompt: int = 0) -> bool:
        """Take the room of one branch, when it and ``margin`` passes of all fit."""
        need = 1 if self.shares and source.running else position + 2
        need = self._pages(need + (0 if self.shares else prompt)) + self.page
        growth = (self.running + 1) * self._pages(margin)
        if self.requests < 1 or need + growth > self.tokens:
            return False
        self.tokens -= need
        self.requests -= 1
        self.running += 1
        return True


def branch_seed(seed: int | None, number: int) -> int:
    """Seed of a group's branch, by that of the request whose place it takes.

    With a server's deterministic sampling the same seed would give it the parent's own text again,
    and seeds of one request are often neighbours.
    """
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def choose_branches(view: RefillView, room: Room, rules: RefillRules) -> list[Branch]:
    """Fill free places of a group as far as there is room; at most one branch of each parent.

    Args:
        view: the group.
        room: what is free for all groups; what is decided here is taken off.
        rules: for its mode.

    Returns:
        Branches in the order to start. The same views give the same branches.
    """
    free = min(
        len(view.places),
        view.began - view.running,
        rules.branches * view.began - view.branched,
    )
    found: list[Branch] = []
    for source, boundary in _ranked(view, rules):
        if len(found) >= free:
            break
        if room.take(source, boundary.position, rules.margin, view.prompt):
            found.append(Branch(view.places[len(found)], source.handle, boundary.position))
    return found


def choose_swaps(view: RefillView, rules: RefillRules) -> list[int]:
    """Handles of running traces that give way to a branch of a better one, the worst first.

    The group's minimum is kept, and no more give way than may branch again. Whoever is to be a
    parent stays.
    """
    allowed = min(view.spare, rules.branches * view.began - view.branched, view.running - 1)
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
    found = []
    for source in view.sources:
        boundaries = _open(source, view, rules)
        if boundaries:
            found.append((source, boundaries))
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


def _open(source: SourceView, view: RefillView, rules: RefillRules) -> list[Boundary]:
    """Boundaries at which it may branch now."""
    if not source.boundaries:
        return []
    own = source.boundaries[-1].num_steps - source.since
    if rules.at_end:
        if not source.running or own < rules.min_steps or source.length < 2:
            return []
        last = source.boundaries[-1]
        return [Boundary(source.length - 1, last.score_sum, last.num_steps)]
    running = [s.length for s in view.sources if s.running]
    shortest = min(running, default=0)
    # What is left of the group's last trace; one that is overdue may end at any moment.
    left = max(0.0, view.expected - shortest) if running else 0.0
    first = view.expected - left - rules.slack * view.expected
    first = max(first, view.age + view.expected - rules.horizon * view.expected)
    # The end of a finished trace is settled by what comes before: it would only come again.
    latest = source.boundaries[-1].num_steps - (0 if source.running else rules.min_steps)
    return [
        boundary
        for boundary in source.boundaries
        if source.since + rules.min_steps <= boundary.num_steps <= latest
        and boundary.position + 1 >= first
    ]


def _mean(view: RefillView) -> float:
    scores = [source.score for source in view.sources if source.score is not None]
    return sum(scores) / len(scores) if scores else 0.0
