"""SGLang's sessions beside votes: which trace a voted turn left behind, and what cannot be voted.

In the scheduler each trace of a voted turn is a turn of its own, under an id that no client knows.
Here the turn's own id leads to the trace that answered it. Kept in the tokenizer manager, which
every opening, closing and request of a session passes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from step_sglang.patches import peers
from step_sglang.patches.server_args import config_of
from step_sglang.voting.session import SampledTrace, TraceFate

_SESSIONS = "step_sessions"  # on the tokenizer manager
_MAX_END = 5.0  # seconds that the answer to an aborted turn waits for its trace to end
_MAX_SESSIONS = 16384  # a session that SGLang itself ends, at a timeout, is not closed here


@dataclass(frozen=True)
class _Turn:
    trace: str  # the id of the trace that answered it
    shown: int | None  # tokens up to where the answer ended, None: all that the trace has


@dataclass
class _Session:
    streaming: bool
    voted: dict[str, _Turn] = field(default_factory=dict)  # by the id of the turn


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
    rid = None if session is None else obj.session_params.get("rid")
    if session is None or not isinstance(rid, str) or rid not in session.voted:
        return
    turn = session.voted[rid]
    params = {**obj.session_params, "rid": turn.trace}
    if turn.shown is not None and not params.get("drop_previous_output"):
        # The trace went on for some tokens before the scheduler heard that it was to end.
        params["offset"] = min(params.get("offset") or turn.shown, turn.shown)
    obj.session_params = params


async def answered(manager: Any, obj: Any, trace: SampledTrace) -> None:
    """Remember which trace answered a voted turn, once another turn can continue it."""
    session = _session(manager, obj)
    if session is None:
        return
    rid, shown = trace.meta_info["id"], None
    if trace.fate in (TraceFate.RUNNING, TraceFate.CANCELLED):
        shown = trace.meta_info["prompt_tokens"] + trace.tokens
    session.voted[obj.rid] = _Turn(rid, shown)
    deadline = time.monotonic() + _MAX_END
    # SGLang refuses to continue a request that runs, as it does until the scheduler says its end.
    while shown is not None and rid in manager.rid_to_state and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def why_unvoted(manager: Any, obj: Any) -> str | None:
    """Why a session's turn cannot be voted; None when it can."""
    session = _session(manager, obj)
    if peers.several() and isinstance(obj.session_params, Mapping):
        return "each turn may come to another one of this server's tokenizer workers"
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
