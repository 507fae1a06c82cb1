"""What can go wrong in the toolchain; each error is one message that says what to do."""

from __future__ import annotations

from step_sglang.errors import StepError


class StoreError(StepError):
    """A folder of collected traces is missing, damaged, or does not fit what was asked."""


class SourceError(StepError):
    """The questions or traces to collect from are missing, empty or malformed."""


class ServerError(StepError):
    """The server does not start, does not answer, or answers something unusable."""


class TrainError(StepError):
    """The collected traces cannot train or test a scorer."""


class RequestRefused(ServerError):
    """The server refused one request; others may be fine."""
