"""A viewer of a server's feed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from step_sglang.client.http import Client
from step_sglang.live.events import decode
from step_sglang.live.known import Known
from tests.server.launch import Server


@contextmanager
def looking(server: Server) -> Iterator[Known]:
    """Gather the feed; at the end it holds what happened until then."""
    known, began, over = Known(), threading.Event(), threading.Event()
    left: list[int] = []

    def look() -> None:
        with Client(server.url, timeout=30) as client:
            for update in client.feed():
                known.apply(decode(update))
                began.set()
                if over.is_set():
                    left.append(1)
                    if len(left) == 4:
                        return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    assert began.wait(20)
    yield known
    over.set()
    thread.join(20)
    assert not thread.is_alive()


def assert_seen(known: Known, name: str, answers: list[dict]) -> None:
    """A viewer has a lane for each answer, and of each the end that its response says."""
    assert known.lost == 0
    assert len(known.groups[known.by_name[name]].traces) == len(answers)
    for answer in answers:
        info = answer["meta_info"]
        trace, step = known.traces[known.by_rid[info["id"]]], info["step"]
        assert trace.fate == ("pruned" if step["pruned"] else "finished")
        assert trace.ended is not None and trace.ended.reason == step.get("reason")
        assert trace.tokens == info["completion_tokens"]
        assert trace.score == pytest.approx(step["score"])
