"""What the traces of a family share, against a look at their texts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from step_sglang import protocol
from step_sglang.patches.ledger import shared_tokens
from step_sglang.patches.state import set_trace
from step_sglang.pruning.groups import GroupRegistry, Trace, TraceStatus

BEST = protocol.REFILL_BEST


class Heard:
    """A standing that notes whether it was told of what its trace shares."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.common = trace, trace.common

    def rescored(self) -> None:
        """A step of the trace was scored."""

    def changed(self) -> None:
        """What it shares may be another."""
        self.common = self.trace.common

    def left(self) -> None:
        """The trace runs no more."""


def in_common(first: list[int], second: list[int]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return len(list(pairs))


@given(st.data())
def test_what_traces_share_is_what_their_texts_have_in_common(data) -> None:
    """However they branch and end, of all that live, and each is told when it changes."""
    groups, fresh = GroupRegistry(), itertools.count()
    texts = {groups.join("g", rid=f"t{i}", refill=BEST, samples=4): [] for i in range(4)}
    heard = {trace: Heard(trace) for trace in texts}
    for trace in texts:
        trace.standing = heard[trace]
    for _ in range(data.draw(st.integers(1, 25))):
        live = [trace for trace in texts if trace.is_live]
        sources = [t for t in texts if texts[t] and t.fate is not TraceStatus.PRUNED]
        places = [t for t in texts if t.fate is TraceStatus.PRUNED]
        act = data.draw(st.sampled_from(("grow", "end", "branch")))
        if act == "end" and len(live) > 1:
            trace = data.draw(st.sampled_from(live))
            ends = (TraceStatus.PRUNED, TraceStatus.PRUNED, TraceStatus.FINISHED)
            groups.end(trace, data.draw(st.sampled_from(ends)))
        elif act == "branch" and sources and places:
            parent = data.draw(st.sampled_from(sources))
            position = data.draw(st.integers(0, len(texts[parent]) - 1))
            place = data.draw(st.sampled_from(places))
            trace = groups.branch(place, parent, position, 0, 0)
            texts[trace] = texts[parent][: position + 1]
            del texts[place]  # it is taken
            trace.standing = heard[trace] = Heard(trace)
        else:
            for trace in live:
                texts[trace] += [next(fresh) for _ in range(data.draw(st.integers(0, 3)))]
        live = [trace for trace in texts if trace.is_live]
        for trace in live:
            others = [texts[other] for other in live if other is not trace]
            expected = max((in_common(texts[trace], other) for other in others), default=0)
            assert trace.common == heard[trace].common == expected


def test_text_that_nobody_else_has_any_more_counts_as_ones_own() -> None:
    groups = GroupRegistry()
    parent, place, third = (groups.join("g", rid=rid, refill=BEST) for rid in "abc")
    for number in range(100):
        parent.add_step(0.9, parent.score_sum + 0.9, 10 * number + 9)
    groups.end(place, TraceStatus.PRUNED)
    groups.end(third, TraceStatus.PRUNED)
    first = groups.branch(place, parent, 899, 0, 0)
    second = groups.branch(third, parent, 499, 0, 0)
    assert (parent.common, first.common, second.common) == (900, 900, 500)
    req: Any = SimpleNamespace(
        origin_input_ids=[0] * 200, kv=SimpleNamespace(cache_protected_len=1100)
    )
    set_trace(req, first)
    assert shared_tokens(req, 1) == 1100
    groups.end(parent, TraceStatus.FINISHED)
    assert (first.common, second.common) == (500, 500)  # the branches have that in common
    assert shared_tokens(req, 1) == 700
    groups.end(second, TraceStatus.PRUNED)
    assert first.common == 0 and shared_tokens(req, 1) == 200
