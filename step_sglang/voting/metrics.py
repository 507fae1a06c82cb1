"""Prometheus metrics of the votes that a server takes. Knows nothing of SGLang.

Votes of clients (``solve``, ``ask``) are theirs, and no server sees them.
"""

from __future__ import annotations

from collections.abc import Mapping

from step_sglang import protocol
from step_sglang.pruning.metrics import CounterBy, failures
from step_sglang.voting.session import VoteSession, VoteStatus


class VoteMetrics:
    """Counts votes; one object per process, because names are registered once.

    Args:
        labels: of every series, such as the model's name.
    """

    def __init__(self, labels: Mapping[str, object]) -> None:
        values = {name: str(value) for name, value in labels.items()}
        self._votes = CounterBy(
            "step_votes_total", "Votes that the server took.", values, "status",
            [status.value for status in VoteStatus],
        )  # fmt: skip
        self._early = CounterBy(
            "step_votes_ended_early_total", "Of these, votes that ended before their last trace.",
            values, "rule", protocol.EARLY_ENDS,
        )  # fmt: skip
        self._failures = failures(values)

    def voted(self, session: VoteSession) -> None:
        """A vote was taken."""
        self._votes.inc(session.outcome().status.value)
        if session.ended_by is not None:
            self._early.inc(session.ended_by)

    def failed(self, where: str) -> None:
        """STEP itself failed in this process; ``where`` is one of the words for it."""
        self._failures.inc(where)
