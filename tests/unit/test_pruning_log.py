"""A line for each pruning, or one an interval."""

from __future__ import annotations

import logging
import time

import pytest

from step_sglang.pruning.log import PruningLog


def prune(log: PruningLog, score: float | None, reason: str = "decode") -> None:
    log.pruned("'r'", "'g'", score, 3, reason, 100, 4000, 4096)


def test_a_line_for_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = PruningLog(each=True, interval=0.01)
    prune(log, 0.25)
    log.branched("'r'", "'g'", "'p'", 7, 1, None, "room")
    time.sleep(0.1)
    assert caplog.messages == [
        "STEP pruned rid='r' group='g' score=0.2500 steps=3 reason=decode tokens_freed=100 "
        "pool_used=4000/4096",
        "STEP branched rid='r' group='g' parent='p' position=7 depth=1 score=none reason=room",
    ]


def test_one_line_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = PruningLog(each=False, interval=0.2)
    for score in (0.5, None, 0.125):
        prune(log, score)
    prune(log, 0.25, "admission")
    log.branched("'r'", "'g'", "'p'", 7, 1, None, "room")
    assert caplog.messages == []
    time.sleep(0.5)
    (line,) = caplog.messages
    assert line.endswith(
        "pruned 4 (decode 3, admission 1), tokens_freed=400, scores 0.1250 to 0.5000, "
        "pool_used=4000/4096; branched 1 (room 1)"
    )
    prune(log, None)
    time.sleep(0.5)
    assert "pruned 1 (decode 1), tokens_freed=100, pool_used" in caplog.messages[1]
    time.sleep(0.3)
    assert len(caplog.messages) == 2  # nothing happened


def test_single_lines_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    prune(PruningLog(each=False), 0.25)
    assert caplog.records[0].levelno == logging.DEBUG and "rid='r'" in caplog.messages[0]
