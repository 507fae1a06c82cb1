"""Errors of stores and of training."""

from __future__ import annotations

from step_sglang.errors import ServerError, StepError


class StoreError(StepError):
    """A folder of collected traces is missing, damaged, or does not fit what was asked."""


class UnusableTrace(ServerError):
    """A trace of one question cannot be stored; those of other questions may be fine."""


class TrainError(StepError):
    """The collected traces cannot train or test a scorer."""
