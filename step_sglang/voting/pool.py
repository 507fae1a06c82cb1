"""The children that compare answers, and the order in which they take questions.

Knows nothing of answers. Of all waiting questions that of the account that has spent least comes
first, in whole short limits, and of equals the one that waits longest. A question gets a short
limit at first; only if that does not suffice it comes again with the full one, and one child at
least takes no such question. So whoever asks what never comes back delays others by the short
limit. No question waits for more than a minute.
"""

from __future__ import annotations

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import NamedTuple

from step_sglang.voting.classes import FormQuestion, Question, Reply
from step_sglang.voting.comparer import READY, decode, encode

logger = logging.getLogger(__name__)

START_LIMIT = 60.0  # seconds until a child is ready: it imports math-verify
SHORT_LIMIT = 1.0  # seconds of CPU time at the first attempt
WAIT_LIMIT = 60.0  # seconds by the clock; then there is no reply
_SLOWEST = 8.0  # times the limit: seconds by the clock, for a child that gets little of a processor
_TICK = 0.05  # seconds between two looks at a question that may have been given up
_BACKOFF = 30.0  # seconds at most between two starts that failed


class Account:
    """What one group may spend and has spent, in seconds of CPU time."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.spent = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return self.spent >= self.budget


class Settled(NamedTuple):
    """What became of a question."""

    reply: Reply
    final: bool  # it would be the same at another time


class PendingQuestion:
    """A question that waits for its reply. Cancelling its future gives it up."""

    def __init__(self, question: Question, account: Account) -> None:
        self.question = question
        self.account = account
        self.future: Future[Settled] = Future()
        self.since = time.monotonic()
        self.long = False  # the short limit did not suffice

    def settle(self, reply: Reply, *, final: bool = False) -> None:
        """Give the reply, unless one was given or none is wanted any more."""
        with suppress(InvalidStateError):
            self.future.set_result(Settled(reply, final))


class _Child:
    """A running child."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-W", "ignore", "-m", "step_sglang.voting.verifier",
                str(os.getpid()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # This very package, wherever the caller found it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip

    def wait_until_ready(self, seconds: float, given_up: Callable[[], bool]) -> bool:
        return self._line(seconds, given_up) == READY

    def ask(self, line: str, seconds: float, given_up: Callable[[], bool]) -> str | None:
        """Its reply; None: it died, or was not done in time, or nobody wants it any more."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            return None
        return self._line(seconds, given_up)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not flushed
                    pipe.close()

    def _line(self, seconds: float, given_up: Callable[[], bool]) -> str | None:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + seconds
        ready = (
            select.poll()
        )  # select() knows no descriptor from 1024 on: a server has many clients
        ready.register(stdout, select.POLLIN)
        while not given_up() and time.monotonic() < deadline:
            if ready.poll(_TICK * 1000):
                return stdout.readline().strip() or None
        return None


class Pool:
    """Children, the threads that serve them, and the questions that wait.

    Args:
        limit: seconds of CPU time for one question.
        children: how many work at once.
        spare: keep one more ready.
    """

    def __init__(self, limit: float, children: int, spare: bool) -> None:
        self._limit = limit
        self._size = children
        self._spares = int(spare)
        self._state = threading.Condition()
        self._waiting: list[PendingQuestion] = []
        self._ready: list[_Child] = []
        self._wanted = 0  # by workers that wait for a child
        self._failed_starts = 0
        self._started = self._closed = False
        self.counts: Counter[str] = Counter()

    def submit(self, asked: PendingQuestion) -> None:
        """Put a question into the queue."""
        with self._state:
            if self._closed:
                asked.settle(None)
                return
            self._waiting.append(asked)
            if not self._started:
                self._started = True
                # Daemons: the end of the interpreter does not wait for them.
                threading.Thread(target=self._keep, name="step-verifier", daemon=True).start()
                for place in range(self._size):
                    work = threading.Thread(
                        target=self._work, args=(place,), name=f"step-verifier-{place}", daemon=True
                    )
                    work.start()
            self._state.notify_all()

    def close(self) -> None:
        """End everything; what waits gets no reply."""
        with self._state:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            children, self._ready = self._ready, []
            self._state.notify_all()
        for asked in waiting:
            asked.settle(None)
        for child in children:
            child.kill()

    def _keep(self) -> None:
        """Start all children: a child dies with the thread that started it, so it must be one."""
        while True:
            with self._state:
                self._state.wait_for(
                    lambda: self._closed or len(self._ready) < self._wanted + self._spares
                )
                if self._closed:
                    return
                self.counts["starts"] += 1
            child = None
            try:
                child = self._start()
            except Exception:  # a thread that ended would leave all questions waiting
                logger.exception("STEP could not start a process that compares answers")
            with self._state:
                if child is not None and self._closed:
                    child.kill()
                elif child is not None:
                    self._failed_starts = 0
                    self._ready.append(child)
                    self._state.notify_all()
                    continue
                self._failed_starts += 1
                self._state.notify_all()
                self._state.wait_for(self._is_closed, min(_BACKOFF, 0.5 * 2**self._failed_starts))

    def _start(self) -> _Child | None:
        """A child that is ready; None: it was not in time."""
        child = _Child()
        ready = False
        try:
            ready = child.wait_until_ready(START_LIMIT, self._is_closed)
        finally:
            if not ready:
                child.kill()
        return child if ready else None

    def _is_closed(self) -> bool:
        return self._closed

    def _work(self, place: int) -> None:
        child: _Child | None = None
        while True:
            asked = self._next(place)
            if asked is None:
                if child is not None:
                    child.kill()
                return
            if child is None:
                child = self._take()
            if child is None:
                asked.settle(None)
                continue
            try:
                usable = self._serve(asked, child)
            except Exception:  # a thread that ended would leave all others waiting
                logger.exception("STEP could not compare an answer")
                asked.settle(None)
                usable = False
            if not usable:
                child.kill()
                child = None

    def _next(self, place: int) -> PendingQuestion | None:
        """Wait for the question to serve; None: the pool is closed."""
        with self._state:
            while True:
                if self._closed:
                    return None
                self._expire()
                # With more than one child, the first takes no questions that are known to be long.
                fit = [t for t in self._waiting if place > 0 or self._size == 1 or not t.long]
                if fit:
                    asked = min(fit, key=lambda t: int(t.account.spent / SHORT_LIMIT))
                    self._waiting.remove(asked)
                    return asked
                self._state.wait(WAIT_LIMIT if self._waiting else None)

    def _expire(self) -> None:
        oldest = time.monotonic() - WAIT_LIMIT
        for asked in self._waiting:
            if asked.since < oldest:
                asked.settle(None)
        self._waiting = [t for t in self._waiting if not t.future.done()]

    def _take(self) -> _Child | None:
        """A child that is ready; None: there is none to be had."""
        with self._state:
            failed = self._failed_starts
            self._wanted += 1
            self._state.notify_all()
            self._state.wait_for(
                lambda: self._ready or self._closed or self._failed_starts > failed
            )
            self._wanted -= 1
            child = self._ready.pop(0) if self._ready else None
            self._state.notify_all()
            return child

    def _serve(self, asked: PendingQuestion, child: _Child) -> bool:
        """Ask a child; whether it can go on."""
        account = asked.account
        limit = self._limit if asked.long else min(SHORT_LIMIT, self._limit)
        limit = min(limit, max(0.1, account.budget - account.spent))
        self.counts["forms" if isinstance(asked.question, FormQuestion) else "pairs"] += 1
        started = time.monotonic()

        def given_up() -> bool:
            return self._closed or asked.future.done()

        line = child.ask(encode(asked.question, limit), _SLOWEST * limit, given_up)
        try:
            reply, seconds, grown = (None, limit, True) if line is None else decode(line)
        except (ValueError, KeyError, TypeError):
            line, reply, seconds, grown = None, None, limit, True
        account.spent += min(seconds, time.monotonic() - started) if given_up() else seconds
        if line is None:
            self.counts["kills"] += 1
            if not asked.long and limit < self._limit and not account.empty:
                asked.long = True
                self.submit(asked)
                return False
        # Not with what was left of a budget, nor of the pool's time: another may find out.
        whole = limit >= self._limit and not self._closed
        asked.settle(reply, final=line is not None or whole)
        return not grown
