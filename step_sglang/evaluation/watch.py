"""Looks at a server's metrics while a question runs: the KV pool, who runs, who waits."""

from __future__ import annotations

import re
import threading
import time
from types import TracebackType

import httpx

from step_sglang.evaluation.records import Usage

INTERVAL = 0.5  # seconds
_GAUGE = re.compile(
    r"^sglang:(token_usage|num_running_reqs|num_queue_reqs)(?:\{[^}]*\})? (\S+)$", re.MULTILINE
)


def read_gauges(text: str) -> dict[str, float]:
    """The three gauges of a ``/metrics`` answer; of several ranks the largest."""
    found: dict[str, float] = {}
    for name, value in _GAUGE.findall(text):
        found[name] = max(found.get(name, 0.0), float(value))
    return found


class PoolWatch:
    """Samples until it is closed; a server without ``--enable-metrics`` gives no samples."""

    def __init__(self, url: str, interval: float = INTERVAL) -> None:
        self._url, self._interval = url, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._started = 0.0
        self._found: list[Usage] = []

    def __enter__(self) -> PoolWatch:
        self._started = time.perf_counter()
        if self._interval > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def usage(self) -> tuple[Usage, ...]:
        """What was seen."""
        return tuple(self._found)

    def _sample(self) -> None:
        with httpx.Client(timeout=10.0) as client:
            while not self._over.wait(self._interval):
                at = time.perf_counter() - self._started
                try:
                    answer = client.get(f"{self._url}/metrics")
                except httpx.HTTPError:
                    continue  # the question itself will tell what is wrong
                seen = read_gauges(answer.text) if answer.status_code == 200 else {}
                if seen:
                    self._found.append(
                        Usage(
                            round(at, 2),
                            round(seen.get("token_usage", 0.0), 4),
                            int(seen.get("num_running_reqs", 0)),
                            int(seen.get("num_queue_reqs", 0)),
                        )
                    )
