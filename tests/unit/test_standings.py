"""Victims that are handed out from kept standings are those that a look at every trace gives."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.config import StepConfig
from step_sglang.pruning.groups import Group, GroupRegistry, Trace, TraceStatus
from step_sglang.pruning.policy import Candidates, GroupView, TraceView
from step_sglang.pruning.standings import Look, StandingRound, Standings


@dataclass(eq=False)
class Request:
    """A running trace as an engine knows it."""

    trace: Trace
    allocated: int
    shared: int
    length: int


class Batch:
    """Traces that run, looked at in both ways."""

    def __init__(self, page: int, config: StepConfig) -> None:
        self.page, self.config = page, config
        self.groups = GroupRegistry()
        self.standings = Standings(page, config.min_steps)
        self.running: list[Request] = []
        self._order = 0

    def own(self, req: Request, more: int = 0) -> int:
        return -(-(req.allocated + more) // self.page) * self.page - req.shared

    def start(self, name: str, prompt: int, length: int, weight: float, survivors: int) -> None:
        trace = self.groups.join(name, weight=weight, min_survivors=survivors)
        shared = prompt // self.page * self.page
        req = Request(trace, prompt + length, shared, length)
        self.running.append(req)
        self._order += 1
        self.standings.add(req, trace, self._order, req.allocated, shared)

    def decode(self, steps: int) -> None:
        for req in self.running:
            req.allocated += steps
            req.length += steps
        self.standings.tick(steps)

    def score(self, place: int, score: float) -> None:
        trace = self.running[place % len(self.running)].trace
        trace.add_step(score, trace.score_sum + score, 0)

    def retract(self, place: int) -> None:
        req = self.running.pop(place % len(self.running))
        assert req.trace.standing is not None
        req.trace.standing.left()

    def end(self, req: Request, fate: TraceStatus) -> None:
        self.groups.end(req.trace, fate)
        self.running.remove(req)

    def look(self, req: Request) -> Look:
        return Look(self.running.index(req), self.own(req), req.length)

    def reference(self) -> Candidates:
        members: dict[Group, list[TraceView]] = defaultdict(list)
        for place, req in enumerate(self.running):
            view = TraceView(place, self.own(req), req.length, *req.trace.rank_key(req.length))
            members[req.trace.group].append(view)
        views = [
            GroupView(g.group_id, g.survivors, g.min_survivors, g.weight, traces)
            for g, traces in members.items()
        ]
        return Candidates(views, self.config)

    def check(self) -> None:
        held: dict[Group, int] = defaultdict(int)
        for req in self.running:
            held[req.trace.group] += self.own(req, 1)
        assert self.standings.held_next() == held


starts = st.tuples(
    st.just("start"), st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 3),
    st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 3),
)  # fmt: skip
# Few values, so that traces tie, and means are equal to scores but for rounding.
scores = st.tuples(st.just("score"), st.integers(0, 50), st.sampled_from([0.1, 0.1, 0.3, 0.7, 1.0]))
rounds = st.tuples(
    st.just("round"),
    st.lists(
        st.tuples(st.integers(-3, 60), st.sampled_from([None, None, "a", "b"])),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 4),
)
actions = st.one_of(
    starts,
    starts,
    scores,
    scores,
    st.tuples(st.just("decode"), st.integers(1, 20)),
    st.tuples(st.just("finish"), st.integers(0, 50)),
    st.tuples(st.just("retract"), st.integers(0, 50)),
    rounds,
    rounds,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(starts, min_size=1, max_size=12),
    st.lists(actions, max_size=60),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 3),
)
def test_the_same_victims_in_the_same_order(first, then, page, min_steps) -> None:
    batch = Batch(page, StepConfig("s", min_steps=min_steps))
    for what, *values in (*first, *then):
        if what == "start":
            batch.start(*values)
        elif what == "decode":
            batch.decode(*values)
        elif batch.running and what == "score":
            batch.score(*values)
        elif batch.running and what == "retract":
            batch.retract(*values)
        elif batch.running and what == "finish":
            batch.end(batch.running[values[0] % len(batch.running)], TraceStatus.FINISHED)
        elif batch.running and what == "round":
            asked, spared = values
            kept = StandingRound(batch.standings.groups.values(), batch.look)
            reference = batch.reference()
            victims = []
            for tokens, group in asked:
                found = kept.take_until(tokens, group)
                assert found == reference.take_until(tokens, group)
                victims += found
            # Room came sooner than it seemed: the last of them go on.
            gone = [batch.running[v.handle] for v in victims[: max(0, len(victims) - spared)]]
            for req in gone:
                batch.end(req, TraceStatus.PRUNED)
        batch.check()


def test_an_unscored_trace_ranks_as_the_mean_of_those_that_ran_when_the_round_began() -> None:
    batch = Batch(1, StepConfig("s"))
    for _ in range(5):
        batch.start("a", 0, 10, 1.0, 1)
    for place, score in enumerate((0.2, 0.6, 0.7, 0.9)):
        batch.score(place, score)
    kept = StandingRound(batch.standings.groups.values(), batch.look)
    # The mean is .6, as is the second; without the first it would be above .7.
    assert [v.handle for v in kept.take_until(40)] == [0, 4, 1, 2]


def test_a_round_ranks_nobody_and_adds_nothing_up() -> None:
    """What a step costs grows with the steps that were scored in it, not with the traces."""
    batch = Batch(1, StepConfig("s"))
    for _ in range(512):
        batch.start("a", 0, 10, 1.0, 1)
    for place in range(510):  # two have no score
        batch.score(place, place / 512)
    looked: list[Request] = []

    def look(req: Request) -> Look:
        looked.append(req)
        return batch.look(req)

    ranked = batch.standings.ranked
    for number in range(100):
        batch.decode(1)
        batch.score(number * 7 % 300, 0.9)
        kept = StandingRound(batch.standings.groups.values(), look)
        (victim,) = kept.take_until(1)
        batch.end(batch.running[victim.handle], TraceStatus.PRUNED)
    assert batch.standings.ranked == ranked + 100
    assert batch.standings.summed == 0
    assert len(looked) == 100
