"""Samples the resident memory of a server's processes, and fits a line through it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import psutil

MIB = 1024 * 1024
EVERY = 2.0  # seconds between samples


@dataclass(frozen=True)
class Slope:
    """The line through one process's resident memory after the warm-up."""

    process: str
    first_mib: float  # at the end of the warm-up, on the line
    mib_per_hour: float
    error: float  # its standard error, also MiB per hour
    hours: float  # that the line covers

    @property
    def growth_mib(self) -> float:
        """What the process has certainly grown by: three standard errors below the line."""
        return (self.mib_per_hour - 3 * self.error) * self.hours

    def __str__(self) -> str:
        return (
            f"{self.process}: {self.first_mib:.0f} MiB, {self.mib_per_hour:+.1f} MiB/h "
            f"(standard error {self.error:.1f}) over {self.hours * 60:.1f} min"
        )


class MemoryWatch:
    """Samples a process and all of its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._samples: dict[tuple[int, str], list[tuple[float, float]]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(EVERY):
            now = time.monotonic()
            try:
                children = self._root.children(recursive=True)
            except psutil.NoSuchProcess:
                return  # the server died
            for process in (self._root, *children):
                try:
                    size = process.memory_info().rss / MIB
                    key = (process.pid, self._name(process))
                except psutil.NoSuchProcess:
                    continue
                self._samples.setdefault(key, []).append((now, size))

    def _name(self, process: psutil.Process) -> str:
        """SGLang's own title of a process, such as ``sglang::scheduler``."""
        if process == self._root:
            return "http server"
        title = " ".join(process.cmdline()).strip() or process.name()
        return title if title.startswith("sglang::") else process.name()

    def slopes(self, warm_up: float) -> list[Slope]:
        """One per process that lived longer than ``warm_up`` seconds after the first sample."""
        start = min((samples[0][0] for samples in self._samples.values()), default=0.0)
        found = []
        for (_, name), samples in self._samples.items():
            kept = np.array([s for s in samples if s[0] >= start + warm_up])
            if len(kept) >= 3:
                found.append(_fit(name, kept))
        return found


def _fit(name: str, samples: np.ndarray) -> Slope:
    """Least squares; ``samples`` [N, 2] are seconds and MiB."""
    hours = (samples[:, 0] - samples[0, 0]) / 3600
    slope, first = np.polyfit(hours, samples[:, 1], 1)
    residuals = samples[:, 1] - (first + slope * hours)
    spread = float(((hours - hours.mean()) ** 2).sum())
    error = float(np.sqrt((residuals**2).sum() / (len(samples) - 2) / spread))
    return Slope(name, float(first), float(slope), error, float(hours[-1]))
