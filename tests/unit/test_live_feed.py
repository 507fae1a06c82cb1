"""The scheduler's end of the feed, and what is known from it."""

from __future__ import annotations

import random

import pytest

from step_sglang.live import feed as feed_module
from step_sglang.live import known as known_module
from step_sglang.live.events import (
    FeedError,
    PoolSample,
    TraceBegan,
    TraceEnded,
    Update,
    decode,
    encode,
)
from step_sglang.live.feed import Feed
from step_sglang.live.known import Known
from step_sglang.pruning.groups import GroupRegistry, Trace, TraceStatus

POOL = PoolSample(1.0, 10, 0, 100, 1, 0)


def take(feed: Feed, traces: list[Trace] | None = None, tokens: int = 5) -> Update:
    traces = traces or []
    update = feed.take(traces, [tokens] * len(traces), [tokens + 1] * len(traces), POOL)
    return decode(encode(update))  # as it crosses the process


def watched() -> tuple[GroupRegistry, Feed]:
    groups = GroupRegistry()
    groups.watcher = feed = Feed(clock=lambda: 7.0)
    return groups, feed


def test_nobody_looks_and_nothing_is_noted() -> None:
    groups = GroupRegistry()
    assert groups.watcher is None
    trace = groups.join("q", rid="r")
    groups.end(trace, TraceStatus.FINISHED)


def test_a_traces_life_is_told_once_and_in_order() -> None:
    groups, feed = watched()
    trace = groups.join("q", rid="r", samples=4, prompt_tokens=9)
    trace.add_step(0.5, 0.5, 3)
    feed.scored(trace, 3, 0.5, [1, 2, 3, 4])
    update = take(feed, [trace])
    assert [event.kind for event in update.events] == ["group", "trace", "steps"]
    assert update.full
    began = update.events[1]
    assert isinstance(began, TraceBegan)
    assert (began.rid, began.expected, began.prompt_tokens) == ("r", 4, 9)
    assert update.events[2].token_ids is None, "the request did not allow its text"
    assert update.progress.tokens == (5,) and update.progress.kv == (6,)
    trace.reason, trace.tokens = "decode", 6
    groups.end(trace, TraceStatus.PRUNED)
    feed.freed(trace, 42)
    update = take(feed)
    (ended,) = update.events
    assert ended == TraceEnded(began.trace, 7.0, "pruned", 6, 0.5, "decode", 42)
    assert not update.full
    assert take(feed).events == ()


def test_text_is_told_only_where_the_request_allows_it() -> None:
    groups, feed = watched()
    trace = groups.join("q", rid="r", show_text=True)
    feed.scored(trace, 2, 0.5, [5, 6, 7])
    feed.scored(trace, 4, 0.5, [5, 6, 7, 8, 9])
    assert take(feed).events[2].token_ids == ((5, 6, 7), (8, 9))


def test_a_trace_that_was_there_before_is_seen_with_what_it_has() -> None:
    groups = GroupRegistry()
    trace = groups.join("q", rid="r")
    trace.add_step(0.25, 0.25, 3)
    groups.watcher = feed = Feed()
    feed.joined(trace, 11)
    began = take(feed, [trace]).events[1]
    assert (began.tokens, began.steps, began.score) == (11, 1, 0.25)


def test_what_waits_is_bounded_and_what_is_lost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_WAITING", 10)
    groups, feed = watched()
    trace = groups.join("q", rid="r")
    for position in range(100):
        feed.scored(trace, position, 0.5, [0])
    update = take(feed, [trace])
    assert update.lost == 91
    assert len(update.events[2].scores) == 9
    assert take(feed).lost == 0


def test_a_group_that_ends_and_begins_again_is_another() -> None:
    groups, feed = watched()
    groups.end(groups.join("q", rid="a"), TraceStatus.FINISHED)
    groups.end(groups.join("q", rid="b"), TraceStatus.ABORTED)
    numbers = [event.group for event in take(feed).events if event.kind == "group"]
    assert len(set(numbers)) == 2
    assert not feed._traces and not feed._groups


def test_what_is_known_equals_the_registry_after_any_sequence() -> None:
    draw = random.Random(0)
    groups, feed = watched()
    known, every, live = Known(), [], []
    for _ in range(300):
        what = draw.random()
        if what < 0.3 or not live:
            trace = groups.join(f"q{draw.randrange(5)}", rid=f"r{len(every)}")
            every.append(trace)
            live.append(trace)
        elif what < 0.8:
            trace = draw.choice(live)
            score = draw.random()
            trace.add_step(score, trace.score_sum + score, trace.num_steps)
            feed.scored(trace, trace.num_steps - 1, score, range(500))
        else:
            trace = live.pop(draw.randrange(len(live)))
            trace.tokens = draw.randrange(100)
            groups.end(trace, draw.choice(list(TraceStatus)[1:]))
        if draw.random() < 0.2:
            known.apply(take(feed, live))
    known.apply(take(feed, live))
    again = Known()
    again.apply(decode(encode(known.full())))
    for view in (known, again):
        assert len(view.traces) == len(every)
        for trace in every:
            seen = view.traces[view.by_rid[trace.rid]]
            assert seen.score == pytest.approx(trace.score)
            assert seen.num_steps == trace.num_steps
            assert seen.fate == (trace.fate.value if trace not in live else "running")


def test_old_groups_are_forgotten_and_live_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_module, "MAX_GROUPS", 3)
    groups, feed = watched()
    known = Known()
    groups.join("first", rid="r")
    for place in range(10):
        groups.end(groups.join(f"q{place}", rid=f"r{place}"), TraceStatus.FINISHED)
    known.apply(take(feed))
    gone = known.excess()
    assert gone is not None
    known.forget(gone)
    names = [group.began.name for group in known.groups.values()]
    assert names == ["first", "q8", "q9"]
    assert len(known.traces) == 3 and len(known.by_rid) == 3 and len(known.by_name) == 3


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"time":1,"version":9}', '{"time":"x"}'])
def test_what_is_no_feed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(FeedError) as raised:
        decode(text)
    assert "\n" not in str(raised.value)
