"""Grades a trace's answer against the gold answer, within a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from step_sglang.voting.answers import equivalent, extractor_named

TIME_LIMIT = 5.0  # seconds; an answer such as 9^(9^(9^9)) would never be compared
_MAX_LENGTH = 1000  # characters


def graded(text: str, finish: str, gold: str, extract: str = "boxed") -> tuple[str | None, bool]:
    """A trace's answer, and whether it is right. A trace that was cut off has none.

    ``extract`` is the built-in extractor that reads it, as in a vote.
    """
    answer = extractor_named(extract)(text) if finish == "stop" else None
    if answer is None or len(answer) > _MAX_LENGTH:
        return None, False
    if not gold:  # nobody knows it
        return answer, False
    try:
        with _time_limit(TIME_LIMIT):
            return answer, equivalent(answer, gold)
    except TimeoutError:
        return answer, False


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
