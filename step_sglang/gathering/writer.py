"""A thread that votes on kept groups and writes them, so that nobody who serves waits for it.

What fails costs the group, and is told; nothing is raised to whoever serves.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from step_sglang.gathering.folder import MEGABYTE, Folder
from step_sglang.gathering.record import GroupInProgress, line, voting
from step_sglang.voting.verifier import SERVER_BUDGET, AnswerVerifier

MAX_WAITING = 8  # groups; more are not kept
BEGUN, STORED, UNVOTED, LOST = "begun", "stored", "unvoted", "lost"
FATES = (BEGUN, STORED, UNVOTED, LOST)  # unvoted: no trace has an answer


class Writer:
    """Writes to one folder, from one process.

    Args:
        folder: where.
        megabytes: what it may hold.
        count: is told of every group, by one of ``FATES``; called in any thread.
        failed: is told of what went wrong; called in any thread.
    """

    def __init__(
        self,
        folder: Path,
        megabytes: int,
        count: Callable[[str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._limit = megabytes * MEGABYTE
        self._folder = Folder(folder, self._limit)
        self._count, self._failed = count, failed
        self._waiting: queue.Queue[GroupInProgress | None] = queue.Queue(MAX_WAITING)
        self._verifier = AnswerVerifier(budget=SERVER_BUDGET)
        self._thread = threading.Thread(target=self._run, name="step-sample", daemon=True)
        self._thread.start()

    def put(self, group: GroupInProgress) -> None:
        """Keep a complete group; returns at once."""
        try:
            self._waiting.put_nowait(group)
        except queue.Full:
            self._count(LOST)

    def close(self, patience: float = 5.0) -> None:
        """Write what waits, for at most so many seconds, and end."""
        try:
            self._waiting.put(None, timeout=patience)
        except queue.Full:
            return
        self._thread.join(patience)

    def _run(self) -> None:
        while (group := self._waiting.get()) is not None:
            try:
                self._count(self._write(group))
            except Exception as error:  # the disk, or a defect of ours: serving goes on
                self._count(LOST)
                self._failed(error)
        self._folder.close()
        self._verifier.close()

    def _write(self, group: GroupInProgress) -> str:
        if group.least_bytes > self._limit:
            return LOST
        vote = self._verifier.comparison().run(voting(group))
        if vote is None:
            return UNVOTED
        return STORED if self._folder.add(b"".join(line(group, vote))) else LOST
