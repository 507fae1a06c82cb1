"""Owns the life of traces and groups: who lives, who finished, each trace's score.

Knows nothing of SGLang; the device's per-slot state is mirrored here, so that a trace
keeps its score when it loses its slot to a retraction.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol, cast

from step_sglang import protocol
from step_sglang.baselines.base import DEFAULT_TOP_K, Baseline, EngineContext, Signal
from step_sglang.pruning.family import Family
from step_sglang.pruning.refill import Boundary
from step_sglang.pruning.timeline import Timeline
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.scoring.capture import Capture
from step_sglang.scoring.certainty import Certainty

MAX_NAMED = 65536  # named traces whose score is kept for a continuation


class TraceStatus(Enum):
    """How a trace stands."""

    LIVE = "live"  # running or waiting
    FINISHED = "finished"  # ended normally
    PRUNED = "pruned"
    ABORTED = "aborted"


# Looked up thousands of times a second.
_LIVE, _PRUNED = TraceStatus.LIVE, TraceStatus.PRUNED


@dataclass(slots=True, eq=False)
class Group:
    """All traces of one question."""

    group_id: str
    weight: float = 1.0
    min_survivors: int = 1
    prune_at: float = 1.0  # share of the pool that its running traces may hold
    live: int = 0
    finished: int = 0
    joined: int = 0  # traces so far
    ending: int = 0  # live traces that end soon
    scored: bool = False  # any of its traces has reached a step boundary
    stopped: bool = False  # STEP was given up: its traces are ordinary requests
    baseline: Baseline | None = None  # judges its traces; None: STEP
    method_state: Any = None  # what that method shares among them
    alone: bool = False  # of one request that named no group, so it stays its only trace
    began: bool = False  # a trace of it was admitted
    samples: int = 1  # traces that one request asked for; they do not come all at once
    refill: str = protocol.REFILL_OFF  # of its first trace with refill
    branched: int = 0  # branches so far
    alike: Counter[bytes] = field(default_factory=Counter)  # live traces with refill, by kind

    @property
    def for_memory(self) -> bool:
        """Whether its traces are pruned, not queued or retracted, when memory is short."""
        return not self.stopped and (self.baseline is None or self.baseline.FOR_MEMORY)

    @property
    def is_held(self) -> bool:
        """Whether it asked for a share of the pool."""
        return self.prune_at < 1

    @property
    def limited(self) -> bool:
        """Whether it counts as one of the groups that run at once."""
        return self.for_memory and not self.alone

    @property
    def expected(self) -> int:
        """Traces that live, or are known to come."""
        return self.live + max(0, self.samples - self.joined)

    @property
    def survivors(self) -> int:
        """Traces that are running, waiting or finished normally."""
        return self.live + self.finished

    @property
    def prunable(self) -> bool:
        """Whether it may lose a trace when memory is short."""
        return self.for_memory and self.survivors > self.min_survivors


@dataclass(frozen=True, slots=True)
class BranchOrigin:
    """Where a branch comes from.

    ``ancestors``: of the traces whose text it begins with, the first one first: the name, and at
    how many steps of the branch its part ends; ``ends``: at how many output tokens.
    """

    parent: str  # request id
    position: int  # of the last token taken over, in the output
    ancestors: tuple[tuple[str, int], ...]
    ends: tuple[int, ...]
    tokens: int = 0  # tokens of the traces before it in this place, less those taken over
    reasoning_tokens: int = 0  # likewise

    def as_json(self, name: str) -> dict[str, Any]:
        """JSON values; ``name`` is the branch's own."""
        return {
            protocol.BRANCH_PARENT: self.parent,
            protocol.BRANCH_POSITION: self.position,
            protocol.BRANCH_DEPTH: len(self.ancestors),
            protocol.BRANCH_NAME: name,
            protocol.BRANCH_LINEAGE: [list(one) for one in self.ancestors],
        }


class Standing(Protocol):
    """A running trace's rank and tokens, where they are kept."""

    def rescored(self) -> None:
        """A step of the trace was scored."""

    def changed(self) -> None:
        """What it shares with others may be another."""

    def left(self) -> None:
        """It ended."""


