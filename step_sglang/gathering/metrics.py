"""Prometheus metrics of one HTTP process that keeps groups. Knows nothing of SGLang."""

from __future__ import annotations

from collections.abc import Mapping

from step_sglang.gathering.writer import FATES
from step_sglang.pruning.metrics import CounterBy


class GatheringMetrics:
    """Counts kept groups; one object per process, because names are registered once.

    Args:
        labels: of every series.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._groups = CounterBy(
            "step_groups_sampled_total",
            "Groups chosen to be kept for training, and what became of them.",
            labels,
            "fate",
            FATES,
        )

    def group(self, fate: str) -> None:
        """A group began, or met its fate."""
        self._groups.inc(fate)
