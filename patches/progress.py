"""Tells a vote how far its traces are whose text may not be sent yet: their counts and no token.

A trace with refill sends nothing of its text before its end, but whoever votes wants its id, its
score and its length; and a connection wants a sign of life. For SGLang's output stream it is
another request then, which has nothing left to send.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any

from step_sglang import protocol
from step_sglang.patches.places import withheld
from step_sglang.patches.state import trace_of
from step_sglang.voting.session import STREAM_INTERVAL


class Progress:
    """A request that runs, as one whose tokens have all been sent. Changes nothing of it."""

    beam_group = customized_info = None
    # Sent in any case; that SGLang looks for the start of a stop string does not matter here.
    stream = False
    return_logprob = return_hidden_states = return_routed_experts = return_indexer_topk = False
    return_sampling_mask = False

    def __init__(self, req: Any) -> None:
        self._req = req
        self.output_ids: array[int] = array("q")
        self.output_ids_through_stop = req.output_ids_through_stop  # its length is told
        self.send_token_offset = len(self.output_ids_through_stop)
        self.send_decode_id_offset = sys.maxsize

    def __getattr__(self, name: str) -> Any:
        """All else is the request's own."""
        return getattr(self._req, name)

    def init_incremental_detokenize(self) -> tuple[Any, int]:
        """Where the text will begin, kept here: the request has told the detokenizer nothing."""
        self.output_ids_through_stop = self.output_ids
        found: tuple[Any, int] = type(self._req).init_incremental_detokenize(self)
        return found


def due(reqs: Sequence[Any], skip_req: Any | None) -> list[Any]:
    """Those of a vote whose text is withheld and of which something new is to be told."""
    return [req for req in reqs if req is not skip_req and withheld(req) and _is_due(req)]


def _is_due(req: Any) -> bool:
    trace, length = trace_of(req), len(req.output_ids)
    interval = req.sampling_params.stream_interval or STREAM_INTERVAL
    # A streamed request with refill is a vote's trace, or asked for its end alone.
    if trace is None or not req.stream or interval >= protocol.NEVER_STREAMED:
        return False
    if not length or (trace.told and length - trace.told < interval):
        return False
    trace.told = length
    return True
