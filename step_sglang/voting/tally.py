"""Votes over the answers of a group's finished traces. Knows nothing of servers or of time.

Four votes: ``weighted`` sums the trace scores of each answer (the paper's), ``calibrated`` the
odds that its traces are right, ``majority`` counts traces, ``best`` takes the answer of the
best-scoring trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from step_sglang.errors import VoteError, safe_repr
from step_sglang.protocol import VOTE_CALIBRATED, VOTES
from step_sglang.scoring.calibration import UNSCORED, TraceCalibration
from step_sglang.voting.classes import AnswerClasses, PairwiseClasses, Same, Steps, run_here
from step_sglang.voting.families import Lineage, weight_together


@dataclass(frozen=True)
class Ballot:
    """One finished trace's answer and what it weighs."""

    answer: str
    weight: float
    lineage: Lineage | None = None  # None: it is related to no other


@dataclass(frozen=True)
class Tally:
    """A merged answer: its first spelling, its weight and the traces that gave it."""

    answer: str
    weight: float
    members: tuple[int, ...]  # positions of its ballots

    @property
    def count(self) -> int:
        """How many traces gave it."""
        return len(self.members)


def check_vote(vote: object) -> None:
    """Raise VoteError unless ``vote`` is the name of a vote."""
    if vote not in VOTES:
        raise VoteError(f"unknown vote {safe_repr(vote)}; it must be one of {', '.join(VOTES)}")


def weight_of(score: float | None, vote: str, calibration: TraceCalibration | None = None) -> float:
    """What a finished trace of this trace score weighs; in [0, 1].

    Args:
        score: of the trace; None: it has no step and weighs as no evidence does, a constant, so
            that later traces never change what a finished one weighs.
        vote: one of the votes.
        calibration: of the scorer. Without one ``calibrated`` is ``weighted``.
    """
    if vote == "majority":
        return 1.0
    if vote == VOTE_CALIBRATED and calibration is not None:
        return calibration.weight(score)
    return UNSCORED if score is None else score


class Poll:
    """Ballots in the order they came in, equivalent answers merged.

    A ballot joins the first known answer that it equals, so what is merged never changes with the
    ballots that come later.

    Args:
        vote: one of :data:`VOTES`.
        same: whether two differently spelled answers mean the same; asked once per pair of a new
            spelling and a known answer. Default: math-verify decides, see :class:`AnswerClasses`.

    Raises:
        VoteError: there is no such vote.
    """

    def __init__(self, vote: str = "weighted", same: Same | None = None) -> None:
        check_vote(vote)
        self._vote = vote
        self._classes = AnswerClasses() if same is None else PairwiseClasses(same)
        self._ballots: dict[str, list[tuple[int, Ballot]]] = {}
        self._count = 0
        self._related = False  # any is a branch of another

    def __len__(self) -> int:
        return self._count

    @property
    def text_only(self) -> int:
        """How many answers were compared as text alone, see :class:`AnswerClasses`."""
        return self._classes.text_only

    def adding(self, ballot: Ballot) -> Steps[None]:
        """Count one more ballot, in steps of which each may take long."""
        answer = yield from self._classes.find(ballot.answer.strip())
        self._ballots.setdefault(answer, []).append((self._count, ballot))
        self._count += 1
        if ballot.lineage is not None and len(ballot.lineage.path) > 1:
            self._related = True

    def add(self, ballot: Ballot) -> None:
        """Count one more ballot, comparing in this process and without a limit."""
        run_here(self.adding(ballot))

    def tallies(self) -> list[Tally]:
        """The answers, heaviest first, of equals the one with more traces, then the first given.

        Under ``best`` an answer weighs as much as its best trace. Else branches of one trace weigh
        less together than strangers do, see :mod:`step_sglang.voting.families`.
        """
        found = [
            Tally(answer, self._weight([b for _, b in ballots]), tuple(i for i, _ in ballots))
            for answer, ballots in self._ballots.items()
        ]
        return sorted(found, key=lambda t: (-t.weight, -t.count))

    def _weight(self, ballots: Sequence[Ballot]) -> float:
        if self._vote == "best":
            return max(ballot.weight for ballot in ballots)
        if self._related:
            return weight_together([(ballot.weight, ballot.lineage) for ballot in ballots])
        return sum(ballot.weight for ballot in ballots)


def tallying(
    ballots: Sequence[Ballot], vote: str = "weighted", same: Same | None = None
) -> Steps[list[Tally]]:
    """Merge equivalent answers and sort them, in steps; see :meth:`Poll.tallies`."""
    poll = Poll(vote, same)
    for ballot in ballots:
        yield from poll.adding(ballot)
    return poll.tallies()


def tally(
    ballots: Sequence[Ballot], same: Same | None = None, vote: str = "weighted"
) -> list[Tally]:
    """:func:`tallying` in this process and without a limit."""
    return run_here(tallying(ballots, vote, same))


def share_of(tallies: Sequence[Tally]) -> float:
    """The winner's share of the weight; of the traces when no answer weighs anything."""
    if not tallies:
        return 0.0
    total = sum(t.weight for t in tallies)
    if total > 0:
        return tallies[0].weight / total
    return tallies[0].count / sum(t.count for t in tallies)
