"""What a tokenizer manager reports in metrics and spans: of votes, and of groups that it keeps."""

from __future__ import annotations

from typing import Any

from step_sglang import protocol
from step_sglang.gathering.metrics import GatheringMetrics
from step_sglang.patches import guard, sample
from step_sglang.patches.aborts import LiveVote
from step_sglang.patches.server_args import config_of
from step_sglang.patches.state import is_traced
from step_sglang.voting.metrics import VoteMetrics
from step_sglang.voting.session import VoteSession

_METRICS = "step_vote_metrics"  # on the tokenizer manager, with --enable-metrics


@guard.guard(protocol.IN_METRICS)
def init_metric_collector_watchdog(result: None, manager: Any) -> None:
    """AFTER ``TokenizerManager.init_metric_collector_watchdog``."""
    config = config_of(manager.server_args)
    if not manager.enable_metrics or config is None:
        return
    # What requests fill in themselves is empty, and a vote has none of it.
    labels = {name: value for name, value in manager.metrics_collector.labels.items() if value}
    metrics = VoteMetrics(labels)
    setattr(manager, _METRICS, metrics)
    guard.observe(metrics.failed)
    if config.sample:
        sample.count_with(GatheringMetrics(labels))


def vote_begins(live: LiveVote, inner: Any) -> None:
    """The traces of a vote are about to start, as the request ``inner``."""
    if is_traced(live.state):
        from step_sglang.patches import spans

        spans.lead_to(live.state, inner)


def vote_ended(manager: Any, live: LiveVote, session: VoteSession) -> None:
    """A vote was taken: it came to its end, and its request was not aborted."""
    metrics: VoteMetrics | None = getattr(manager, _METRICS, None)
    if metrics is not None:
        with guard.guard(protocol.IN_METRICS):
            metrics.voted(session)
    if is_traced(live.state):
        from step_sglang.patches import spans

        spans.vote_ended(live.state, session)
