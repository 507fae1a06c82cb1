"""The ledger of the running batch says what a look at every request says, and looks at few."""

from __future__ import annotations

import importlib.util
import random
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req, ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from step_sglang.config import StepConfig
from step_sglang.patches import guard, pruning
from step_sglang.patches.ledger import Ledger
from step_sglang.patches.state import TRACE, set_trace, trace_of
from step_sglang.pruning.groups import GroupRegistry, TraceStatus
from step_sglang.pruning.policy import Candidates
from step_sglang.pruning.standings import GroupStandings

PROMPT, LIMIT = 10, 40


class Engine:
    """SGLang's requests and batch, changed as its scheduler does."""

    def __init__(self, page: int) -> None:
        self.page, self.number = page, 0
        self.groups = GroupRegistry()
        self.state: Any = SimpleNamespace(
            config=StepConfig("s"), groups=self.groups, ledger=None, unfit=None, aborts=False
        )
        self.batch: Any = ScheduleBatch(reqs=[])
        self.batch.spec_algorithm = SpeculativeAlgorithm.NONE
        self.batch.token_to_kv_pool_allocator = SimpleNamespace(page_size=page)
        self.fresh: list[Any] = []  # whose prompt is not in the tree yet
        self.queue: list[Any] = []
        self.ledger = Ledger(self.state, self.batch)

    @property
    def reqs(self) -> list[Any]:
        return self.batch.reqs

    def start(self, group: str | None) -> None:
        self.number += 1
        params = SamplingParams(max_new_tokens=LIMIT)
        req = Req(f"r{self.number}", "", array("q", range(PROMPT)), params)
        if group is not None:
            set_trace(req, self.groups.join(group))
        self.run(req)

    def run(self, req: Any) -> None:
        req.kv.kv_allocated_len = req.kv.kv_committed_len = PROMPT + len(req.output_ids)
        req.kv.cache_protected_len = 0
        self.batch.reqs = [*self.reqs, req]
        self.fresh.append(req)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.batch.reqs = [req for req in self.reqs if not req.finished()]
            for req in self.reqs:
                req.kv.kv_allocated_len += 1
                req.kv.kv_committed_len += 1
            for req in self.reqs:
                req.output_ids.append(9)
                if req in self.fresh:
                    req.kv.cache_protected_len = PROMPT // self.page * self.page
                if len(req.output_ids) >= LIMIT:
                    self.finish(req)
            self.fresh = []

    def finish(self, req: Any) -> None:
        if not req.finished():
            req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
            req.kv.kv_allocated_len = req.kv.kv_committed_len = 0
            if (trace := trace_of(req)) is not None:
                self.groups.end(trace, TraceStatus.FINISHED)

    def score(self, req: Any, score: float) -> None:
        if (trace := trace_of(req)) is not None and trace.is_live:
            trace.add_step(score, trace.score_sum + score, 0)

    def abort(self, req: Any) -> None:
        req.to_finish = FINISH_ABORT()
        self.state.aborts = True

    def retract(self, req: Any) -> None:
        if not req.finished() and req.to_finish is None:
            self.batch.reqs = [one for one in self.reqs if one is not req]
            self.queue.append(req)
            self.ledger.forget(req)

    def share(self, req: Any) -> None:
        """A branch takes over what a trace has generated, or the last one to share it ends."""
        if (trace := trace_of(req)) is not None and trace.is_live and not req.finished():
            if trace.common:
                trace.common = 0
            else:
                trace.common = len(req.output_ids)
                shared = PROMPT + trace.common
                req.kv.cache_protected_len = shared // self.page * self.page
            if trace.standing is not None:
                trace.standing.changed()

    def act(self, what: str, value: Any, score: float = 0.5) -> None:
        if what == "start":
            self.start(value)
        elif what == "decode":
            self.decode(value)
        elif what == "resume":
            while self.queue:
                self.run(self.queue.pop())
        elif what == "turn":
            self.batch.reqs = [*self.reqs[value:], *self.reqs[:value]]
        elif self.reqs:
            req = self.reqs[value % len(self.reqs)]
            if what == "score":
                self.score(req, score)
            else:
                getattr(self, what)(req)

    def check(self, tokens: int) -> None:
        """Compare, and prune."""
        self.ledger.sync(self.batch)
        self.ledger.end_aborted()
        for req in self.reqs:  # now a look finds nobody else
            trace = trace_of(req)
            assert trace is None or req.to_finish is None or not trace.is_live
        staying = pruning._staying(self.batch)
        assert self.ledger.need() == self.batch.new_tokens_required_next_decode(staying)
        assert pruning._held_next(self.batch, self.ledger) == pruning._held_next(self.batch, None)
        if any(req.next_output_finishes_by_length() for req in self.reqs if not req.finished()):
            assert self.ledger.may_finish()
        views = pruning._views(self.reqs, self.page, set())
        reference = Candidates(views, self.state.config).take_until(tokens)
        victims = self.ledger.round().take_until(tokens)
        assert victims == reference
        reqs = [self.reqs[victim.handle] for victim in victims]
        for req in reqs:
            self.groups.end(trace_of(req), TraceStatus.PRUNED)
            req.finished_reason = FINISH_ABORT()
            req.kv.kv_allocated_len = req.kv.kv_committed_len = 0
            staying = pruning._staying(self.batch)
            assert self.ledger.need() == self.batch.new_tokens_required_next_decode(staying)
        self.batch.reqs = [req for req in self.reqs if not req.finished()]
        self.ledger.dismissed(reqs)


