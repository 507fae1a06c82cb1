"""Prometheus metrics of one scheduler. Knows nothing of SGLang, which exports what is made here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from step_sglang import protocol
from step_sglang.pruning.groups import GroupRegistry, Trace, TraceStatus

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

SCORE_BUCKETS = tuple(i / 20 for i in range(1, 21))
DEPTH_BUCKETS = (1, 2, 3, 4, 6, 8)
WAITING_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # seconds


class CounterBy:
    """A counter with one label more, whose series all begin at 0.

    A series that appears with its first event would begin at 1, which no ``increase()`` sees.

    Args:
        name: of the metric.
        text: what it counts.
        labels: of every series.
        by: the label.
        values: that it can have.
    """

    def __init__(
        self, name: str, text: str, labels: Mapping[str, str], by: str, values: Iterable[str]
    ) -> None:
        from prometheus_client import Counter

        self._counter = Counter(name, text, (*labels, by))
        self._labels, self._by = labels, by
        for value in values:
            self._of(value)

    def inc(self, value: str) -> None:
        """Count one."""
        self._of(value).inc()

    def _of(self, value: str) -> Counter:
        return self._counter.labels(**self._labels, **{self._by: value})


def failures(labels: Mapping[str, str]) -> CounterBy:
    """Counts what failed inside STEP in one process."""
    return CounterBy(
        "step_failures_total", "Failures that cost a score or a pruning.", labels, "where",
        protocol.FAILURE_PLACES,
    )  # fmt: skip


class StepMetrics:
    """Counts what happens to traces; one object per process, because names are registered once.

    Args:
        labels: of every series, such as the model's name and the rank.
    """

    def __init__(self, labels: Mapping[str, object]) -> None:
        # In a server the import must come after SGLang told the library that processes share.
        from prometheus_client import Counter, Gauge, Histogram

        values = {name: str(value) for name, value in labels.items()}
        names = tuple(values)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, names).labels(**values)

        def gauge(name: str, text: str) -> Gauge:
            found = Gauge(name, text, names, multiprocess_mode="mostrecent").labels(**values)
            found.set(0)  # one that was never set is not shown
            return found

        self._traces = counter("step_traces_scored_total", "Traces ended with at least one score.")
        self._steps = counter("step_steps_scored_total", "Steps scored.")
        self._unscored = counter(
            "step_steps_unscored_total", "Steps whose score was not finite, so not counted."
        )
        self._failures = failures(values)
        self._freed = counter("step_tokens_freed_total", "KV tokens freed by pruning.")
        self._pruned = CounterBy(
            "step_traces_pruned_total", "Traces pruned.", values, "reason",
            protocol.PRUNING_REASONS,
        )  # fmt: skip
        self._branches = CounterBy(
            "step_branches_total", "Branches started.", values, "reason",
            protocol.BRANCHING_REASONS,
        )  # fmt: skip
        self._depths = Histogram(
            "step_branch_depth", "Branches between a started one and the first of its family.",
            names, buckets=DEPTH_BUCKETS,
        ).labels(**values)  # fmt: skip
        self._families = gauge(
            "step_families_alive",
            "Families with a running or waiting trace, of groups with refill.",
        )
        self._alive = gauge("step_traces_alive", "Traces that run or wait.")
        self._groups = gauge("step_groups_alive", "Groups with a running or waiting trace.")
        self._groups_waiting = gauge(
            "step_groups_waiting", "Groups that may not begin yet, because as many as may run do."
        )
        self._survivors = gauge(
            "step_survivors", "Traces of these groups that run, wait or finished normally."
        )
        self._stale = gauge(
            "step_scorer_stale", "1 after an update of the weights that the scorer was trained for."
        )
        self._lost = counter(
            "step_passes_lost_total", "Forward passes with live traces that were not scored."
        )
        self._stopped = gauge("step_stopped", "1 after STEP gave up, because passes were lost.")
        self._scores = Histogram("step_score", "Step scores.", names, buckets=SCORE_BUCKETS).labels(
            **values
        )
        waiting = Histogram(
            "step_waiting_seconds",
            "Time in the waiting queue of requests that ended: STEP's traces, and others.",
            (*names, "kind"),
            buckets=WAITING_BUCKETS,
        )
        self._waiting: dict[bool, Histogram] = {
            is_trace: waiting.labels(**values, kind=kind)
            for is_trace, kind in ((True, "step"), (False, "other"))
        }

    def trace_changed(self, groups: GroupRegistry, trace: Trace) -> None:
        """A trace joined its group, or ended."""
        self._alive.set(groups.num_live)
        self._groups.set(len(groups))
        self._survivors.set(groups.num_survivors)
        self._families.set(len(groups.families))
        if trace.fate is not TraceStatus.LIVE and trace.num_steps:
            self._traces.inc()

    def groups_wait(self, number: int) -> None:
        """So many groups wait for others to end."""
        self._groups_waiting.set(number)

    def step_scored(self, score: float) -> None:
        """A step of a trace was scored."""
        self._steps.inc()
        self._scores.observe(score)

    def step_unscored(self) -> None:
        """A step ended whose score was not finite."""
        self._unscored.inc()

    def failed(self, where: str) -> None:
        """STEP itself failed; ``where`` is one of the words for it."""
        self._failures.inc(where)

    def trace_pruned(self, reason: str, tokens_freed: int) -> None:
        """A trace was pruned; ``reason`` is one of the words for it."""
        self._pruned.inc(reason)
        self._freed.inc(tokens_freed)

    def trace_branched(self, reason: str, depth: int) -> None:
        """A branch was started; ``reason`` is one of the words for it."""
        self._branches.inc(reason)
        self._depths.observe(depth)

    def scorer_is_stale(self) -> None:
        """The model's weights were updated."""
        self._stale.set(1)

    def pass_lost(self) -> None:
        """A forward pass with live traces was not scored."""
        self._lost.inc()

    def has_stopped(self) -> None:
        """STEP gave up for good."""
        self._stopped.set(1)

    def request_waited(self, seconds: float, *, is_trace: bool) -> None:
        """A request that ended had spent this long in the waiting queue."""
        self._waiting[is_trace].observe(seconds)
