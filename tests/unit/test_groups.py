"""Life of traces and groups."""

from __future__ import annotations

import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.baselines import EngineContext, Longest, Signal
from step_sglang.baselines.embedding import ngrams
from step_sglang.pruning.groups import GroupRegistry, Trace, TraceStatus


def test_survivors_are_live_or_finished_normally() -> None:
    groups = GroupRegistry()
    a, b, c, d = (groups.join("q") for _ in range(4))
    assert a.group is d.group and a.group.survivors == 4
    groups.end(a, TraceStatus.FINISHED)
    groups.end(b, TraceStatus.PRUNED)
    groups.end(c, TraceStatus.ABORTED)
    assert a.group.survivors == 2 and groups.num_live == 1
    groups.end(b, TraceStatus.FINISHED)  # too late: it stays pruned
    assert b.fate is TraceStatus.PRUNED and a.group.survivors == 2
    groups.end(d, TraceStatus.FINISHED)
    assert len(groups) == 0 and groups.num_live == 0
    assert groups.join("q").group.survivors == 1  # a group used again begins anew


def test_when_step_is_given_up_no_group_is_limited_or_pruned_and_whoever_looks_sees_it() -> None:
    groups = GroupRegistry()
    for _ in range(3):
        group = groups.join("q").group
    assert group.limited and group.prunable
    before = groups.changes  # those that are held back are looked at again when this changes
    groups.stop("why")
    later = groups.join("r").group
    assert groups.changes > before + 1
    assert not any(one.limited or one.prunable for one in (group, later))


def test_the_largest_weight_and_minimum_of_a_group_win() -> None:
    groups = GroupRegistry()
    group = groups.join("q", weight=0.5, min_survivors=2).group
    groups.join("q", weight=3.0, min_survivors=1)
    groups.join("q", weight=2.0, min_survivors=1)
    assert (group.weight, group.min_survivors) == (3.0, 2)
    assert group.prunable  # three live, two must stay
    assert groups.join("r").group.weight == 1.0


def test_a_group_says_whether_it_counts_and_how_many_will_come() -> None:
    groups = GroupRegistry()
    lone = groups.join("rid", alone=True).group
    assert not lone.limited and lone.expected == 1
    first = groups.join("q", samples=4)
    group = first.group
    assert group.limited and group.expected == 4 and groups.num_begun == 0
    group.began = True
    assert groups.num_begun == 1
    groups.end(first, TraceStatus.PRUNED)
    assert len(groups) == 1  # it was the last that lived, and begins anew
    group = groups.join("q", samples=4).group
    others = [groups.join("q", samples=4) for _ in range(4)]
    assert group.expected == 5  # more came than one request asked for
    groups.end(others[0], TraceStatus.FINISHED)
    assert group.expected == 4
    assert groups.join("rid").group.limited  # somebody named its group: it is not alone


def test_every_change_is_counted() -> None:
    groups = GroupRegistry()
    traces = [groups.join("q") for _ in range(3)]
    groups.end(traces[0], TraceStatus.ABORTED)
    groups.end(traces[0], TraceStatus.ABORTED)
    assert groups.changes == 4


def test_thousands_of_groups_leave_nothing_behind() -> None:
    groups = GroupRegistry()

    def serve(count: int) -> None:
        for i in range(count):
            traces = [groups.join(f"group {i}") for _ in range(8)]
            for j, trace in enumerate(traces):
                trace.add_step(0.5, 0.5, j)
                groups.end(trace, list(TraceStatus)[1 + j % 3])

    serve(10)
    tracemalloc.start()
    try:
        serve(5000)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(groups) == 0 and groups.num_live == 0
    assert grown < 4096  # bytes


def test_a_trace_costs_less_than_a_kibibyte() -> None:
    groups = GroupRegistry()
    tracemalloc.start()
    try:
        traces = [groups.join(f"group {i % 16}") for i in range(1024)]
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(traces) < 1024


def test_score_is_the_running_mean() -> None:
    trace = GroupRegistry().join("q", step_scores=True)
    assert trace.score is None and trace.meta()["score"] is None
    trace.add_step(0.25, 0.25, 4)
    trace.add_step(math.nan, 99.0, 5)
    trace.add_step(0.75, 1.0, 9)
    assert trace.score == 0.5 and trace.num_steps == 2
    assert "step_scores" not in trace.meta()
    trace.fate, trace.reason = TraceStatus.PRUNED, "decode"
    assert trace.meta() == {
        "group": "q",
        "score": 0.5,
        "num_steps": 2,
        "pruned": True,
        "reason": "decode",
        "step_scores": [0.25, 0.75],
        "positions": [4, 9],
    }


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(TraceStatus)[1:]))))
def test_nothing_is_left_when_all_have_ended(ends: list[tuple[str, TraceStatus]]) -> None:
    groups = GroupRegistry()
    traces = [(groups.join(name), fate) for name, fate in ends]
    assert groups.num_live == len(ends)
    for trace, fate in traces:
        groups.end(trace, fate)
    assert len(groups) == 0 and groups.num_live == 0


def test_a_named_trace_is_continued_with_its_score_and_counts_once() -> None:
    registry = GroupRegistry()
    other = registry.join("g")
    first = registry.join("g", name="fork 1", prompt_tokens=7)
    first.add_step(0.5, 0.5, 3)
    first.add_step(0.25, 0.75, 9)
    registry.end(first, TraceStatus.FINISHED)
    assert other.group.survivors == 2
    again = registry.join("g", name="fork 1", prompt_tokens=99)
    assert (again.score, again.num_steps, again.prompt_tokens) == (0.375, 2, 7)
    assert again.group is other.group and other.group.survivors == 2
    registry.end(again, TraceStatus.FINISHED)
    registry.end(other, TraceStatus.FINISHED)
    assert len(registry) == 0
    # The group is forgotten meanwhile; the trace is not. A name belongs to its group.
    later = registry.join("g", name="fork 1")
    assert later.num_steps == 2 and later.group.survivors == 1
    assert registry.join("h", name="fork 1").num_steps == registry.join("g").num_steps == 0


def test_only_so_many_named_traces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step_sglang.pruning.groups.MAX_NAMED", 2)
    registry = GroupRegistry()
    for name in "abc":
        trace = registry.join("g", name=name)
        trace.add_step(0.5, 0.5, 0)
        registry.end(trace, TraceStatus.FINISHED)
    assert [registry.join("g", name=name).num_steps for name in "abc"] == [0, 1, 1]


def test_a_join_that_fails_leaves_nothing_behind() -> None:
    class Broken(Longest):
        def signal(self, trace: Trace, number: int, context: EngineContext) -> Signal:
            raise RuntimeError

    groups = GroupRegistry()
    context = EngineContext(frozenset(), None, ngrams)
    with pytest.raises(RuntimeError):
        groups.join("q", baseline=Broken(), context=context)
    assert len(groups) == 0 and groups.num_live == groups.num_survivors == 0 and not groups.watched
    assert groups.join("q").group.survivors == 1