places = st.integers(0, 50)
starts = st.tuples(st.just("start"), st.sampled_from([None, "a", "a", "b"]))
actions = st.one_of(
    starts,
    starts,
    st.tuples(st.just("score"), places, st.sampled_from([0.1, 0.3, 0.9])),
    st.tuples(st.just("score"), places, st.sampled_from([0.1, 0.3, 0.9])),
    st.tuples(st.just("decode"), st.integers(1, 6)),
    st.tuples(st.just("decode"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["finish", "abort", "retract", "share", "turn"]), places),
    st.tuples(st.just("resume"), st.just(0)),
    st.tuples(st.just("check"), st.integers(-2, 60)),
    st.tuples(st.just("check"), st.just(1)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(starts, min_size=2, max_size=10),
    st.lists(actions, max_size=50),
    st.sampled_from([1, 4, 16]),
)
def test_it_says_what_a_look_at_every_request_says(first, then, page) -> None:
    engine = Engine(page)
    for action in (*first, ("decode", 1), *then, ("decode", 2), ("check", 1)):
        if action[0] == "check":
            engine.check(action[1])
        else:
            engine.act(*action)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "scheduler_cost.py"
    spec = importlib.util.spec_from_file_location("scheduler_cost", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.prepare()
    return module


class Small:
    """Requests in the bench's scheduler: a letter each, that of its group, or `.` for none."""

    def __init__(self, bench: ModuleType, layout: str, seed: int, *, ledger: bool) -> None:
        self.rig = bench.Rig(len(layout), 100, room=100_000)
        self.groups = self.rig.state.groups
        if not ledger:
            self.rig.state.unfit = self.rig.batch.reqs
        draw = random.Random(seed)
        for req, name in zip(self.rig.reqs, layout, strict=True):
            self.groups.end(trace_of(req), TraceStatus.ABORTED)
            req.output_ids = array("q", [9]) * 100
            req.kv.kv_allocated_len = req.kv.kv_committed_len = 200
            delattr(req, TRACE)
            score = draw.random()
            if name != ".":
                trace = self.groups.join(name, prune_at=0.5)
                trace.score_sum, trace.num_steps = 4 * score, 4
                set_trace(req, trace)
        self.rig.state.ledger = None

    @property
    def rids(self) -> list[str]:
        return [req.rid for req in self.rig.batch.reqs]

    def step(self) -> None:
        """A decode step, and what STEP prunes before it."""
        pruning.update_running_batch(self.rig.scheduler, self.rig.batch)
        if not self.rig.state.ledger:
            self.rig.state.unfit = self.rig.batch.reqs
        for req in self.rig.batch.reqs:
            req.kv.kv_allocated_len += 1
            req.kv.kv_committed_len += 1
            req.output_ids.append(9)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests whose memory was released, in order."""
    from sglang.srt.mem_cache import common

    rids: list[str] = []
    monkeypatch.setattr(common, "release_kv_cache", lambda req, *_, **__: rids.append(req.rid))
    return rids


@pytest.mark.parametrize("layout", ["aaaabbbb", "abababab", "aab.bb", ".aabbcc.abc", "bbbb.aaaa"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_that_exceed_their_shares_in_one_step_lose_their_own_worst(
    bench: ModuleType, released: list[str], layout: str, seed: int
) -> None:
    lost: list[list[str]] = []
    for ledger in (True, False):
        small = Small(bench, layout, seed, ledger=ledger)
        pool = small.rig.scheduler.max_total_num_tokens
        for req in small.rig.reqs:
            if (trace := trace_of(req)) is not None:
                size = layout.count(trace.group.group_id)
                trace.group.prune_at = (102 * size + 0.5) / pool  # too much in the third step
        failures, before = guard.counts(), small.rids
        for _ in range(4):
            small.step()
        assert guard.counts() == failures
        assert (small.rig.state.ledger is not None) == ledger
        lost.append([rid for rid in before if rid not in small.rids])
        assert sorted(released) == sorted(lost[-1])
        released.clear()
        survivors = {trace_of(req).group.group_id for req in small.rig.batch.reqs if trace_of(req)}
        assert survivors == {*layout} - {"."}
    assert lost[0] == lost[1] and lost[0]


@pytest.mark.parametrize("ledger", [True, False])
def test_an_aborted_trace_makes_room_below_the_watermark(
    bench: ModuleType, released: list[str], ledger: bool
) -> None:
    small = Small(bench, "aaaaaa", 0, ledger=ledger)
    small.rig.state.kv_limit = 6 * 102  # passed in the third step
    for _ in range(2):
        small.step()
    small.rig.batch.reqs[2].to_finish = FINISH_ABORT()
    small.rig.state.aborts = True
    small.step()
    assert not released and small.groups.num_survivors == 5
    small.rig.batch.reqs = [req for req in small.rig.batch.reqs if req.to_finish is None]
    for _ in range(30):
        small.step()
    assert released


def test_a_trace_leaves_though_its_standing_cannot(
    bench: ModuleType, released: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(bench, "aaaa", 0, ledger=True)
    small.rig.state.kv_limit = 4 * 102
    for _ in range(2):
        small.step()
    with monkeypatch.context() as patch:
        patch.setattr(GroupStandings, "remove", None)
        small.step()
    assert len(released) == 1 and released[0] not in small.rids
    for _ in range(60):
        small.step()
    assert len(released) == 2
    ledger = small.rig.state.ledger
    ledger.sync(small.rig.batch)
    assert ledger.standings.sound
    held = ledger.standings.held_next()
    assert sum(held.values()) == sum(pruning.own_tokens(r, 1) + 1 for r in small.rig.batch.reqs)


def test_a_ledger_that_could_not_say_who_finishes_is_not_asked_again(
    bench: ModuleType, released: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have left out of its limits those it could not ask about."""
    small = Small(bench, "aaaa", 0, ledger=True)
    small.rig.state.kv_limit = 0  # every step looks
    trace_of(small.rig.reqs[0]).group.min_survivors = 4
    small.step()
    ledger = small.rig.state.ledger
    assert ledger is not None and not ledger.closed
    monkeypatch.setattr(Ledger, "may_finish", None)
    small.step()
    assert ledger.closed and small.rig.state.ledger is not ledger


class Watched(Req):
    """Counts what is read of requests."""

    reads = 0

    def __getattribute__(self, name: str) -> Any:
        Watched.reads += 1
        return super().__getattribute__(name)


@pytest.fixture
def unwatched() -> Iterator[None]:
    yield
    Watched.reads = 0


def reads_of_rounds(bench: ModuleType, traces: int, prune_at: float) -> list[int]:
    """Fields of requests that are read in each step that prunes, the engine's own work aside."""
    # A victim frees what two steps take.
    rig = bench.Rig(traces, 2 * traces, room=traces * 2, prune_at=prune_at)
    counts: list[int] = []

    def uncounted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = Watched.reads
            try:
                return function(*args, **kwargs)
            finally:
                Watched.reads = before

        return call

    from sglang.srt.mem_cache import common

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "release_kv_cache", uncounted(rig.release))
        rig.batch.filter_batch = uncounted(rig.batch.filter_batch)
        for number in range(20):
            rig.step(number)
        for req in rig.reqs:
            req.__class__ = Watched
        for number in range(40):
            pruned, before = rig.pruned, Watched.reads
            pruning.update_running_batch(rig.scheduler, rig.batch)
            if rig.pruned > pruned:
                assert rig.pruned == pruned + 1
                counts.append(Watched.reads - before)
            rig.step(number)
    assert len(counts) >= 5
    return counts


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("prune_at", [1.0, 0.5])
def test_a_round_that_prunes_one_looks_at_few(bench: ModuleType, prune_at: float) -> None:
    """However many run. A look at every request reads each several times."""
    few, many = (reads_of_rounds(bench, traces, prune_at) for traces in (64, 512))
    assert max(many) <= max(few) + 10 and max(many) < 100, (few, many)
