"""The life of traces and votes, on SGLang's own OpenTelemetry spans.

Loaded only where SGLang traces requests (--enable-trace). A trace's events lie on its request's
spans: what happens while it runs in the scheduler's, its end in the request's own, which also has
the end as attributes to search for. A vote's end lies on the span of the request that asked for it,
under which its traces are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step_sglang import protocol
from step_sglang.patches.guard import guard
from step_sglang.patches.state import is_traced, trace_of
from step_sglang.pruning.groups import Trace
from step_sglang.voting.session import TraceFate, VoteSession

_LEVEL = 1  # SGLang's for what happens to a request, not in each of its passes
_MAX_TEXT = 200  # characters of an answer

_ADMITTED = "step_admitted"  # on a request: its trace that was said to be


class TraceEvents:
    """What happens to the traces of a scheduler."""

    @guard(protocol.IN_TRACING)
    def admitted(self, reqs: Sequence[Any]) -> None:
        """Requests begin in the next pass; of a prompt in chunks, and after a retraction, again."""
        for req in reqs:
            trace = trace_of(req)
            if trace is None or getattr(req, _ADMITTED, None) is trace:
                continue
            setattr(req, _ADMITTED, trace)
            req.time_stats.trace_ctx.trace_set_thread_attrs({"step.group": trace.group.group_id})
            _event(req, "step.admitted", {"group": trace.group.group_id})

    @guard(protocol.IN_TRACING)
    def scored(self, req: Any, trace: Trace) -> None:
        """A step was scored; the first of a request is told."""
        if trace.num_steps == trace.start[1] + 1:
            _event(req, "step.first_score", _standing(trace))

    @guard(protocol.IN_TRACING)
    def pruned(self, req: Any, trace: Trace) -> None:
        """A trace was pruned. Before SGLang closes the span."""
        _event(req, "step.pruned", {**_standing(trace), "reason": trace.reason})

    @guard(protocol.IN_TRACING)
    def branched(self, req: Any, branch: Trace, reason: str) -> None:
        """A branch took the place of a pruned trace, whose request it goes on with."""
        assert branch.origin is not None
        where = {
            "parent": branch.origin.parent,
            "position": branch.origin.position,
            "depth": branch.depth,
            "reason": reason,
        }
        _event(req, "step.branched", {**_standing(branch), **where})


@guard(protocol.IN_TRACING)
def trace_ended(state: Any, step: Mapping[str, Any], finish_reason: Mapping[str, Any]) -> None:
    """A trace's last chunk reached the tokenizer manager, and its request's span is open.

    Args:
        state: SGLang's of the request.
        step: its ``meta_info["step"]``.
        finish_reason: as the scheduler said it.
    """
    known = {
        "group": step[protocol.META_GROUP],
        "score": step[protocol.META_SCORE],
        "num_steps": step[protocol.META_NUM_STEPS],
        "pruned": step[protocol.META_PRUNED],
        "reason": step.get(protocol.META_REASON),
        "parent": (step.get(protocol.META_BRANCH) or {}).get(protocol.BRANCH_PARENT),
    }
    if known["pruned"]:
        name = "step.pruned"
    else:
        name = "step.aborted" if finish_reason["type"] == "abort" else "step.finished"
    _end(state.time_stats.trace_ctx, name, known)


@guard(protocol.IN_TRACING)
def vote_ended(state: Any, session: VoteSession) -> None:
    """A vote was taken; ``state`` is SGLang's of the request that asked for it."""
    outcome = session.outcome()
    known = {
        "status": outcome.status.value,
        "answer": None if outcome.answer is None else outcome.answer[:_MAX_TEXT],
        "share": outcome.share,
        "ended_early": session.ended_by,
        "traces": len(session.traces),
        "finished": session.num(TraceFate.FINISHED),
        "pruned": session.num(TraceFate.PRUNED),
        "shrunk": session.num(TraceFate.SHRUNK),
        "cancelled": session.num(TraceFate.CANCELLED),
    }
    _end(state.time_stats.trace_ctx, "step.voted", known, "step.vote.")


@guard(protocol.IN_TRACING)
def lead_to(state: Any, inner: Any) -> None:
    """Put the spans of a vote's traces under the span of the request that asked for it.

    Args:
        state: SGLang's of that request.
        inner: the request that becomes the traces.
    """
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier, state.time_stats.trace_ctx.root_span_context)
    inner.external_trace_header = carrier


def _standing(trace: Trace) -> dict[str, Any]:
    return {
        "group": trace.group.group_id, "score": trace.score, "num_steps": trace.num_steps,
    }  # fmt: skip


def _event(req: Any, name: str, known: Mapping[str, Any]) -> None:
    if is_traced(req):
        req.time_stats.trace_ctx.trace_event(name, _LEVEL, attrs=_attributes(known))


def _end(context: Any, name: str, known: Mapping[str, Any], prefix: str = "step.") -> None:
    """On the span of the whole request, which SGLang closes after this."""
    attributes = _attributes(known, prefix)
    context.trace_set_root_attrs(attributes)
    # SGLang's own events need the span of a process, which it closed when it sent the request.
    if context.root_span is not None:
        context.root_span.add_event(name, attributes)


def _attributes(known: Mapping[str, Any], prefix: str = "step.") -> dict[str, Any]:
    """What OpenTelemetry takes: it knows no None."""
    return {f"{prefix}{name}": value for name, value in known.items() if value is not None}
