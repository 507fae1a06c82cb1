"""The votes of groups as they form, for whoever looks.

The server's own votes (one choice of many traces) are read as they are counted. Of all other
groups only the answers are known here: they are compared as text, weighted as the server would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from step_sglang.live.events import AnswerRead, Bar, Event, VoteStood
from step_sglang.live.known import Known
from step_sglang.protocol import META_GROUP, META_KEY
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.voting.answers import Extractor
from step_sglang.voting.early_stopping import cannot_change
from step_sglang.voting.session import VoteSession
from step_sglang.voting.tally import Ballot, Poll, Tally, weight_of

MAX_BARS = 12
MAX_UNKNOWN = 25  # looks at a request that no group is known of; then it is given up


@dataclass
class Finished:
    """A trace that finished, whose text can be read once SGLang has put it together."""

    rid: str
    score: float | None
    calibration: TraceCalibration | None
    read: Callable[[], str]
    looks: int = 0


@dataclass
class _Count:
    """The vote of one group, by text."""

    poll: Poll
    seen: int = -1  # changes of the group


@dataclass
class _Followed:
    """A vote of the server's own."""

    session: VoteSession
    ended: bool = False
    answers: dict[str, str] = field(default_factory=dict)  # by request
    seen: tuple[int, int] = (-1, -1)  # traces that ended, and ballots


def bars(tallies: Sequence[Tally]) -> tuple[Bar, ...]:
    """The heaviest answers of a vote."""
    return tuple(Bar(t.answer, t.weight, t.count) for t in tallies[:MAX_BARS])


class VoteBoard:
    """Turns what finished into answers and votes.

    Args:
        vote: of groups that the server does not vote on itself.
        extract: reads their answers.
    """

    def __init__(self, vote: str, extract: Extractor) -> None:
        self._vote, self._extract = vote, extract
        self._finished: list[Finished] = []
        self._counts: dict[int, _Count] = {}
        self._followed: list[_Followed] = []

    def finished(self, trace: Finished) -> None:
        """A trace finished."""
        self._finished.append(trace)

    def follow(self, session: VoteSession) -> Callable[[], None]:
        """Show a vote of the server's own; returns what is to be called at its end."""
        followed = _Followed(session)
        self._followed.append(followed)

        def end() -> None:
            followed.ended = True

        return end

    def clear(self) -> None:
        """Forget what has ended; nobody looks any more."""
        self._finished, self._counts = [], {}
        self._followed = [f for f in self._followed if not f.ended]

    def take(self, known: Known, now: float) -> Iterator[Event]:
        """What is new of answers and votes."""
        own = set()
        for followed in self._followed:
            group = _group_of(followed.session, known)
            if group is not None:
                own.add(group)
                yield from _followed_events(followed, group, known, now)
        self._followed = [f for f in self._followed if not f.ended]
        waiting = []
        for trace in self._finished:
            number = known.by_rid.get(trace.rid)
            if number is None:
                trace.looks += 1
                if trace.looks < MAX_UNKNOWN:
                    waiting.append(trace)
                continue
            group = known.traces[number].began.group
            answer = None if group in own else self._extract(trace.read())
            if answer is not None:
                poll = self._counts.setdefault(group, _Count(self._poll())).poll
                poll.add(Ballot(answer, weight_of(trace.score, self._vote, trace.calibration)))
                yield AnswerRead(number, answer)
        self._finished = waiting
        yield from self._by_text(known, now)

    def _by_text(self, known: Known, now: float) -> Iterator[Event]:
        for number, count in list(self._counts.items()):
            group = known.groups.get(number)
            if group is None:
                del self._counts[number]
                continue
            changes = group.changes + len(count.poll)
            if changes == count.seen:
                continue
            count.seen = changes
            tallies = count.poll.tallies()
            still_open = [1.0] * (group.live + group.to_come)
            settled = cannot_change(tallies, still_open, self._vote)
            yield VoteStood(number, now, self._vote, bars(tallies), settled, as_text=True)

    def _poll(self) -> Poll:
        return Poll(self._vote, same=lambda one, other: False)


def _group_of(session: VoteSession, known: Known) -> int | None:
    for trace in session.traces:
        step = trace.meta_info.get(META_KEY)
        if step is not None:
            return known.by_name.get(step[META_GROUP])
    return None


def _followed_events(followed: _Followed, group: int, known: Known, now: float) -> Iterator[Event]:
    session = followed.session
    for trace in session.traces:
        rid = trace.meta_info.get("id")
        number = known.by_rid.get(str(rid))
        if trace.answer is None or number is None or followed.answers.get(str(rid)):
            continue
        if trace.fate.value == "finished":
            followed.answers[str(rid)] = trace.answer
            yield AnswerRead(number, trace.answer)
    tallies = session.tallies()
    seen = (sum(t.ended is not None for t in session.traces), sum(t.count for t in tallies))
    if tallies and seen != followed.seen:
        followed.seen = seen
        settled = session.is_certain()
        yield VoteStood(group, now, session.rules.vote, bars(tallies), settled)
