"""Properties of the rules of refill."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_sglang import protocol
from step_sglang.pruning.groups import GroupRegistry, TraceStatus
from step_sglang.pruning.refill import (
    GAMBIT,
    RULES,
    Boundary,
    RefillRules,
    RefillView,
    Room,
    SourceView,
    branch_seed,
    can_start,
    choose_branches,
    choose_swaps,
    has_parent,
)

BEST, RANDOM = protocol.REFILL_BEST, protocol.REFILL_RANDOM


def source(handle: int, scores: list[float], *, running: bool = True, **more) -> SourceView:
    """A trace with a step every 10 tokens."""
    sums = [sum(scores[: i + 1]) for i in range(len(scores))]
    boundaries = [Boundary(10 * i + 9, s, i + 1) for i, s in enumerate(sums)]
    return SourceView(handle, 10 * len(scores) + 5, running, boundaries, **more)


def view(*sources: SourceView, places: int = 2, mode: str = BEST, **more) -> RefillView:
    running = sum(s.running for s in sources)
    values = {
        "running": running, "began": running + places, "branched": 0, "spare": 3, "expected": 100.0,
    }  # fmt: skip
    return RefillView("g", mode, range(places), sources, **{**values, **more})


def roomy(**more) -> Room:
    return Room(**{"tokens": 10**6, "requests": 100, "running": 4, **more})


@st.composite
def views(draw: st.DrawFn) -> RefillView:
    sources = []
    for handle in range(draw(st.integers(0, 7))):
        scores = [draw(st.floats(0, 1)) for _ in range(draw(st.integers(0, 12)))]
        sources.append(
            source(
                handle,
                scores,
                running=draw(st.booleans()),
                since=draw(st.integers(0, 12)),
                depth=draw(st.integers(0, 3)),
                branches=draw(st.integers(0, 3)),
            )
        )
    places = draw(st.integers(0, 6))
    return view(
        *draw(st.permutations(sources)),
        places=places,
        mode=draw(st.sampled_from(sorted(RULES))),
        began=draw(st.integers(0, 16)),
        branched=draw(st.integers(0, 20)),
        spare=draw(st.integers(-1, 6)),
        expected=draw(st.floats(1, 300)),
    )


rooms = st.builds(
    Room,
    tokens=st.integers(-100, 3000),
    requests=st.integers(-1, 8),
    running=st.integers(0, 9),
    page=st.sampled_from([1, 16]),
    shares=st.booleans(),
)


@given(views(), rooms)
def test_branches_keep_to_the_pool_the_group_and_the_parents(group, room) -> None:
    rules, before = RULES[group.mode], replace(room)
    found = choose_branches(group, room, rules)
    assert len(found) <= max(0, min(len(group.places), group.began - group.running))
    assert len(found) + group.branched <= max(group.branched, rules.branches * group.began)
    assert [b.place for b in found] == list(group.places)[: len(found)]
    parents = [b.parent for b in found]
    assert len(set(parents)) == len(parents)  # one branch of each parent
    by_handle = {s.handle: s for s in group.sources}
    needed = 0
    for branch in found:
        parent = by_handle[branch.parent]
        if rules.at_end:
            assert parent.running and branch.position == parent.length - 1
        else:
            (at,) = [b for b in parent.boundaries if b.position == branch.position]
            assert at.num_steps - parent.since >= rules.min_steps
        page = before.page
        alone = 1 if before.shares and parent.running else branch.position + 2
        needed += -(-alone // page) * page + page
    if found:
        assert len(found) <= before.requests
        margin = -(-rules.margin // before.page) * before.page
        assert needed + (before.running + len(found)) * margin <= before.tokens


def open_boundaries(group: RefillView, rules: RefillRules) -> dict[int, list[Boundary]]:
    """By their definition, one after the other."""
    lengths = [s.length for s in group.sources if s.running]
    left = max(0.0, group.expected - min(lengths)) if lengths else 0.0
    first = max(
        group.expected - left - rules.slack * group.expected,
        group.age + group.expected - rules.horizon * group.expected,
    )
    return {
        s.handle: [
            b
            for b in s.boundaries
            if b.position + 1 >= first
            and b.num_steps >= s.since + rules.min_steps
            and (s.running or b.num_steps <= len(s.boundaries) - rules.min_steps)
        ]
        for s in group.sources
    }


@given(views(), rooms, st.integers(0, 400))
def test_branches_are_the_best_of_all_that_is_open_and_fits(group, room, age) -> None:
    """What is skipped to save time could not have started; every source is looked at here."""
    group = replace(group, mode=BEST, age=age)
    rules, before = RULES[BEST], replace(room)
    ways = open_boundaries(group, rules)
    assert has_parent(group, rules) == any(ways.values())
    counts = (len(group.places), group.running, group.began, group.branched)
    most = can_start(*counts, [room], rules)
    chosen = choose_branches(group, room, rules)
    assert len(chosen) <= most
    for branch in chosen:
        assert branch.position in [b.position for b in ways[branch.parent]]
    free = min(len(group.places), group.began - group.running)
    free = min(free, rules.branches * group.began - group.branched)
    if len(chosen) < free:  # whoever was left out did not fit at any of its boundaries
        left = set(ways) - {b.parent for b in chosen}
        for source in (s for s in group.sources if s.handle in left and s.running):
            own = room.own_tokens(source.running, 0, group.prompt)
            shared = before.shares and bool(ways[source.handle])
            assert not (shared and room.fits(rules.margin, own))


@given(views(), rooms)
def test_equal_views_give_equal_branches(group, room) -> None:
    again, other = replace(group), replace(room)
    rules = RULES[group.mode]
    assert choose_branches(group, room, rules) == choose_branches(again, other, rules)
    assert choose_swaps(group, rules) == choose_swaps(again, rules)


@given(views())
def test_swaps_never_go_below_the_minimum_and_leave_a_parent(group) -> None:
    rules = replace(GAMBIT, swap=3) if group.mode != BEST else replace(RefillRules(), swap=3)
    gone = choose_swaps(group, rules)
    assert len(set(gone)) == len(gone) <= max(0, group.spare, 0)
    running = {s.handle: s for s in group.sources if s.running}
    assert set(gone) <= set(running)
    assert all(running[h].boundaries[-1].num_steps >= rules.warm_up for h in gone)
    if gone:
        assert any(h not in gone for h in (s.handle for s in group.sources))


def test_the_best_prefix_is_the_one_before_the_slip() -> None:
    slipped = source(0, [0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    poor = source(1, [0.3] * 8)
    first = choose_branches(view(slipped, poor), roomy(), RefillRules(slack=9.0))[0]
    assert first.parent == 0 and first.position == 39  # after the fourth step


def test_a_short_prefix_needs_more() -> None:
    short = source(0, [0.8, 0.8, 0.8])
    long = source(1, [0.75] * 10)
    others = [source(handle, [0.3] * 8) for handle in (2, 3)]
    first = choose_branches(view(short, long, *others), roomy(), RefillRules())[0]
    assert first.parent == 1


@pytest.mark.parametrize("more", [{"depth": 3}, {"branches": 2}])
def test_depth_and_siblings_count_against_a_prefix(more) -> None:
    first = choose_branches(
        view(source(0, [0.7] * 6, **more), source(1, [0.68] * 6)), roomy(), RefillRules()
    )[0]
    assert first.parent == 1


def test_nothing_branches_where_it_would_outlast_the_group() -> None:
    """With 90 of 100 tokens behind the last running trace, only late boundaries are left."""
    running = source(0, [0.2] * 9)
    finished = source(1, [0.9] * 10, running=False)
    found = choose_branches(view(running, finished), roomy(), RefillRules(min_steps=2))
    assert found and all(branch.position + 1 >= 70 for branch in found)


def test_branches_do_not_let_a_group_live_on() -> None:
    """Traces of 100 tokens: with a horizon of 1.25, none that may end after 125 passes."""
    rules = RefillRules(slack=9.0, horizon=1.25, min_steps=1)
    good = source(0, [0.1 * i for i in range(1, 10)])

    def at(age: int) -> list[int]:
        found = choose_branches(view(good, source(1, []), age=age), roomy(), rules)
        return [branch.position + 1 for branch in found]

    assert at(0) == at(110) == [90]  # which may end 10 passes later
    assert at(120) == []
    assert choose_branches(
        view(good, source(1, []), age=120), roomy(), replace(rules, horizon=float("inf"))
    )


def test_what_a_finished_trace_ends_with_is_not_done_again() -> None:
    finished = source(0, [0.5] * 4 + [0.9] * 4, running=False)
    (only,) = choose_branches(view(finished, source(1, [])), roomy(), RefillRules(slack=9.0))
    assert only.position == 10 * (8 - 3) - 1


def test_a_swap_needs_a_gap_and_a_warm_up() -> None:
    rules = RefillRules(swap=1)
    good, bad = source(0, [0.9] * 10), source(1, [0.2] * 10)
    assert choose_swaps(view(good, bad), rules) == [1]
    assert choose_swaps(view(good, source(1, [0.7] * 10)), rules) == []
    assert choose_swaps(view(good, source(1, [0.2] * 5)), rules) == []
    assert choose_swaps(view(good, bad, spare=0), rules) == []


def test_the_control_takes_any_boundary() -> None:
    sources = [source(h, [0.1 * h] * 9) for h in range(6)]
    starts = {
        choose_branches(view(*sources, mode=RANDOM, branched=b), roomy(), RefillRules())[0].parent
        for b in range(4)
    }
    assert len(starts) > 1


def test_a_branch_in_the_registry() -> None:
    """Its score starts at the boundary, its group counts it, and tokens are counted once."""
    groups = GroupRegistry()

    def join(rid: str):
        return groups.join("g", refill=BEST, rid=rid, step_scores=True, samples=2)

    parent, place = join("a"), join("b")
    for number, score in enumerate((0.9, 0.8, 0.2)):
        parent.add_step(score, parent.score_sum + score, 10 * number + 9)
    groups.end(place, TraceStatus.PRUNED)
    assert (parent.group.live, len(groups.families)) == (1, 1)
    child = groups.branch(place, parent, 19, tokens=-5, reasoning_tokens=0)
    assert (child.score_sum, child.num_steps) == (0.9, 1)  # the step at 19 is scored again
    child.add_step(0.8, child.score_sum + 0.8, 19)
    assert child.step_scores == pytest.approx([0.9, 0.8]) and child.positions == [9, 19]
    info = child.meta()
    assert info["branch"] == {
        "parent": "a", "position": 19, "depth": 1, "name": "b/1", "lineage": [["a", 2]],
    }  # fmt: skip
    assert info["extra_tokens"] == (-5, 0)
    assert parent.group.live == 2 and parent.group.branched == 1 and parent.branches == 1
    assert len(groups.families) == 1 and groups.num_live == 2
    # A branch of the branch, in the place of the first parent.
    groups.end(parent, TraceStatus.PRUNED)
    child.add_step(0.7, child.score_sum + 0.7, 29)
    second = groups.branch(parent, child, 29, 0, 0)
    assert second.meta()["branch"]["lineage"] == [["a", 2], ["b/1", 3]]
    assert second.label == "a/1" and second.depth == 2 and second.root == "a"
    for trace in (child, second):
        groups.end(trace, TraceStatus.FINISHED)
    assert len(groups) == 0 and groups.num_live == 0 and not groups.families


def test_a_branch_without_shared_prompts_needs_room_for_its_own() -> None:
    good = [source(0, [0.1 * i for i in range(1, 9)]), source(1, [])]
    rules = RefillRules(slack=9.0)
    alone = 79 + 2 + 60 + 1  # its text, its prompt, and a page at its end

    def branches(tokens: int) -> int:
        room = Room(tokens, requests=9, running=2, shares=False)
        return len(choose_branches(view(*good, prompt=60), room, rules))

    assert branches(alone + 3 * rules.margin - 1) == 0
    assert branches(alone + 3 * rules.margin) == 1


@given(st.lists(views(), max_size=4), rooms)
def test_groups_that_are_decided_about_together_share_one_room(groups, room) -> None:
    before, needed, found = replace(room), 0, 0
    for group in groups:
        rules = RULES[group.mode]
        by_handle = {s.handle: s for s in group.sources}
        for branch in choose_branches(group, room, rules):
            shared = before.shares and by_handle[branch.parent].running
            needed += 1 if shared else branch.position + 2
            found += 1
    if found:
        assert needed + (before.running + found) * 32 <= before.tokens
        assert found <= before.requests


def test_a_branch_never_has_the_seed_of_another() -> None:
    """Neither its parent's nor a sibling's, whatever neighbours the requests' seeds are."""
    given = [*range(-5, 60), 42, (1 << 63) - 1]
    drawn = [branch_seed(seed, number) for seed in (None, *given) for number in range(1, 33)]
    assert len({*drawn}) == len({(s, n) for s in (None, *given) for n in range(1, 33)})
    assert not {*drawn} & {*given}
    assert all(0 <= seed < 1 << 31 for seed in drawn)
    assert branch_seed(7, 1) == branch_seed(7, 1)


def test_a_branch_without_a_scorer_goes_on_in_its_parents_step() -> None:
    groups = GroupRegistry(by_certainty=True)

    def join(rid: str):
        return groups.join("g", refill=BEST, rid=rid, samples=3)

    parent, first, second = join("a"), join("b"), join("c")
    for number, score in enumerate((0.9, 0.25)):
        parent.add_step(score, parent.score_sum + score, 10 * number + 9)
    assert parent.certainty is not None
    parent.certainty.add(2.0)  # in the middle of its third step
    for place in (first, second):
        groups.end(place, TraceStatus.PRUNED)
    at_boundary = groups.branch(first, parent, 19, 0, 0).certainty
    assert at_boundary is not None and at_boundary.end_step() == pytest.approx(0.25)
    at_end = groups.branch(second, parent, 23, 0, 0).certainty
    assert at_end is not None and at_end.end_step() == pytest.approx(math.exp(-2.0))
    assert parent.certainty.end_step() == pytest.approx(math.exp(-2.0))  # its own is untouched