@dataclass(slots=True, eq=False)
class Trace:
    """One sampled continuation. Its score is mirrored from the device after every step."""

    group: Group
    step_scores: list[float] | None = None  # kept only when the request asked for them
    positions: list[int] | None = None  # of the boundary tokens in the output; likewise
    capture: Capture | None = None
    score_sum: float = 0.0
    num_steps: int = 0
    fate: TraceStatus = TraceStatus.LIVE
    name: str | None = None  # within its group, for requests that continue it
    prompt_tokens: int = 0  # of its first request
    signal: Signal | None = None  # of its group's baseline
    timeline: Timeline | None = None
    ending: bool = False  # it is pruned at the next opportunity, whatever memory there is
    certainty: Certainty | None = None  # scores its steps on a server without a scorer
    reason: str | None = None  # why it was pruned, or is ending
    looked: int = 0  # output tokens among which a think-end token was looked for
    think_end: int | None = None  # where it was found
    rid: str = ""  # its request's id
    show_text: bool = False  # whoever watches may see the text of its steps
    tokens: int = 0  # generated, known when it ends
    told: int = 0  # generated, when its vote was told of it while its text is withheld
    refill: str = protocol.REFILL_OFF  # what becomes of its place once it is pruned
    kind: bytes = b""  # traces of one go on alike from the same text
    number: int = 0  # of traces that were in its place before it
    origin: BranchOrigin | None = None  # of a branch
    boundaries: list[Boundary] | None = None  # of its steps, with refill
    start: tuple[float, int] = (0.0, 0)  # score sum and steps of earlier requests of its name
    since: int = 0  # steps: its last branch, or its own begin
    branches: int = 0  # of it
    family: Family | None = None  # live traces of its root, with refill
    common: int = 0  # output tokens that it shares with another live trace of its family
    standing: Standing | None = None  # while it runs, in `standings`

    @property
    def refills(self) -> bool:
        """Whether a branch may take its place, and may branch from it."""
        return self.refill != protocol.REFILL_OFF

    @property
    def label(self) -> str:
        """Its name among its group's traces: its request's id, "ID/1" for the next there."""
        return f"{self.rid}/{self.number}" if self.number else self.rid

    @property
    def root(self) -> str:
        """The name of its first ancestor, which all of its family share; its own without one."""
        return self.label if self.origin is None else self.origin.ancestors[0][0]

    @property
    def depth(self) -> int:
        """Branches between it and a trace that is none."""
        return 0 if self.origin is None else len(self.origin.ancestors)

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Of each trace whose text it is made of, the name and the token where its part ends."""
        itself = (self.label, sys.maxsize)
        if self.origin is None:
            return [itself]
        names = (name for name, _ in self.origin.ancestors)
        return [*zip(names, self.origin.ends, strict=True), itself]

    def share(self, tokens: int) -> None:
        """Take over how many output tokens it shares with another live trace of its family."""
        self.common = tokens
        if self.standing is not None:
            self.standing.changed()

    @property
    def is_live(self) -> bool:
        """Whether it is running or waiting."""
        return self.fate is _LIVE

    @property
    def is_active(self) -> bool:
        """Whether it is live, and is not to end soon."""
        return self.fate is TraceStatus.LIVE and not self.ending

    @property
    def watches_tokens(self) -> bool:
        """Whether somebody wants to see its output tokens as they come."""
        return self.timeline is not None or (self.signal is not None and self.signal.watches_tokens)

    @property
    def top_k(self) -> int:
        """Candidates of the token confidence that somebody wants; 0: nobody does."""
        wanted = 0 if self.signal is None else self.signal.top_k
        return wanted or (0 if self.timeline is None else DEFAULT_TOP_K)

    def token(self, token: int, now: float, confidence: float) -> Trace | None:
        """Show an output token to those who want it; returns a trace that is to end for it.

        Args:
            token: its id.
            now: unix seconds.
            confidence: over ``top_k`` candidates, nats; NaN when ``top_k`` is 0.
        """
        if self.timeline is not None:
            self.timeline.token(now, confidence)
        if self.signal is None or not self.signal.watches_tokens:
            return None
        # A signal returns one of the traces that it was given.
        return cast("Trace | None", self.signal.token(token, confidence))

    @property
    def score(self) -> float | None:
        """Running mean of the step scores; None until the first step."""
        return self.score_sum / self.num_steps if self.num_steps else None

    def add_step(self, step_score: float, score_sum: float, position: int) -> None:
        """Take over one scored step as the device computed it; NaN means no step ended."""
        if math.isnan(step_score):
            return
        self.score_sum = score_sum
        self.num_steps += 1
        self.group.scored = True
        if self.step_scores is not None:
            self.step_scores.append(step_score)
        if self.positions is not None:
            self.positions.append(position)
        if self.boundaries is not None:
            self.boundaries.append(Boundary(position, self.score_sum, self.num_steps))
        if self.standing is not None:
            self.standing.rescored()

    def rank_key(self, length: int) -> tuple[float, int]:
        """(score sum, number of steps) by which it ranks when memory is short.

        Args:
            length: its generated tokens.
        """
        if self.signal is not None:
            return self.signal.rank_key(length)
        return self.score_sum, self.num_steps

    def meta(self) -> dict[str, Any]:
        """The response's ``meta_info["step"]``; what grows with the trace only at the end."""
        steps, fate = self.num_steps, self.fate
        info: dict[str, Any] = {
            protocol.META_GROUP: self.group.group_id,
            protocol.META_SCORE: self.score_sum / steps if steps else None,
            protocol.META_NUM_STEPS: steps,
            protocol.META_PRUNED: fate is _PRUNED,
        }
        if self.signal is not None:
            info.update(self.signal.meta())
        if self.origin is not None:
            info[protocol.META_BRANCH] = self.origin.as_json(self.label)
            extra = (self.origin.tokens, self.origin.reasoning_tokens)
            info[protocol.META_EXTRA_TOKENS] = extra
        if fate is _LIVE:
            return info
        if fate is _PRUNED:
            info[protocol.META_REASON] = self.reason
        if self.timeline is not None:
            info[protocol.META_RECORD] = self.timeline.as_json()
        if self.step_scores is not None:
            info[protocol.META_STEP_SCORES] = list(self.step_scores)
        if self.positions is not None:
            info[protocol.META_POSITIONS] = list(self.positions)
        if self.capture is not None:
            info[protocol.META_HIDDEN_STATES] = self.capture.encode()
        return info


