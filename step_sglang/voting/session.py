"""Gathers the streamed traces of one group and votes: the part that client and server share.

Takes the chunks of a streamed ``/generate`` answer in any order and tells when the group may end.
Sends and cancels nothing itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from step_sglang import protocol
from step_sglang.pruning.policy import TraceView
from step_sglang.scoring.calibration import TraceCalibration, calibration_of
from step_sglang.voting.answers import Extractor, extract_boxed
from step_sglang.voting.classes import Same, Steps, run_here
from step_sglang.voting.early_stopping import (
    DEFAULT_THRESHOLD,
    cannot_change,
    check_rule,
    highest_weight,
    is_settled,
)
from step_sglang.voting.families import lineage_of
from step_sglang.voting.shrink import check_shrink, surplus
from step_sglang.voting.tally import Ballot, Poll, Tally, check_vote, share_of, weight_of

# Tokens between two chunks of a trace that runs; its end is always sent at once.
STREAM_INTERVAL = 16


class TraceFate(Enum):
    """How a trace stands, seen from outside the engine."""

    RUNNING = "running"  # or waiting
    FINISHED = "finished"  # ended normally, at its length limit included; only these vote
    PRUNED = "pruned"
    SHRUNK = "shrunk"  # ended, because those that went on settle the vote
    ABORTED = "aborted"  # by the server or another client
    CANCELLED = "cancelled"  # by us, because the vote was decided


class VoteStatus(Enum):
    """What became of a vote."""

    VOTED = "voted"
    NO_ANSWER = "no_answer"  # traces finished, but none has an extractable answer
    NO_FINISHED_TRACE = "no_finished_trace"


@dataclass(frozen=True)
class VoteRules:
    """How a group is voted on.

    Raises:
        VoteError: there is no such vote or early-finish rule, or ``shrink`` is no probability.
    """

    vote: str = protocol.DEFAULT_VOTE
    early: str = "exact"
    threshold: float = DEFAULT_THRESHOLD  # of the posterior rule
    shrink: float = 0.0  # threshold at which traces end that the vote does not need; 0: none

    def __post_init__(self) -> None:
        check_vote(self.vote)
        check_rule(self.early, self.threshold)
        check_shrink(self.shrink)


@dataclass
class SampledTrace:
    """One trace as far as it is known."""

    index: int
    text: str = ""
    score: float | None = None
    num_steps: int = 0
    calibration: TraceCalibration | None = None  # of the scorer that scored it
    tokens: int = 0  # generated
    fate: TraceFate = TraceFate.RUNNING
    answer: str | None = None
    meta_info: Mapping[str, Any] = field(default_factory=dict)  # of its last chunk
    output_ids: Sequence[int] = ()
    num_ids: int = 0  # of them, that the text is of: SGLang's list of a running trace grows on
    first_chunk: float | None = None  # seconds after the start
    ended: float | None = None


@dataclass(frozen=True)
class VoteOutcome:
    """The vote as it stands. ``best``: position of the trace to show, None without any trace."""

    status: VoteStatus
    answer: str | None
    share: float
    tallies: tuple[Tally, ...]  # members are positions of traces
    best: int | None
    text_only: int = 0  # answers that were compared as text alone


class VoteSession:
    """The traces of one group.

    Args:
        n: how many there will be.
        rules: the vote and when it may end.
        extract: reads a finished trace's answer.
        max_new_tokens: the length limit of a trace, None when it is not known.
        same: whether two answers mean the same; None: math-verify decides.
    """

    def __init__(
        self,
        n: int,
        rules: VoteRules,
        extract: Extractor = extract_boxed,
        max_new_tokens: int | None = None,
        same: Same | None = None,
    ) -> None:
        self.traces = [SampledTrace(index) for index in range(n)]
        self.rules = rules
        self._extract = extract
        self._max_new_tokens = max_new_tokens
        self._poll = Poll(rules.vote, same)
        self._voters: list[int] = []  # traces in the order of their ballots
        self._uncounted: deque[SampledTrace] = deque()
        self._dismissed: set[int] = (
            set()
        )  # traces that were told to end, as the vote needs them not
        self._sampled = False  # the server says that it keeps the group for training
        self.started = time.perf_counter()

    def feed(self, chunk: Mapping[str, Any]) -> bool:
        """Take over one chunk; whether a trace ended with it, so that :meth:`counting` is due.

        Raises:
            KeyError, TypeError, IndexError: it is no chunk of ``/generate``.
        """
        trace = self.traces[chunk.get("index", 0)]
        info = chunk["meta_info"]
        now = time.perf_counter() - self.started
        if trace.fate is not TraceFate.RUNNING:
            return False
        _append(trace, chunk)
        trace.meta_info = info
        trace.tokens = int(info.get("completion_tokens") or trace.tokens)
        step = info.get(protocol.META_KEY)
        if step is not None:
            trace.score = step[protocol.META_SCORE]
            trace.num_steps = step[protocol.META_NUM_STEPS]
            if trace.calibration is None:
                trace.calibration = calibration_of(step.get(protocol.META_CALIBRATION))
            self._sampled = self._sampled or step.get(protocol.META_SAMPLED) is True
        if trace.first_chunk is None:
            trace.first_chunk = now
        reason = info.get("finish_reason")
        if reason is None:
            return False
        trace.ended = now
        # First: what the finish reason says of a pruned trace is the server's choice.
        if step is not None and step[protocol.META_PRUNED]:
            trace.fate = TraceFate.PRUNED
            if step.get(protocol.META_REASON) == protocol.PRUNED_FOR_VOTE:
                trace.fate = TraceFate.SHRUNK
        elif reason["type"] != "abort":
            trace.fate = TraceFate.FINISHED
        elif trace.index in self._dismissed:
            trace.fate = TraceFate.SHRUNK
        else:
            trace.fate = TraceFate.ABORTED
        self._uncounted.append(trace)
        return True

    def counting(self) -> Steps[None]:
        """Read and count the answers of traces that ended since, in steps that may take long.

        Left in the middle, the rest is counted by the next call.
        """
        while self._uncounted:
            trace = self._uncounted[0]
            trace.answer = self._extract(trace.text)
            if trace.fate is TraceFate.FINISHED and trace.answer is not None:
                weight = weight_of(trace.score, self.rules.vote, trace.calibration)
                ballot = Ballot(trace.answer, weight, lineage_of(trace.meta_info))
                yield from self._poll.adding(ballot)
                self._voters.append(trace.index)
            self._uncounted.popleft()

    def count(self) -> None:
        """Count in this process and without a limit, see :meth:`counting`."""
        run_here(self.counting())

    def decided(self) -> bool:
        """Whether the group may end now by its early-finish rule. Only after :meth:`counting`.

        A group that the server keeps for training ends with its last trace: those that end first
        are not like the others.
        """
        going = self._going()
        if not going or self._is_kept():
            return not going
        rules, weights = self.rules, [self._highest(t) for t in going]
        return is_settled(
            self._poll.tallies(), weights, rules.vote, rules.early, rules.threshold,
            self._num_ended_for_vote(),
        )  # fmt: skip

    def surplus(self) -> list[str]:
        """Ids of the traces that may end now, though the group goes on; each is said once.

        Only after :meth:`counting`. A trace of which nothing came yet has no known id, and goes on.
        """
        if not self.rules.shrink or self._is_kept():
            return []
        views = [
            TraceView(t.index, 0, t.tokens, (t.score or 0.0) * t.num_steps, t.num_steps)
            for t in self._going()
        ]
        ended = surplus(
            self._poll.tallies(), views, self._num_ended_for_vote(), self.rules.shrink,
            self.rules.vote,
        )  # fmt: skip
        named = [index for index in ended if self.traces[index].meta_info]
        self._dismissed.update(named)
        return [str(self.traces[index].meta_info["id"]) for index in named]

    def is_certain(self) -> bool:
        """Whether no trace that runs can change the winner, whatever the rule says of ending."""
        running = [self._highest(t) for t in self.traces if t.fate is TraceFate.RUNNING]
        return cannot_change(self._poll.tallies(), running, self.rules.vote)

    def cancel(self) -> None:
        """Mark what still runs as cancelled."""
        now = time.perf_counter() - self.started
        for trace in self.traces:
            if trace.fate is TraceFate.RUNNING:
                dismissed = trace.index in self._dismissed
                trace.fate = TraceFate.SHRUNK if dismissed else TraceFate.CANCELLED
                trace.ended = now

    @property
    def ended_by(self) -> str | None:
        """The rule that ended the vote before its last trace did; None: no rule had to."""
        return self.rules.early if self.num(TraceFate.CANCELLED) else None

    def _is_kept(self) -> bool:
        """Whether the server keeps the group for training. It forgets one that lost a trace."""
        lost = self.num(TraceFate.PRUNED, TraceFate.SHRUNK, TraceFate.ABORTED)
        return self._sampled and not lost

    def _going(self) -> list[SampledTrace]:
        """Traces that run or wait, and were not told to end."""
        return [
            t for t in self.traces
            if t.fate is TraceFate.RUNNING and t.index not in self._dismissed
        ]  # fmt: skip

    def _num_ended_for_vote(self) -> int:
        """Traces that would still run or have voted, had the vote needed them."""
        return sum(self.traces[i].fate is not TraceFate.FINISHED for i in self._dismissed)

    def num(self, *fates: TraceFate) -> int:
        """How many traces stand like that."""
        return sum(trace.fate in fates for trace in self.traces)

    def tallies(self) -> list[Tally]:
        """The answers so far, the winner first; members are positions of traces."""
        return [
            Tally(t.answer, t.weight, tuple(self._voters[i] for i in t.members))
            for t in self._poll.tallies()
        ]

    def outcome(self) -> VoteOutcome:
        """The vote over the traces that finished."""
        tallies = tuple(self.tallies())
        if tallies:
            best = self._best(tallies[0].members)
            return VoteOutcome(
                VoteStatus.VOTED, tallies[0].answer, share_of(tallies), tallies, best,
                self._poll.text_only,
            )  # fmt: skip
        finished = [t.index for t in self.traces if t.fate is TraceFate.FINISHED]
        if finished:
            return VoteOutcome(VoteStatus.NO_ANSWER, None, 0.0, (), self._best(finished))
        known = [t.index for t in self.traces if t.meta_info]
        return VoteOutcome(VoteStatus.NO_FINISHED_TRACE, None, 0.0, (), self._best(known))

    def _best(self, indices: Sequence[int]) -> int | None:
        def rank(index: int) -> tuple[float, int, int]:
            trace = self.traces[index]
            return (-1.0 if trace.score is None else trace.score, trace.tokens, -index)

        return max(indices, key=rank, default=None)

    def _highest(self, trace: SampledTrace) -> float:
        left = None if self._max_new_tokens is None else self._max_new_tokens - trace.tokens
        return highest_weight(
            (trace.score or 0.0) * trace.num_steps, trace.num_steps, left, self.rules.vote,
            trace.calibration,
        )  # fmt: skip


def _append(trace: SampledTrace, chunk: Mapping[str, Any]) -> None:
    """Take over text and tokens, of a server that streams the whole output or only what is new."""
    text, ids = chunk.get("text") or "", chunk.get("output_ids") or ()
    info = chunk["meta_info"]
    aborted = (info.get("finish_reason") or {}).get("type") == "abort"
    if len(ids) >= info.get("completion_tokens", 0):
        trace.text, trace.output_ids = text, ids
    elif aborted and trace.text and text.startswith(trace.text):
        # SGLang echoes the whole text of a request that it aborts, and one token.
        trace.text = text
    else:
        trace.text += text
        trace.output_ids = [*trace.output_ids, *ids]
    # A branch's output begins with tokens of its parent, which it has not generated.
    branched = protocol.META_BRANCH in (info.get(protocol.META_KEY) or {})
    known = len(trace.output_ids)
    trace.num_ids = known if branched else min(known, info.get("completion_tokens", known))
