"""SGLang's sessions beside votes: which trace a voted turn left behind, and what cannot be voted.

In the scheduler each trace of a voted turn is a turn of its own, under an id that no client knows.
Here the turn's own id leads to the trace that answered it. Kept in the tokenizer manager, which
every opening, closing and request of a session passes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from step_sglang.patches.record import config_of

_SESSIONS = "step_sessions"  # on the tokenizer manager
_MAX_SESSIONS = 16384  # a session that SGLang itself ends, at a timeout, is not closed here


@dataclass
class _Session:
    streaming: bool
    answered_by: dict[str, str] = field(default_factory=dict)  # a voted turn's id -> its trace's


def _sessions(manager: Any) -> OrderedDict[str, _Session]:
    known: OrderedDict[str, _Session] | None = getattr(manager, _SESSIONS, None)
    if known is None:
        known = OrderedDict()
        setattr(manager, _SESSIONS, known)
    return known


async def open_session(
    original: Callable[..., Awaitable[str | None]], manager: Any, obj: Any, request: Any = None
) -> str | None:
    """AROUND ``TokenizerManager.open_session``."""
    opened = await original(manager, obj, request)
    if opened is not None and config_of(manager.server_args) is not None:
        known = _sessions(manager)
        known[opened] = _Session(bool(obj.streaming))
        if len(known) > _MAX_SESSIONS:
            known.popitem(last=False)
    return opened


def close_session(manager: Any, obj: Any, request: Any = None) -> None:
    """BEFORE ``TokenizerManager.close_session``."""
    _sessions(manager).pop(obj.session_id, None)


def lead_to_trace(manager: Any, obj: Any) -> None:
    """Let a request that continues a voted turn continue the trace that answered it."""
    session = _session(manager, obj)
    if session is not None:
        rid = obj.session_params.get("rid")
        if isinstance(rid, str) and rid in session.answered_by:
            obj.session_params = {**obj.session_params, "rid": session.answered_by[rid]}


def answered(manager: Any, obj: Any, trace: str) -> None:
    """Remember which trace answered a voted turn."""
    session = _session(manager, obj)
    if session is not None:
        session.answered_by[obj.rid] = trace


def why_unvoted(manager: Any, obj: Any) -> str | None:
    """Why a session's turn cannot be voted; None when it can."""
    session = _session(manager, obj)
    if session is not None and session.streaming:
        return "a streaming session's memory belongs to one request at a time"
    if isinstance(obj.session_params, Mapping) and obj.session_params.get("replace"):
        return "session_params.replace would let each trace end those before it"
    return None


def _session(manager: Any, obj: Any) -> _Session | None:
    params = obj.session_params
    name = params.get("id") if isinstance(params, Mapping) else None
    if not isinstance(name, str):
        return None
    known = _sessions(manager)
    if name in known:
        known.move_to_end(name)
    return known.get(name)
