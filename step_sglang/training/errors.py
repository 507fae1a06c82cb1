"""Errors of stores and of training."""

from __future__ import annotations

from step_sglang.errors import StepError


class StoreError(StepError):
    """A folder of collected traces is missing, damaged, or does not fit what was asked."""


class TrainError(StepError):
    """The collected traces cannot train or test a scorer."""
