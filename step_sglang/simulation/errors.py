"""What can go wrong before or in a simulation; each error is one message that says what to do."""

from __future__ import annotations

from step_sglang.errors import StepError


class SimulationError(StepError):
    """The options, the traces or a preset's name are not what a simulation can use."""
