"""What can go wrong in an evaluation; each error is one message that says what to do."""

from __future__ import annotations

from step_sglang.errors import StepError


class BenchError(StepError):
    """The options contradict each other, the folder's earlier results, or the server."""


class ReplayError(StepError):
    """The recorded traces are missing, damaged, or cannot be replayed as asked."""
