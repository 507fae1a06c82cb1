"""What happened to a trace token by token, for a response that asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from step_sglang import protocol


@dataclass(slots=True, eq=False)
class Timeline:
    """One entry per output token, in order."""

    times: list[float] = field(default_factory=list)  # unix seconds, when the scheduler saw it
    confidences: list[float] = field(default_factory=list)  # nats

    def token(self, now: float, confidence: float) -> None:
        """One more token."""
        self.times.append(now)
        self.confidences.append(confidence)

    def up_to(self, tokens: int) -> Timeline:
        """Of the first tokens alone."""
        return Timeline(self.times[:tokens], self.confidences[:tokens])

    def as_json(self) -> dict[str, Any]:
        """JSON values: tenths of a millisecond, the precision of fp32; null for NaN."""
        return {
            protocol.RECORD_TIMES: [round(time, 4) for time in self.times],
            protocol.RECORD_CONFIDENCES: [
                None if math.isnan(value) else float(f"{value:.7g}") for value in self.confidences
            ],
        }
