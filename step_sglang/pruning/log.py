"""What a scheduler's log says of prunings and branches: a line for each, or one an interval.

At 10^5 prunings an hour a line for each would be all that a log holds. Knows nothing of SGLang.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

INTERVAL = 10.0  # seconds


@dataclass
class _Sums:
    """Of one interval."""

    began: float
    pruned: Counter[str] = field(default_factory=Counter)  # by reason
    branched: Counter[str] = field(default_factory=Counter)
    freed: int = 0  # KV tokens
    scores: list[float] = field(default_factory=list)
    used: str = ""  # of the pool, after the last one


class PruningLog:
    """Tells of prunings and branches.

    Args:
        each: log a line for each at info. Else those are at debug, and a line with the sums of an
            interval is at info.
        interval: seconds from the first event that a line tells of until the line.
    """

    def __init__(self, *, each: bool, interval: float = INTERVAL) -> None:
        self._level = logging.INFO if each else logging.DEBUG
        self._each = each
        self._interval = interval
        self._sums: _Sums | None = None
        self._lock = threading.Lock()

    def pruned(
        self, rid: str, group: str, score: float | None, steps: int, reason: str, freed: int,
        used: int, pool: int,
    ) -> None:  # fmt: skip
        """A trace was pruned: ids fit for a log, KV tokens that came free, are used, and exist."""
        shown = "none" if score is None else f"{score:.4f}"
        logger.log(
            self._level,
            "STEP pruned rid=%s group=%s score=%s steps=%d reason=%s tokens_freed=%d "
            "pool_used=%d/%d",
            rid, group, shown, steps, reason, freed, used, pool,
        )  # fmt: skip
        if self._each:
            return
        with self._lock:
            sums = self._open()
            sums.pruned[reason] += 1
            sums.freed += freed
            sums.used = f"{used}/{pool}"
            if score is not None:
                sums.scores.append(score)

    def branched(
        self, rid: str, group: str, parent: str, position: int, depth: int, score: float | None,
        reason: str,
    ) -> None:  # fmt: skip
        """A branch began: ids fit for a log, the last token that it has of its parent."""
        shown = "none" if score is None else f"{score:.4f}"
        logger.log(
            self._level,
            "STEP branched rid=%s group=%s parent=%s position=%d depth=%d score=%s reason=%s",
            rid, group, parent, position, depth, shown, reason,
        )  # fmt: skip
        if self._each:
            return
        with self._lock:
            self._open().branched[reason] += 1

    def _open(self) -> _Sums:
        if self._sums is None:
            self._sums = _Sums(time.monotonic())
            # Nothing may happen for hours: what was summed up is told all the same.
            timer = threading.Timer(self._interval, self._tell)
            timer.daemon = True
            timer.start()
        return self._sums

    def _tell(self) -> None:
        with self._lock:
            sums, self._sums = self._sums, None
        if sums is not None:
            logger.info("STEP in %.0f s: %s", time.monotonic() - sums.began, _words(sums))


def _words(sums: _Sums) -> str:
    parts = []
    if sums.pruned:
        scores = ""
        if sums.scores:
            low, high = min(sums.scores), max(sums.scores)
            scores = f", scores {low:.4f} to {high:.4f}"
        parts.append(
            f"pruned {sums.pruned.total()} ({_counts(sums.pruned)}), tokens_freed={sums.freed}"
            f"{scores}, pool_used={sums.used}"
        )
    if sums.branched:
        parts.append(f"branched {sums.branched.total()} ({_counts(sums.branched)})")
    return "; ".join(parts)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.most_common())
