"""Samples a server's metrics during a trial: KV pool usage, running and waiting requests."""

from __future__ import annotations

import threading
import time

from prometheus_client.parser import text_string_to_metric_families

from step_sglang.client.http import Client
from step_sglang.errors import ServerError
from step_sglang.evaluation.trial_result import PoolUsage

INTERVAL = 0.5  # seconds
_GAUGES = ("token_usage", "num_running_reqs", "num_queue_reqs")


def read_gauges(text: str) -> dict[str, float]:
    """The three gauges in the text of ``/metrics``; with several ranks, the largest value."""
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            name = family.name.removeprefix("sglang:")
            if name in _GAUGES:
                values = (sample.value for sample in family.samples)
                found[name] = max(values, default=0.0)
    except ValueError:  # no metrics page
        return {}
    return found


class PoolWatch:
    """Samples until the context ends. Without ``--enable-metrics`` there are no samples."""

    def __init__(self, url: str, interval: float = INTERVAL) -> None:
        self._url, self._interval = url, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._started = 0.0
        self._found: list[PoolUsage] = []

    def __enter__(self) -> PoolWatch:
        self._started = time.perf_counter()
        if self._interval > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def usage(self) -> tuple[PoolUsage, ...]:
        """The samples so far."""
        return tuple(self._found)

    def _sample(self) -> None:
        with Client(self._url, timeout=10.0) as client:
            while not self._over.wait(self._interval):
                at = time.perf_counter() - self._started
                try:
                    seen = read_gauges(client.metrics())
                except ServerError:
                    continue  # the question itself will tell what is wrong
                if seen:
                    self._found.append(
                        PoolUsage(
                            round(at, 2),
                            round(seen.get("token_usage", 0.0), 4),
                            int(seen.get("num_running_reqs", 0)),
                            int(seen.get("num_queue_reqs", 0)),
                        )
                    )
