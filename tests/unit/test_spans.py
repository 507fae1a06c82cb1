"""Spans of traces and votes: nothing where SGLang traces nothing, and no loss where a tracer fails.

`server/test_tracing.py` reads what a real server sends to a collector.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.observability.trace import TraceNullContext

from step_sglang import protocol
from step_sglang.patches import guard as guards
from step_sglang.patches import tokenizer, votes
from step_sglang.patches.spans import TraceEvents, trace_ended
from step_sglang.patches.state import set_trace
from step_sglang.pruning.groups import GroupRegistry, Trace
from step_sglang.voting.session import VoteRules, VoteSession

SPANS = "step_sglang.patches.spans"


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_counts", guards.Counter())
    monkeypatch.setattr(guards, "_observer", None)


class Context:
    """SGLang's, as far as it is used; notes what it is told, or fails."""

    tracing_enable = True

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.events, self.attributes = fails, [], {}
        self.root_span = SimpleNamespace(add_event=self._add)

    def _add(self, name: str, attributes: dict[str, Any]) -> None:
        self.events.append((name, attributes))

    def trace_event(self, name: str, level: int, ts: Any = None, attrs: Any = None) -> None:
        if self.fails:
            raise ConnectionError
        self._add(name, attrs)

    def trace_set_root_attrs(self, attrs: dict[str, Any]) -> None:
        if self.fails:
            raise ConnectionError
        self.attributes.update(attrs)

    trace_set_thread_attrs = trace_set_root_attrs


def request(context: Any) -> tuple[Any, Trace]:
    req = SimpleNamespace(time_stats=SimpleNamespace(trace_ctx=context))
    trace = GroupRegistry().join("g")
    set_trace(req, trace)
    return req, trace


def test_where_it_is_off_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, SPANS)
    state = SimpleNamespace(time_stats=SimpleNamespace(trace_ctx=TraceNullContext()), obj=None)
    step = {"step": [{"pruned": False, "group": "g", "score": None, "num_steps": 0}]}
    ends: list[Any] = []
    tokenizer.update_request_meta_info(
        lambda *given: ends.append(given), None, {"id": "x"}, state, step, 0, {"type": "stop"}
    )
    assert ends
    live: Any = SimpleNamespace(state=state)
    votes.vote_begins(live, None)
    votes.vote_ended(SimpleNamespace(), live, VoteSession(1, VoteRules()))
    assert SPANS not in sys.modules and guards.counts() == {}


def test_events_of_a_trace() -> None:
    context, events = Context(), TraceEvents()
    req, trace = request(context)
    events.admitted([req])
    events.admitted([req, SimpleNamespace()])  # a second chunk; and an ordinary request
    trace.add_step(0.5, 0.5, 3)
    events.scored(req, trace)
    trace.add_step(0.7, 1.2, 6)
    events.scored(req, trace)
    trace.reason = protocol.PRUNED_FOR_DECODE
    events.pruned(req, trace)
    assert context.attributes == {"step.group": "g"}
    assert context.events == [
        ("step.admitted", {"step.group": "g"}),
        ("step.first_score", {"step.group": "g", "step.score": 0.5, "step.num_steps": 1}),
        (
            "step.pruned",
            {
                "step.group": "g", "step.score": 0.6, "step.num_steps": 2, "step.reason": "decode",
            },
        ),
    ]  # fmt: skip
    assert guards.counts() == {}


@pytest.mark.parametrize(
    ("pruned", "reason", "name"),
    [(True, "abort", "pruned"), (False, "abort", "aborted"), (False, "stop", "finished")],
)
def test_the_end_of_a_trace(pruned: bool, reason: str, name: str) -> None:
    context = Context()
    state = SimpleNamespace(time_stats=SimpleNamespace(trace_ctx=context))
    step = {"group": "g", "score": None, "num_steps": 0, "pruned": pruned}
    trace_ended(state, step, {"type": reason})
    known = {"step.group": "g", "step.num_steps": 0, "step.pruned": pruned}
    assert context.events == [(f"step.{name}", known)]
    assert context.attributes == known


def test_a_tracer_that_fails_is_counted_and_nothing_else() -> None:
    context, events = Context(fails=True), TraceEvents()
    req, trace = request(context)
    events.admitted([req])
    trace.add_step(0.5, 0.5, 3)
    events.scored(req, trace)
    events.pruned(req, trace)
    state = SimpleNamespace(time_stats=SimpleNamespace(trace_ctx=context))
    trace_ended(state, {"group": "g", "score": 1.0, "num_steps": 1, "pruned": True}, {})
    live: Any = SimpleNamespace(state=state)
    votes.vote_ended(SimpleNamespace(), live, VoteSession(1, VoteRules()))
    votes.vote_begins(live, SimpleNamespace())  # this one has no context of its own either
    assert guards.counts() == {protocol.IN_TRACING: 6}
