"""Prometheus metrics of one HTTP process that keeps groups. Knows nothing of SGLang."""

from __future__ import annotations

from collections.abc import Mapping


class GatheringMetrics:
    """Counts kept groups; one object per process, because names are registered once.

    Args:
        labels: of every series.
    """

    def __init__(self, labels: Mapping[str, object]) -> None:
        # In a server the import must come after SGLang told the library that processes share.
        from prometheus_client import Counter

        self._labels = {name: str(value) for name, value in labels.items()}
        names = tuple(self._labels)
        self._groups = Counter(
            "step_groups_sampled_total",
            "Groups chosen to be kept for training, and what became of them.",
            (*names, "fate"),
        )
        # A scheduler's metric too, in its own process.
        self._failures = Counter(
            "step_failures_total", "Failures that cost a score or a pruning.", (*names, "where")
        )

    def group(self, fate: str) -> None:
        """A group began, or met its fate."""
        self._groups.labels(**self._labels, fate=fate).inc()

    def failed(self, where: str) -> None:
        """STEP itself failed; ``where`` is one of the words for it."""
        self._failures.labels(**self._labels, where=where).inc()
