"""Compares answers of unknown origin in child processes, so that none can stop or slow the caller.

math-verify computes what it is given: an answer such as ``9^(9^(9^9))`` never comes back and holds
the interpreter. A few children share the work of all groups. Each question has a limit of
CPU time and memory, each group a budget; what is beyond either compares as text alone.
`python -m step_sglang.voting.verifier` is the child, see :mod:`step_sglang.voting.comparer`.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import Counter, OrderedDict
from concurrent.futures import CancelledError
from typing import TypeVar

from step_sglang.voting.answers import quickly_equivalent
from step_sglang.voting.classes import PairQuestion, Question, Reply, Steps
from step_sglang.voting.pool import Account, PendingQuestion, Pool, Settled

T = TypeVar("T")
TIME_LIMIT = 5.0  # seconds of CPU time for one question
BUDGET = 60.0  # seconds of CPU time for one group
SERVER_BUDGET = 10.0  # where groups of others wait
_CACHE = 4096  # replies


class AnswerVerifier:
    """Compares answers in children, started when first needed. Safe to share by threads.

    Args:
        time_limit: seconds of CPU time for one question: to parse an answer, or to compare
            two of them.
        budget: seconds of CPU time for one :class:`Comparison`.
        children: how many work at once.
        spare: keep one more child ready, so that after a kill nothing waits for a start.
    """

    def __init__(
        self,
        time_limit: float = TIME_LIMIT,
        budget: float = BUDGET,
        children: int = 1,
        spare: bool = False,
    ) -> None:
        self._budget = budget
        self._pool = Pool(time_limit, children, spare)
        self._replies = _Replies()
        # Also at the interpreter's end, which waits for no thread of ours.
        self._finalizer = weakref.finalize(self, self._pool.close)

    @property
    def counts(self) -> Counter[str]:
        """So far: ``forms`` and ``pairs`` asked of children, ``kills`` of them, ``starts``."""
        return Counter(self._pool.counts)

    def comparison(self) -> Comparison:
        """One group's comparison, with a budget and a fair share of its own."""
        return Comparison(self._pool, self._replies, self._budget)

    def same(self, one: str, other: str) -> bool:
        """Whether two answers mean the same; False when that cannot be told in time."""
        quick = quickly_equivalent(one, other)
        if quick is not None:
            return quick
        return self.comparison().ask(PairQuestion(one.strip(), other.strip())) is True

    def close(self) -> None:
        """End the children; whatever still waits compares as text."""
        self._finalizer()


class Comparison:
    """The comparisons of one group, one after the other."""

    def __init__(self, pool: Pool, replies: _Replies, budget: float) -> None:
        self._pool = pool
        self._replies = replies
        self._account = Account(budget)
        self._asked: PendingQuestion | None = None
        self._stopped = False

    @property
    def spent(self) -> float:
        """Seconds of CPU time so far."""
        return self._account.spent

    def stop(self) -> None:
        """End the work at once, from any thread: all that follows compares as text."""
        self._stopped = True
        asked = self._asked
        if asked is not None:
            asked.settle(None)

    def ask(self, question: Question) -> Reply:
        """One question's reply; blocks. None: that cannot be told, or not in time."""
        asked = self._submit(question)
        try:
            settled = asked.future.result()
        except CancelledError:
            return None
        finally:
            asked.future.cancel()
        return self._learn(question, settled)

    def run(self, steps: Steps[T]) -> T:
        """Go through all steps; blocks while children work."""
        reply: Reply = None
        try:
            question = next(steps)
            while True:
                reply = self.ask(question)
                question = steps.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result

    async def arun(self, steps: Steps[T]) -> T:
        """Go through all steps without blocking the event loop; cancelled, the work ends."""
        reply: Reply = None
        try:
            question = next(steps)
            while True:
                asked = self._submit(question)
                # Cancelling it gives the question up, which whoever works on it notices.
                reply = self._learn(question, await asyncio.wrap_future(asked.future))
                question = steps.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    def _submit(self, question: Question) -> PendingQuestion:
        asked = self._asked = PendingQuestion(question, self._account)
        known, reply = self._replies.get(question)
        if known or self._stopped or self._account.empty:
            asked.settle(reply)
        else:
            self._pool.submit(asked)
        return asked

    def _learn(self, question: Question, settled: Settled) -> Reply:
        if settled.final:
            self._replies.put(question, settled.reply)
        return settled.reply


class _Replies:
    """The latest replies, of all groups: also that a question has none within the time limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Question, Reply] = OrderedDict()

    def get(self, question: Question) -> tuple[bool, Reply]:
        with self._lock:
            return question in self._kept, self._kept.get(question)

    def put(self, question: Question, reply: Reply) -> None:
        with self._lock:
            self._kept[question] = reply
            while len(self._kept) > _CACHE:
                self._kept.popitem(last=False)


if __name__ == "__main__":
    from step_sglang.voting.comparer import main

    main()