class Watcher(Protocol):
    """Somebody who looks at the traces of one registry."""

    def joined(self, trace: Trace) -> None:
        """A trace joined its group."""

    def scored(self, trace: Trace, position: int, score: float, output_ids: Sequence[int]) -> None:
        """A step was scored, whose boundary token is at this output index."""

    def ended(self, trace: Trace) -> None:
        """A trace ended."""

    def freed(self, trace: Trace, tokens: int) -> None:
        """Pruning a trace, which has ended, freed so many KV tokens."""


class _Ended(NamedTuple):
    """What a continuation needs of a named trace that ended."""

    score_sum: float
    num_steps: int
    prompt_tokens: int
    finished_in: Group | None  # counts it as finished


@dataclass(slots=True, eq=False)
class GroupRegistry:
    """The groups that have a live trace. A group is forgotten when its last live trace ends.

    ``observer`` is called with every trace that has joined or ended. ``watcher`` is there only
    while somebody looks.
    """

    _groups: dict[str, Group] = field(default_factory=dict)
    # Named traces that ended, by group and name, the oldest first. They outlive their group,
    # because a program may have no live trace between two of its requests.
    _named: OrderedDict[tuple[str, str], _Ended] = field(default_factory=OrderedDict)
    num_live: int = 0
    num_finished: int = 0  # traces, of these groups
    # Live traces whose tokens somebody wants to see, by `top_k`; no entry is 0.
    watched: Counter[int] = field(default_factory=Counter)
    num_ending: int = 0  # live traces that end soon
    observer: Callable[[Trace], None] | None = None
    watcher: Watcher | None = None
    by_certainty: bool = False  # the server has no scorer
    stopped: str | None = None  # why STEP was given up
    calibration: TraceCalibration | None = None  # of the scorer
    families: Counter[str] = field(default_factory=Counter)  # live traces with refill, by root
    changes: int = 0  # traces that joined or ended so far, and STEP's own end
    num_held: int = 0  # groups that may not have the whole pool

    @property
    def num_begun(self) -> int:
        """Groups of which a trace was admitted."""
        return sum(group.began for group in self._groups.values())

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
        prune_at: float = 1.0,
        name: str | None = None,
        prompt_tokens: int = 0,
        step_scores: bool = False,
        capture: Capture | None = None,
        baseline: Baseline | None = None,
        context: EngineContext | None = None,
        timeline: Timeline | None = None,
        alone: bool = False,
        samples: int = 1,
        rid: str = "",
        show_text: bool = False,
        refill: str = protocol.REFILL_OFF,
        kind: bytes = b"",
    ) -> Trace:
        """Add a live trace to a group, which begins with it when it is new.

        Where members disagree on the weight, the minimum or the share of the pool, the largest
        value wins; on the baseline (which needs ``context``), the first member's.
        A named trace that ended before starts from its score then, and no longer counts as
        finished. ``alone``: its request named no group. ``samples``: traces of its request, whose
        id is ``rid``. ``show_text``: whoever watches may see the text of its steps. ``refill``:
        what becomes of its place once it is pruned, by a branch of a trace of its ``kind``.
        """
        group = self._groups.get(group_id)
        if group is None:
            group = Group(group_id, weight, min_survivors, prune_at, baseline=baseline, alone=alone)
            group.stopped = self.stopped is not None
        trace = Trace(
            group,
            step_scores=[] if step_scores else None,
            positions=_positions(capture) if step_scores or capture is not None else None,
            capture=capture,
            name=name,
            prompt_tokens=prompt_tokens,
            timeline=timeline,
            rid=rid,
            show_text=show_text,
            certainty=Certainty() if self.by_certainty else None,
            refill=refill,
            kind=kind,
            boundaries=None if refill == protocol.REFILL_OFF else [],
        )
        if group.baseline is not None and context is not None:
            trace.signal = group.baseline.signal(trace, group.joined + 1, context)
        # Counted only now: what raises above must leave no survivor behind that does not exist.
        self.num_held -= group_id in self._groups and group.is_held
        self._groups[group_id] = group
        self.changes += 1
        group.weight = max(group.weight, weight)
        group.min_survivors = max(group.min_survivors, min_survivors)
        group.prune_at = max(group.prune_at, prune_at)
        self.num_held += group.is_held
        group.alone = group.alone and alone
        group.samples = max(group.samples, samples)
        group.live += 1
        group.joined += 1
        if group.refill == protocol.REFILL_OFF:
            group.refill = refill
        trace.refill = group.refill if trace.refills else refill
        self.num_live += 1
        if trace.refills:
            self.families[trace.root] += 1
            trace.family = Family()
            trace.family.add(trace)
            group.alike[kind] += 1
        if trace.watches_tokens:
            self.watched[trace.top_k] += 1
        before = None if name is None else self._named.pop((group_id, name), None)
        if before is not None:
            trace.score_sum, trace.num_steps = before.score_sum, before.num_steps
            trace.start, trace.since = (before.score_sum, before.num_steps), before.num_steps
            trace.prompt_tokens = before.prompt_tokens
            group.scored = group.scored or before.num_steps > 0
            if before.finished_in is group:
                group.finished -= 1
                self.num_finished -= 1
        if self.observer is not None:
            self.observer(trace)
        if self.watcher is not None:
            self.watcher.joined(trace)
        return trace

    def branch(
        self, place: Trace, parent: Trace, position: int, tokens: int, reasoning_tokens: int
    ) -> Trace:
        """Put a live branch of ``parent`` in the place of a pruned trace of the same group.

        Its score starts from the parent's steps before the token at ``position``; a step that ends
        there is scored again, in the pass that consumes that token.

        Args:
            place: the pruned trace.
            parent: live or finished.
            position: of the last output token that the branch takes over.
            tokens: as :class:`BranchOrigin` has it.
            reasoning_tokens: likewise.
        """
        group, known = parent.group, parent.boundaries
        family = parent.family
        assert place.group is group and place.fate is TraceStatus.PRUNED
        assert known is not None and family is not None
        steps = [boundary for boundary in known if boundary.position < position]
        ends = len([boundary for boundary in known if boundary.position <= position])
        ends += parent.start[1]
        before = () if parent.origin is None else parent.origin.ancestors
        cuts = () if parent.origin is None else parent.origin.ends
        trace = Trace(
            group,
            name=place.name,
            prompt_tokens=place.prompt_tokens,
            refill=place.refill,
            kind=place.kind,
            rid=place.rid,
            number=place.number + 1,
            show_text=place.show_text,
            certainty=_certainty_at(parent, position) if self.by_certainty else None,
            boundaries=steps,
            start=parent.start,
            since=ends,
            origin=BranchOrigin(
                parent.rid,
                position,
                (*before, (parent.label, ends)),
                tuple(min(cut, position + 1) for cut in (*cuts, position + 1)),
                tokens,
                reasoning_tokens,
            ),
        )
        if steps:
            trace.score_sum, trace.num_steps = steps[-1].score_sum, steps[-1].num_steps
        else:
            trace.score_sum, trace.num_steps = parent.start
        if place.step_scores is not None and place.positions is not None:
            trace.step_scores, trace.positions = (
                _differences(steps, parent.start[0]),
                [step.position for step in steps],
            )
        if place.timeline is not None:
            trace.timeline = Timeline()
            if parent.timeline is not None:
                trace.timeline = parent.timeline.up_to(position + 1)
        trace.family = family
        family.add(trace)
        parent.since, parent.branches = ends, parent.branches + 1
        if parent.standing is not None:  # more of its text may be in the radix tree
            parent.standing.changed()
        group.live += 1
        group.branched += 1
        self.num_live += 1
        self.changes += 1
        self.families[trace.root] += 1
        group.alike[trace.kind] += 1
        if trace.watches_tokens:
            self.watched[trace.top_k] += 1
        if trace.name is not None:
            self._named.pop((group.group_id, trace.name), None)
        if self.observer is not None:
            self.observer(trace)
        if self.watcher is not None:
            self.watcher.joined(trace)
        return trace

    def stop(self, reason: str) -> None:
        """Give STEP up for good: from now on no trace is pruned, and all reserve as others do."""
        self.stopped = reason
        self.changes += 1
        for group in self._groups.values():
            group.stopped = True

    def end_soon(self, trace: Trace) -> None:
        """Let its baseline end a live trace at the next opportunity, if that spares a survivor."""
        group = trace.group
        method = group.baseline
        if method is None or not trace.is_active:
            return
        if method.ENDS_SURVIVORS or self._spares_survivors(group):
            self._mark(trace, method.REASON)

    def dismiss(self, trace: Trace, reason: str) -> None:
        """Let a live trace end at the next opportunity, if that spares enough survivors."""
        if trace.is_active and self._spares_survivors(trace.group):
            self._mark(trace, reason)

    @staticmethod
    def _spares_survivors(group: Group) -> bool:
        return group.survivors - group.ending > group.min_survivors

    def _mark(self, trace: Trace, reason: str) -> None:
        trace.ending, trace.reason = True, reason
        trace.group.ending += 1
        self.num_ending += 1

    def end(self, trace: Trace, fate: TraceStatus) -> None:
        """Record how a live trace ended; a second call for the same trace does nothing."""
        if trace.fate is not TraceStatus.LIVE:
            return
        trace.fate = fate
        self.changes += 1
        group = trace.group
        group.live -= 1
        self.num_live -= 1
        if trace.family is not None:
            trace.family.remove(trace)
            self.families[trace.root] -= 1
            self.families = +self.families
            group.alike[trace.kind] -= 1
            if not group.alike[trace.kind]:
                del group.alike[trace.kind]
        if trace.watches_tokens:
            self.watched[trace.top_k] -= 1
            self.watched = +self.watched
        if trace.ending:
            group.ending -= 1
            self.num_ending -= 1
        if fate is TraceStatus.FINISHED:
            group.finished += 1
            self.num_finished += 1
        if trace.name is not None:
            finished_in = group if fate is TraceStatus.FINISHED else None
            self._named[group.group_id, trace.name] = _Ended(
                trace.score_sum, trace.num_steps, trace.prompt_tokens, finished_in
            )
            if len(self._named) > MAX_NAMED:
                self._named.popitem(last=False)
        if group.live == 0 and self._groups.get(group.group_id) is group:
            del self._groups[group.group_id]
            self.num_finished -= group.finished
            self.num_held -= group.is_held
            group.method_state = None
        if trace.standing is not None:
            trace.standing.left()
        if self.observer is not None:
            self.observer(trace)
        if self.watcher is not None:
            self.watcher.ended(trace)

    def __len__(self) -> int:
        return len(self._groups)


def _certainty_at(parent: Trace, position: int) -> Certainty:
    """What a branch at this output token has seen of the step that it is in, or that ends there."""
    known, found = parent.boundaries or [], Certainty()
    at = next((i for i, step in enumerate(known) if step.position == position), None)
    if at is None:  # it branches at the parent's current end
        return found if parent.certainty is None else replace(parent.certainty)
    score = known[at].score_sum - (known[at - 1].score_sum if at else parent.start[0])
    found.add(-math.log(min(1.0, max(score, 1e-300))))
    return found


def _differences(steps: list[Boundary], start: float) -> list[float]:
    """The step scores that add up to these sums."""
    sums = [start, *(step.score_sum for step in steps)]
    return [after - before for before, after in itertools.pairwise(sums)]


def _positions(capture: Capture | None) -> list[int]:
    """Those of a trace that the input holds are known; those of a generated one are recorded."""
    if capture is None or capture.prompt_tokens is None:
        return []
    return [position - capture.prompt_tokens for position in capture.wanted]
