"""Fails open: a defect in what STEP computes costs a score or a pruning, never the server.

Guards decisions and bookkeeping, not the engine's own calls: what SGLang's functions raise is
SGLang's to handle, and going on after one that failed half-way is not safe. Tensor-parallel ranks
compute from the same data, so they fail alike; only scores can differ, and what chooses by them is
guarded by itself, so that a rank that fails still takes part in the exchange after it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

_counts: Counter[str] = Counter()
_logged: set[tuple[str, type[BaseException]]] = set()
_observer: Callable[[str], None] | None = None


class guard(ContextDecorator):
    """Swallows, counts and logs what its body raises: ``with guard(where):`` or ``@guard(where)``.

    A decorated function that fails returns None. ``failed`` says whether the body did. The first
    failure of each kind is logged with its traceback, all others are only counted.

    Args:
        where: the counter's label; one of the words for it.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self.failed = False

    def __enter__(self) -> guard:
        self.failed = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or _capturing():
            return False
        self.failed = True
        _count(self._where, error)
        return True


def counts() -> dict[str, int]:
    """Failures of this process so far, by place."""
    return dict(_counts)


def observe(observer: Callable[[str], None]) -> None:
    """Call ``observer`` with the place of every failure of this process."""
    global _observer  # noqa: PLW0603
    _observer = observer


def count(where: str, error: Exception) -> bool:
    """Count a failure that somebody else caught and tells; whether it is the first of its kind."""
    _counts[where] += 1
    first = (where, type(error)) not in _logged
    _logged.add((where, type(error)))
    if _observer is not None:
        try:
            _observer(where)
        except Exception:  # what counts failures may itself be what fails
            logger.debug("STEP could not count a failure", exc_info=True)
    return first


def _count(where: str, error: Exception) -> None:
    if count(where, error):
        logger.error(
            "STEP failed in %s, and goes on without; failures of this kind are only counted "
            "from now on",
            where,
            exc_info=error,
        )


def _capturing() -> bool:
    # A graph captured without the op would never score: then the server must not start.
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
