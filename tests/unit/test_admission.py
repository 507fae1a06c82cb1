"""Properties of admission: nobody starves, arrival decides among equals, limits hold."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.pruning.admission import (
    KEEP,
    NEW,
    ORDINARY,
    GroupDemand,
    GroupLimit,
    Line,
    TraceLengths,
    Turns,
    hold_back,
    line_of_running,
)

lines = st.one_of(
    st.sampled_from([NEW, ORDINARY]),
    st.builds(line_of_running, st.sampled_from(["a", "b", "new"]), st.integers(1, 3)),
)


def distinct(found: list[Line]) -> list[Line]:
    """One line per name, as a queue at one moment has them."""
    names: dict[object, Line] = {}
    return [names.setdefault(line.name, line) for line in found]


@given(st.lists(lines, max_size=60).map(distinct), st.integers(0, 5), st.randoms())
def test_an_order_is_complete_and_by_arrival_in_each_line(waiting, patience, chooser) -> None:
    turns = Turns(patience)
    for _ in range(3):
        order = turns.order(waiting)
        assert sorted(order) == list(range(len(waiting)))
        for name in {line.name for line in waiting}:
            places = [place for place in order if waiting[place].name == name]
            assert places == sorted(places)
        turns.admitted([waiting[place] for place in order[: chooser.randint(0, len(order))]])


def test_ranks_come_first_while_nobody_has_waited_long() -> None:
    small, large = line_of_running("s", 10), line_of_running("l", 20)
    waiting = [large, small, ORDINARY, NEW, ORDINARY, NEW]
    assert Turns().order(waiting) == [3, 5, 2, 4, 1, 0]


def test_a_line_that_waited_comes_first_once() -> None:
    turns = Turns(patience=3)
    waiting = [NEW] * 5 + [ORDINARY] * 2
    # As if one after the other were admitted: an ordinary one after three that are new.
    assert turns.order(waiting) == [0, 1, 2, 5, 3, 4, 6]
    turns.admitted([NEW] * 2)
    assert turns.order(waiting) == [0, 5, 1, 2, 3, 6, 4]


def test_a_line_that_was_refused_lets_others_try_but_not_for_ever() -> None:
    turns = Turns(patience=3)
    waiting = [NEW, ORDINARY, ORDINARY, ORDINARY, ORDINARY]
    assert turns.order(waiting)[0] == 0
    assert turns.refused(NEW)  # another line may fit
    assert turns.order(waiting)[0] == 1
    assert not turns.refused(ORDINARY)  # now all have been tried
    turns.admitted([ORDINARY] * 3)
    assert turns.order(waiting)[0] == 0
    assert not turns.refused(NEW)  # nobody passes it any more
    assert turns.order(waiting)[0] == 0


@dataclass(eq=False)
class Waiting:
    """One that waits in the model below."""

    line: Line
    size: int
    steps: int


@dataclass
class Model:
    """A server: slots and memory, and lines that never run empty."""

    turns: Turns
    slots: int
    memory: int
    others: list[Line]
    sizes: st.DataObject

    def admissions_until(self, target: Waiting, before: int) -> int:
        """How many are admitted before ``target``, with ``before`` of its line in front of it."""
        shape = st.tuples(st.integers(1, self.memory), st.integers(1, 3))
        shapes = self.sizes.draw(st.lists(shape, min_size=8, max_size=8))
        stream = itertools.cycle(shapes)

        def another(line: Line) -> Waiting:
            return Waiting(line, *next(stream))

        queue: deque[Waiting] = deque([another(target.line) for _ in range(before)])
        queue.append(target)
        running: list[Waiting] = []
        admitted = 0
        for _ in range(5000):
            there = Counter(w.line.name for w in queue)
            for line in self.others:
                queue.extend(another(line) for _ in range(4 - there[line.name]))
            started = self._try(queue, running)
            if target in started:
                return admitted + started.index(target)
            admitted += len(started)
            for w in running:
                w.steps -= 1
            running = [w for w in running if w.steps > 0]
        raise AssertionError("it starves")

    def _try(self, queue: deque[Waiting], running: list[Waiting]) -> list[Waiting]:
        waiting = list(queue)
        while True:
            started: list[Waiting] = []
            for place in self.turns.order([w.line for w in waiting]):
                if len(running) == self.slots:
                    break
                w = waiting[place]
                if sum(r.size for r in running) + w.size > self.memory:
                    self.turns.admitted([s.line for s in started])
                    if self.turns.refused(w.line) and not started:
                        break
                    return started
                started.append(w)
                running.append(w)
                queue.remove(w)
            else:
                self.turns.admitted([s.line for s in started])
                return started
            if len(running) == self.slots:
                self.turns.admitted([s.line for s in started])
                return started


CLASSES = [NEW, ORDINARY, line_of_running("a", 3), line_of_running("b", 5)]


@pytest.mark.parametrize("which", range(len(CLASSES)))
@given(
    slots=st.integers(1, 20), memory=st.integers(1, 40), before=st.integers(0, 3), data=st.data()
)
def test_no_class_starves_while_all_others_arrive_without_end(
    which, slots, memory, before, data
) -> None:
    turns = Turns(patience=4)
    others = [line for line in CLASSES if line is not CLASSES[which]]
    target = Waiting(CLASSES[which], data.draw(st.integers(1, memory)), 1)
    admitted = Model(turns, slots, memory, others, data).admissions_until(target, before)
    assert admitted <= (before + 1) * (turns.patience + len(CLASSES))


@given(data=st.data())
def test_without_patience_it_would_starve(data) -> None:
    """So the test above can fail."""
    target = Waiting(ORDINARY, 1, 1)
    with pytest.raises(AssertionError, match="starves"):
        # One slot, and memory for all: nobody is ever refused.
        Model(Turns(patience=10**9), 1, 1, [NEW], data).admissions_until(target, 0)


demands = st.builds(
    GroupDemand,
    traces=st.integers(1, 64),
    min_survivors=st.integers(1, 8),
    weight=st.sampled_from([0.25, 1.0, 1.0, 4.0]),
    tokens=st.floats(1, 1000),
    prompt=st.integers(0, 100),
    held=st.integers(0, 3000),
)


@given(st.lists(demands, max_size=6), st.lists(demands, max_size=6), st.integers(1, 10**5))
def test_who_may_begin(running, waiting, pool) -> None:
    limit = GroupLimit()
    number = limit.may_begin(running, waiting, pool)
    assert 0 <= number <= len(waiting)
    if waiting and not running:
        assert number >= 1  # or a group that is too large for its share could never run
    # One after the other is the same as all at once, and more memory never lets fewer begin.
    assert limit.may_begin(running + waiting[:number], waiting[number:], pool) == 0 or (
        not running and not number
    )
    assert limit.may_begin(running, waiting, 2 * pool) >= number
    assert GroupLimit(keep=2 * KEEP).may_begin(running, waiting, pool) <= number


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 12))
def test_a_number_of_groups(most, running, waiting) -> None:
    group = GroupDemand(8, 1, 1.0, 100.0)
    began = GroupLimit(most).may_begin([group] * running, [group] * waiting, 1)
    assert began == max(0, min(waiting, most - running))


def test_each_group_keeps_enough_at_its_end() -> None:
    group = GroupDemand(traces=64, min_survivors=1, weight=1.0, tokens=100.0, prompt=50)
    # 8 survivors of 100 tokens and the prompt: 850 tokens a group.
    assert GroupLimit(keep=8).may_begin([], [group] * 9, 4250) == 5
    assert GroupLimit(keep=8).may_begin([group] * 3, [group] * 9, 4250) == 2
    # A minimum above it, or fewer traces than it, change what is enough.
    careful = GroupDemand(64, 16, 1.0, 100.0, 50)
    assert GroupLimit(keep=8).may_begin([], [careful] * 9, 4250) == 2
    small = GroupDemand(2, 1, 1.0, 100.0, 50)
    assert GroupLimit(keep=8).may_begin([], [small] * 99, 4250) == 17


def test_a_light_group_needs_more_of_the_pool() -> None:
    """Pruning levels what is held per weight, so the others hold four times as much."""
    light = GroupDemand(64, 1, 0.25, 100.0)
    heavy = GroupDemand(64, 1, 1.0, 100.0)
    limit = GroupLimit(keep=8)
    assert limit.may_begin([light], [heavy], 800 + 3200 - 1) == 0
    assert limit.may_begin([light], [heavy], 800 + 3200) == 1


def test_expected_lengths() -> None:
    lengths = TraceLengths()
    assert lengths.expected(5000) == 5000  # nothing is known: the most that it may become
    for length in range(1, 9):
        lengths.finished(100 * length)
    assert lengths.expected(5000) == 450
    assert lengths.expected(300) == 300
    for _ in range(1000):
        lengths.finished(7)
    assert lengths.expected(5000) == 7  # of the last ones


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40), st.data(), st.integers(1, 40))
def test_a_batch_with_traces_stays_within_its_limit(order, running, data, limit) -> None:
    traces = data.draw(st.integers(0, running))
    held = hold_back(order, running, traces, limit)
    assert all(order[place] for place in held)  # traces only
    for place, is_trace in enumerate(order):
        before = [other for other in range(place) if other not in held]
        rows, mates = running + len(before), traces + sum(order[other] for other in before)
        assert (place in held) == (is_trace and rows >= limit and 2 * mates >= limit)
