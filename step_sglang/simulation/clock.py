"""The clock of a virtual GPU: simulated seconds in a file, which several processes read."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

_SECONDS = struct.Struct("=d")
_BEGIN = 1.0  # seconds: SGLang takes a time of 0 for one that is not known


class Clock:
    """Simulated seconds. One process sets them, any may read them.

    A double that is aligned is written at once on every machine that SGLang runs on, so no lock is
    needed.
    """

    def __init__(self, path: Path) -> None:
        """Open the clock of a file, or make it, at its begin."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            new = os.fstat(handle).st_size < _SECONDS.size
            if new:
                os.ftruncate(handle, _SECONDS.size)
            self._view = mmap.mmap(handle, _SECONDS.size)
        finally:
            os.close(handle)
        if new:
            self.set(_BEGIN)

    def now(self) -> float:
        """Seconds since the virtual GPU was switched on."""
        return float(_SECONDS.unpack_from(self._view)[0])

    def set(self, seconds: float) -> None:
        """Move on to a moment."""
        _SECONDS.pack_into(self._view, 0, seconds)


class GpuTime:
    """When the passes that were launched are over.

    An engine launches a pass while the one before still computes, and looks at a pass's results
    when it is over: that is when the clock moves. What the engine itself takes is not counted.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._busy_until = clock.now()
        self._ends: list[float] = []  # of the passes whose results nobody has looked at yet

    def launched(self, seconds: float) -> None:
        """A pass was handed to the GPU, and takes that long."""
        self._busy_until = max(self._busy_until, self._clock.now()) + seconds
        self._ends.append(self._busy_until)

    def completed(self) -> None:
        """The engine looks at the results of the oldest pass."""
        if self._ends:
            self._clock.set(max(self._clock.now(), self._ends.pop(0)))
