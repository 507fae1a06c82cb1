"""Evaluates policies and votes on recorded traces, in a model of the server's memory.

The traces were recorded without pruning; a policy decides which of them it would have pruned in a
pool of a given size, and when. One limit: the reference's policy also scores steps after the
thinking, which traces recorded on an ordinary STEP server lack.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from step_sglang.config import StepConfig
from step_sglang.errors import nearest
from step_sglang.evaluation.cost_model import Prices
from step_sglang.evaluation.errors import ReplayError
from step_sglang.evaluation.simulator import (
    DecodeStep,
    Request,
    Reserve,
    ScoreEvent,
    Simulator,
)
from step_sglang.evaluation.stats import Mean, mean_of
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace
from step_sglang.pruning.groups import Group
from step_sglang.pruning.policy import TraceView
from step_sglang.scoring.calibration import TraceCalibration, calibration_of
from step_sglang.voting.classes import run_here
from step_sglang.voting.early_stopping import highest_weight, is_settled
from step_sglang.voting.session import VoteRules
from step_sglang.voting.shrink import surplus
from step_sglang.voting.tally import Ballot, Poll, tallying, weight_of
from step_sglang.voting.verifier import AnswerVerifier

Rank = Callable[[Request], tuple[float, int]]
POLICIES = ("none", "fair", "paper", "random", "longest")
WATERMARKED = ("fair", "random", "longest")  # that a share of the pool applies to
NO_PRUNING = "none"  # self-consistency: SGLang reserves, queues and retracts
NEVER_EARLY = VoteRules(early="off")
_LAG = 2  # a boundary token is scored when it is consumed: one token later, known the next step


@dataclass(frozen=True)
class ReplayOutcome:
    """The outcome of one group."""

    question: str
    finished: tuple[RecordedTrace, ...]
    pruned: int
    cancelled: int  # cut short by the early end, or because the vote did not need them
    retracted: int
    tokens: int
    steps: int  # decode steps until the last trace ended
    seconds: float
    wait_share: float  # share of the steps that a trace waited, mean over traces
    calibration: TraceCalibration | None = None  # of the scorer that scored the traces


@dataclass(frozen=True)
class Prediction:
    """The outcome of a policy and a vote over all groups."""

    policy: str
    vote: str
    early: str  # rule by which the vote ends a group
    prune_at: float  # share of the pool that the group may fill
    n: int
    pool: int
    groups: int
    accuracy: Mean
    tokens: float  # of a group, mean
    pruned: float
    cancelled: float
    retracted: float
    steps: float
    seconds: float
    wait_share: float


def split_groups(groups: Sequence[RecordedGroup], n: int | None) -> list[RecordedGroup]:
    """Split recorded groups into groups of n traces; None leaves them as recorded.

    Raises:
        ReplayError: no group is complete, or none has n traces, or they differ in size and n is
            None.
    """
    whole = [group for group in groups if group.whole]
    sizes = sorted({len(group.traces) for group in whole})
    if n is None and len(sizes) > 1:
        raise ReplayError(f"the recorded groups have {_listed(sizes)} traces: choose with -n")
    found = []
    for group in whole:
        size = n or len(group.traces)
        for start in range(0, len(group.traces) - size + 1, size):
            found.append(replace(group, traces=group.traces[start : start + size]))
    if not found:
        raise ReplayError(
            f"no recorded group has {n or 'any'} traces that all ended by themselves: record with "
            "more traces, or with a larger pool"
        )
    return found


def calibrated_by(
    groups: Sequence[RecordedGroup], calibration: TraceCalibration | None
) -> list[RecordedGroup]:
    """The same groups; those that state no calibration have this one."""
    if calibration is None:
        return list(groups)
    return [
        group if group.calibration is not None else replace(group, calibration=calibration.pair)
        for group in groups
    ]


def simulate(
    group: RecordedGroup,
    policy: str,
    pool: int,
    cost_model: Prices,
    page: int = 1,
    seed: int = 0,
    rules: VoteRules = NEVER_EARLY,
    prune_at: float = 1.0,
    unit: int = 1,
    verifier: AnswerVerifier | None = None,
    ranks: Sequence[Rank] | None = None,
) -> ReplayOutcome:
    """The outcome of a group that has a pool of that size to itself.

    Args:
        group: complete traces.
        policy: one of :data:`POLICIES`.
        pool: KV tokens.
        cost_model: of the machine.
        page: KV tokens of a page.
        seed: of the random policy.
        rules: by which the group ends early: at once, when the deciding trace has ended. A real
            client hears of that end, and the server of the client's, a little later.
        prune_at: the share of the pool that the group may fill; for :data:`WATERMARKED` policies.
        unit: real tokens that a token of ``group`` stands for, where the caller made it coarser.
        verifier: compares answers for ``rules``; None: in this process.
        ranks: of each trace, by which it is pruned, instead of the policy's own.

    Raises:
        ReplayError: there is no such policy, it has no such share, or the pool cannot hold
            the longest trace.
    """
    ranked = None if ranks is None else [ranks]
    (outcome,) = simulate_together(
        [group], policy, pool, cost_model, page, seed, rules, prune_at, unit, verifier, ranked
    )
    return outcome


def simulate_together(
    groups: Sequence[RecordedGroup],
    policy: str,
    pool: int,
    cost_model: Prices,
    page: int = 1,
    seed: int = 0,
    rules: VoteRules = NEVER_EARLY,
    prune_at: float = 1.0,
    unit: int = 1,
    verifier: AnswerVerifier | None = None,
    ranks: Sequence[Sequence[Rank]] | None = None,
) -> list[ReplayOutcome]:
    """The outcomes of groups that all come at once and share the pool, see :func:`simulate`.

    Steps and seconds of a group are those until its own last trace ended.
    """
    if policy not in POLICIES:
        near = nearest(policy, POLICIES)
        known = ", ".join(POLICIES)
        raise ReplayError(f"there is no policy {policy[:40]!r}{near}; there are {known}")
    if prune_at != 1 and policy not in WATERMARKED:
        raise ReplayError(f"the policy {policy} has no share of the pool: leave it at 1")
    room = pool - sum(-(-group.prompt_tokens // page) * page for group in groups)
    for group in groups:
        longest = max(trace.tokens for trace in group.traces)
        if longest + 2 * page > room:
            raise ReplayError(
                f"a pool of {pool} tokens cannot hold a trace of {group.prompt_tokens} + {longest}"
            )
    engine = "paper" if policy == "paper" else "fair"
    config = StepConfig("recorded", policy=engine, prune_at=prune_at)
    limit = min(max(group.max_new_tokens for group in groups), room - 2)  # as SGLang cuts it
    simulator = Simulator(room, page, config, reserve=Reserve(limit, unit=unit))
    own: list[list[Request]] = []
    ends: dict[Request, _EarlyEnd] = {}
    for number, group in enumerate(groups):
        alive = None if policy == NO_PRUNING else Group(f"{number}/{group.question}")
        theirs = ranks[number] if ranks else _ranks(policy, group, seed)
        requests = [
            Request(
                0,
                0,
                trace.tokens,
                alive,
                steps=_score_events(trace.positions, trace.step_scores),
                rank=rank,
            )
            for trace, rank in zip(group.traces, theirs, strict=True)
        ]
        own.append(requests)
        if rules.early != "off" or rules.shrink:
            end = _EarlyEnd(group, requests, rules, limit, verifier)
            ends.update(dict.fromkeys(requests, end))
    if ends:

        def ended_by(finished: Sequence[Request]) -> Sequence[Request]:
            of_group: dict[_EarlyEnd, list[Request]] = {}
            for request in finished:
                of_group.setdefault(ends[request], []).append(request)
            return [ended for end, theirs in of_group.items() for ended in end(theirs)]

        simulator.ended_by = ended_by
    tokens = sum(trace.tokens for group in groups for trace in group.traces)
    simulator.run([request for requests in own for request in requests], max_steps=20 * tokens)
    prompt = sum(group.prompt_tokens for group in groups) / len(groups)
    return [
        _outcome(group, requests, simulator.history, cost_model, prompt)
        for group, requests in zip(groups, own, strict=True)
    ]


def _outcome(
    group: RecordedGroup,
    requests: Sequence[Request],
    history: Sequence[DecodeStep],
    cost_model: Prices,
    prompt_tokens: float,
) -> ReplayOutcome:
    steps = max(request.ended for request in requests)
    return ReplayOutcome(
        question=group.question,
        finished=tuple(
            trace
            for trace, request in zip(group.traces, requests, strict=True)
            if request.fate == "finished"
        ),
        pruned=sum(request.fate == "pruned" for request in requests),
        cancelled=sum(request.fate == "cancelled" for request in requests),
        retracted=sum(request.retractions for request in requests),
        tokens=sum(request.generated for request in requests),
        steps=steps,
        seconds=cost_model.seconds(until(history, steps), prompt_tokens),
        wait_share=sum(request.waited for request in requests) / len(requests) / max(1, steps),
        calibration=calibration_of(group.calibration),
    )


def until(history: Sequence[DecodeStep], steps: int) -> Iterator[DecodeStep]:
    """The first so many decode steps: an item of the history may stand for several."""
    for moment in history:
        if steps <= 0:
            return
        yield moment if moment.steps <= steps else moment._replace(steps=steps)
        steps -= moment.steps


def predict(
    groups: Sequence[RecordedGroup],
    policies: Sequence[str],
    votes: Sequence[str],
    pools: Sequence[int],
    cost_model: Prices,
    page: int = 1,
    verifier: AnswerVerifier | None = None,
    early: Sequence[str] = ("off",),
    prune_at: Sequence[float] = (1.0,),
) -> Iterator[Prediction]:
    """Every policy with every vote, rule and share of every pool.

    Policies without a share (``none``, ``paper``) are evaluated once, at 1. ``verifier`` compares
    answers (None: we do).

    Raises:
        ReplayError: as for :func:`simulate`.
        VoteError: there is no such vote or rule.
        ConfigError: a share is none.
    """
    for pool in pools:
        for policy in policies:
            for share in prune_at if policy in WATERMARKED else (1.0,):

                def outcomes(
                    rules: VoteRules, policy: str = policy, pool: int = pool, share: float = share
                ) -> list[ReplayOutcome]:
                    return [
                        simulate(
                            group, policy, pool, cost_model, page, number, rules, share,
                            verifier=verifier,
                        )
                        for number, group in enumerate(groups)
                    ]  # fmt: skip

                whole = outcomes(NEVER_EARLY)  # whatever the vote is
                for vote in votes:
                    for rule in early:
                        found = whole if rule == "off" else outcomes(VoteRules(vote, rule))
                        yield _prediction(
                            found, policy, vote, rule, share, pool, len(groups[0].traces), verifier
                        )


def _prediction(
    fates: Sequence[ReplayOutcome],
    policy: str,
    vote: str,
    early: str,
    prune_at: float,
    pool: int,
    n: int,
    verifier: AnswerVerifier | None,
) -> Prediction:
    right: dict[str, list[float]] = defaultdict(list)
    for fate in fates:
        right[fate.question].append(float(is_right(fate, vote, verifier)))
    return Prediction(
        policy=policy,
        vote=vote,
        early=early,
        prune_at=prune_at,
        n=n,
        pool=pool,
        groups=len(fates),
        accuracy=mean_of(right),
        tokens=_mean([fate.tokens for fate in fates]),
        pruned=_mean([fate.pruned for fate in fates]),
        cancelled=_mean([fate.cancelled for fate in fates]),
        retracted=_mean([fate.retracted for fate in fates]),
        steps=_mean([fate.steps for fate in fates]),
        seconds=_mean([fate.seconds for fate in fates]),
        wait_share=_mean([fate.wait_share for fate in fates]),
    )


class _EarlyEnd:
    """Ends a simulated group by its vote, as `voting.session` ends a real one."""

    def __init__(
        self,
        group: RecordedGroup,
        requests: Sequence[Request],
        rules: VoteRules,
        limit: int,
        verifier: AnswerVerifier | None,
    ) -> None:
        self._traces = dict(zip(requests, group.traces, strict=True))
        self._rules, self._limit = rules, limit
        self._calibration = calibration_of(group.calibration)
        self._comparison = None if verifier is None else verifier.comparison()
        self._poll = Poll(rules.vote)
        self._ended: list[Request] = []  # as the vote did not need them

    def __call__(self, finished: Sequence[Request]) -> Sequence[Request]:
        """Those who need not go on, once these have finished."""
        rules = self._rules
        for request in finished:
            trace = self._traces[request]
            if trace.answer is not None:
                weight = weight_of(trace.score, rules.vote, self._calibration)
                ballot = Ballot(str(trace.answer), weight)
                counting = self._poll.adding(ballot)
                if self._comparison is None:
                    run_here(counting)
                else:
                    self._comparison.run(counting)
        going = [request for request in self._traces if request.fate == "waiting"]
        tallies, num_ended = self._poll.tallies(), len(self._ended)
        weights = [
            highest_weight(
                r.score_sum, r.num_steps, self._limit - r.generated, rules.vote, self._calibration
            )
            for r in going
        ]
        if is_settled(tallies, weights, rules.vote, rules.early, rules.threshold, num_ended):
            return going
        if not rules.shrink:
            return ()
        # By the scores, as a client sees them, whatever the engine prunes by.
        views = [
            TraceView(i, 0, r.generated, r.score_sum, r.num_steps) for i, r in enumerate(going)
        ]
        ended = [going[i] for i in surplus(tallies, views, num_ended, rules.shrink, rules.vote)]
        self._ended += ended
        return ended


def is_right(fate: ReplayOutcome, vote: str, verifier: AnswerVerifier | None = None) -> bool:
    """Whether the traces that finished vote for a right answer."""
    voters = [trace for trace in fate.finished if trace.answer is not None]
    ballots = [
        Ballot(str(trace.answer), weight_of(trace.score, vote, fate.calibration))
        for trace in voters
    ]
    counting = tallying(ballots, vote)
    tallies = run_here(counting) if verifier is None else verifier.comparison().run(counting)
    # The first trace of the winning answer was graded when it was recorded.
    return bool(tallies) and voters[tallies[0].members[0]].correct


@lru_cache(maxsize=4096)  # the same traces are evaluated many times
def _score_events(
    positions: tuple[int, ...], step_scores: tuple[float, ...]
) -> tuple[ScoreEvent, ...]:
    pairs = zip(positions, step_scores, strict=True)
    return tuple(ScoreEvent(position + _LAG, score) for position, score in pairs)


def _ranks(policy: str, group: RecordedGroup, seed: int) -> list[Rank | None]:
    if policy == "random":
        draw = random.Random(f"{seed}/{group.question}/{group.repeat}")
        return [_drawn(draw.random()) for _ in group.traces]
    return [_by_length if policy == "longest" else None] * len(group.traces)


def _drawn(value: float) -> Rank:
    return lambda request: (value, 1)


def _by_length(request: Request) -> tuple[float, int]:
    return -float(request.generated), 1


def _listed(sizes: Sequence[int]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
